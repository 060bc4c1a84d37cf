"""What the tests ask of a loaded model: load it, run it, compare it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from raytune_ft.config.schema import ModelSection
from raytune_ft.model.loading import load_model
from tests.families.checkpoints import Weights

CPU = torch.device("cpu")
TOLERANCE = 1e-5
"""Of the largest logit, at least of 1. float32 rounds at 6e-8; a dozen sums of 64 to 128 terms
per layer leave about 1e-6 of the largest logit, and a wrong tensor leaves a tenth or more."""


def load(folder: Path, *, head_trained: bool = False, **section: Any) -> Any:
    """Load a checkpoint on the CPU; `section`: fields of the recipe's model section."""
    values = ModelSection.model_validate({"path": str(folder), **section})
    return load_model(folder, values, CPU, head_trained=head_trained)


def logits(model: Any, ids: Tensor, **inputs: Any) -> Tensor:
    """Return logits (B, n, V) of ids (B, n) or (n,)."""
    with torch.no_grad():
        found: Tensor = model(torch.atleast_2d(ids), use_cache=False, **inputs).logits
    return found


def difference(ours: Tensor, expected: Tensor) -> float:
    """Return the largest difference, as a share of the largest expected value if that is over 1."""
    assert ours.shape == expected.shape
    size = max(1.0, float(expected.detach().abs().max()))
    return float((ours.detach().double() - expected.detach().double()).abs().max()) / size


def random_ids(words: int, *shape: int, seed: int = 7) -> Tensor:
    """Draw ids, none of the first three: they may be padding, whose embedding has no gradient."""
    return torch.randint(3, words, shape, generator=torch.Generator().manual_seed(seed))


def read_folder(folder: Path) -> Weights:
    """Return the tensors of a folder's safetensors files under their own names."""
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def without_buffers(weights: Weights) -> Weights:
    """Leave out the rotary buffers, which every reader computes."""
    return {name: w for name, w in weights.items() if not name.endswith("inv_freq")}
