"""Ahead: what a worker does while its driver still prepares the job.

In: a recipe. Out: the device of this process, libraries imported, kept weights on their way from
the disk. All of it would be done later as well, but then the run would wait for it.
"""

from __future__ import annotations

import importlib
import os
from contextlib import suppress
from pathlib import Path

import torch

from raytune_ft import host
from raytune_ft.config.schema import ModelSection, Recipe
from raytune_ft.errors import RaytuneError
from raytune_ft.model import loading, nf4_store
from raytune_ft.model.lean_imports import lean

MUON = "deepspeed.runtime.zero.muon.muon_optimizer"
"""DeepSpeed imports it when any engine is made, and it torch's compiler."""


def come_ready(recipe: Recipe) -> None:
    """Import what building the engine will, before there is a job to build it for.

    What cannot be imported, and what is wrong with a model's folder, is told by whoever needs it.
    """
    device = device_of(recipe.run.workers)
    if Path(recipe.model.path).is_dir():
        read_ahead(Path(recipe.model.path), recipe.model, device)
    names = ["peft", "transformers.modeling_utils"]
    names += ["bitsandbytes"] if recipe.model.quantization != "none" else []
    names += ["deepspeed", MUON] if recipe.train.deepspeed != "none" else []
    with lean():
        for name in names:
            with suppress(ImportError):
                importlib.import_module(name)


def read_ahead(folder: Path, section: ModelSection, device: torch.device) -> None:
    """Have quantised weights that an earlier start kept come from the disk, and do not wait."""
    with suppress(RaytuneError, OSError):
        dtype = str(loading.compute_dtype(section, device)).removeprefix("torch.")
        named = section.model_copy(update={"dtype": dtype})
        kept = nf4_store.Kept.of(folder, loading.weight_files(folder), named, device)
        if kept is not None:
            kept.read_ahead()


def device_of(sharing: int) -> torch.device:
    """Return where this process computes, and set it up.

    Args:
        sharing: training processes that share one machine's cores.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    # DeepSpeed looks for an accelerator at import and would take a GPU that torch cannot use
    os.environ["DS_ACCELERATOR"] = "cpu"
    # Ray gives a worker one thread; the ranks of this machine share its cores
    torch.set_num_threads(max(1, host.cores() // sharing))
    return torch.device("cpu")
