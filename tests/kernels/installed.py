"""Tiny models of every family with an adapter, plain and with the fast path, and steps of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.model import adapter
from raytune_ft.model.fast import Report, install
from raytune_ft.model.loading import load_model
from raytune_ft.model.loss import TokenLoss
from tests.model.families import CONFIGS, make

CPU = torch.device("cpu")
SIZE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 8, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NATIVE: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"sliding_window": 6},
    "Mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 6},
    "Qwen3": {"attention_bias": True},
    "Phi3": {
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        },
    },
    "Gemma": {},
    "Gemma2": {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "Gemma3": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window": 6,
    },
    "Glm4": {},
}  # fmt: skip
"""Classes of transformers -> what differs in their configurations."""
FAMILIES = (*CONFIGS, *NATIVE)
TOKENS = 20

Made = tuple[Any, TokenLoss, Report]


@dataclass(frozen=True)
class Batch:
    """Arguments of a loss, (2, L)."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    segments: Tensor

    def first_row(self) -> Batch:
        """Return the batch without its other rows."""
        return Batch(self.ids[:1], self.labels[:1], self.positions[:1], self.segments[:1])

    def loss(self, loss: TokenLoss) -> Tensor:
        """Return the mean loss of a labelled token."""
        total, count = loss(self.ids, self.labels, self.positions, self.segments)
        return total / count  # type: ignore[no-any-return]


def batches(device: torch.device = CPU, length: int = TOKENS, words: int = 96) -> list[Batch]:
    """Return packed rows, rows with padding, and rows of one sample each."""
    third = length // 3
    kinds = (
        [[third, length - third], [third - 1, third, length - 2 * third + 1]],
        [[third, length - 2 * third, -third], [length - 4, -4]],
        [[length], [length]],
    )
    return [_batch(rows, seed, device, words) for seed, rows in enumerate(kinds)]


def _batch(rows: list[list[int]], seed: int, device: torch.device, words: int) -> Batch:
    """Make a batch of rows of segments' lengths; padding's is negative."""
    generator = torch.Generator().manual_seed(seed)
    length = sum(abs(n) for n in rows[0])
    ids = torch.randint(3, words, (len(rows), length), generator=generator)
    positions = [[i for n in row for i in range(abs(n))] for row in rows]
    segments = [
        [place if n > 0 else -1 for place, n in enumerate(row) for _ in range(abs(n))]
        for row in rows
    ]
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
    tensors = ids, labels, torch.tensor(positions), torch.tensor(segments)
    return Batch(*(tensor.to(device) for tensor in tensors))


def network(family: str, folder: Path, device: torch.device = CPU, **section: Any) -> Any:
    """Load a family's random model, frozen, as a recipe's model section would have it.

    Families of transformers are made in place: of the section their `dtype` counts.
    """
    if family in CONFIGS:
        place = folder / family
        if not place.exists():
            make(family, place)
        values = {"path": str(place), "dtype": "float32", **section}
        return load_model(place, ModelSection.model_validate(values), device)
    config = config_of(family)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False)
    if not model._supports_sdpa:  # as load_model has it
        model.set_attn_implementation("eager")
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.2)
        elif "norm" in name:
            nn.init.normal_(parameter, mean=0.5, std=0.2)
    return model.to(device, getattr(torch, section.get("dtype", "float32")))


def config_of(family: str) -> Any:
    name = "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config"
    return getattr(transformers, name)(**SIZE | NATIVE[family])


def with_adapter(model: Any, **lora: Any) -> Any:
    """Attach an adapter that changes something from the start."""
    values = {"r": 4, "alpha": 8, "dropout": 0.0, **lora}
    wrapped = adapter.attach(model, LoraSection.model_validate(values), 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                noise = torch.randn(parameter.shape, generator=generator) * 0.1
                parameter.copy_(noise.to(parameter))
    return wrapped


def made(family: str, folder: Path, fast: bool, **lora: Any) -> Made:
    """Return a family's model in training, its loss and the report."""
    model = with_adapter(network(family, folder), **lora)
    return finish(model, fast)


def finish(model: Any, fast: bool) -> Made:
    """Install the fast path or not."""
    device = next(model.parameters()).device
    report = install(model, device, fast)
    model.train()
    return model, TokenLoss(model, report), report


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients of what is trained, and forget them."""
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def train(
    one: Made, steps: int, given: Sequence[Batch] | None = None, lr: float = 1e-3
) -> list[float]:
    """Take steps of AdamW, batch by batch; return their losses. Dropouts draw the same numbers."""
    model, loss, _ = one
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    given = given or batches()
    for step in range(steps):
        torch.manual_seed(step)
        found = given[step % len(given)].loss(loss)
        found.backward()
        losses.append(found.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def least_cosine(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the least cosine between gradients of the same name; of two zeros it is 1."""
    assert found.keys() == expected.keys()
    return min(
        _cosine(found[name].flatten().double(), expected[name].flatten().double())
        for name in expected
    )


def _cosine(one: Tensor, two: Tensor) -> float:
    if not (one.any() or two.any()):
        return 1.0
    return float(nn.functional.cosine_similarity(one, two, dim=0))
