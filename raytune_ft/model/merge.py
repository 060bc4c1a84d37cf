"""Merging: base weights and an adapter in, a plain model folder out.

W + scale * B A is computed in float32, tensor by tensor, so memory holds one output shard and
the adapter. Parts of fused layers are changed on their rows. Adapters with more than A and B (DoRA,
trained biases or whole modules) are merged by PEFT in memory instead.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from raytune_ft.config.schema import ModelSection
from raytune_ft.errors import ModelError, RecipeError
from raytune_ft.model.loading import load_model
from raytune_ft.model.original import Change, Form, Original
from raytune_ft.model.side_files import copy_side_files, write_native_files
from raytune_ft.model.tensors import ShardWriter, size_bytes

Base = Literal["original", "dequantized"]
PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class MergeReport:
    """What a merge wrote."""

    folder: Path
    base: Base
    n_merged: int
    """Tensors that the adapter changed; 0 where PEFT merged in memory."""
    n_tensors: int
    n_shards: int
    size_bytes: int
    in_memory: bool


@dataclass(frozen=True)
class Update:
    """One target's low-rank update."""

    a: torch.Tensor
    """(r, in)"""
    b: torch.Tensor
    """(out, r)"""
    scale: float

    def apply(self, weight: torch.Tensor) -> torch.Tensor:
        """Add the update to `weight` (out, in) in float32; keep the weight's type."""
        delta = self.b.float() @ self.a.float()
        return torch.add(weight.float(), delta, alpha=self.scale).to(weight.dtype)


def merge_to(
    base_folder: Path,
    adapter_folder: Path,
    out: Path,
    max_shard_size: str = "2GB",
    base: str = "original",
    section: ModelSection | None = None,
    layout: Form = "original",
) -> MergeReport:
    """Write the folder of the merged model, in the base's precision, with its side files.

    Args:
        base_folder: model that the adapter was trained on.
        adapter_folder: PEFT folder.
        out: target; must not exist or be empty. It appears at the end, whole.
        max_shard_size: such as `2GB`.
        base: `original`: the files' weights. `dequantized`: those weights sent through NF4 and
            back, which an adapter trained on NF4 has seen, so its answers are kept.
        section: the run's model section; its `dtype` and `double_quant` count for `dequantized`.
        layout: `original`: tensor names, config.json, tokenizer files and the model's own Python
            files as in the base's folder. `native`: as transformers has the network; the
            tokenizer is left to the caller.

    Raises:
        RecipeError: a bad size or kind of base, `out` is not empty, or the model has no native
            form.
        ModelError: an adapter target is not in the base.
        CheckpointError: the adapter cannot be read.
    """
    limit = size_bytes(max_shard_size)
    if base not in get_args(Base):
        raise RecipeError(f"merge base '{base}': unknown; use original or dequantized")
    kind: Base = "dequantized" if base == "dequantized" else "original"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out}: exists and is not empty; name a new folder")
    original = Original.of(base_folder)
    if layout == "native" and original.family.no_native_form:
        raise RecipeError(
            f"{base_folder}: no native layout ({original.family.no_native_form}); "
            "merge with layout original"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        writer = ShardWriter(folder, limit)
        requantize = _requantizer(original, kind, section)
        report = _merge(original, adapter_folder, writer, requantize, layout)
        folder.rename(out)
    return MergeReport(out, kind, *report)


def _merge(
    original: Original, adapter_folder: Path, writer: ShardWriter, requantize: Change, form: Form
) -> tuple[int, int, int, int, bool]:
    # imported late: adapter offers this module's merge_to as its own
    from raytune_ft.model.adapter import read_adapter

    config, weights = read_adapter(adapter_folder, original.family.layout, original.widths)
    updates = low_rank_updates(config, weights)
    rows = None
    if updates is None:
        change, untie, rows = _merged_by_peft(original, adapter_folder, requantize)
    else:
        _check_in_base(original, updates)
        untie = original.tied and original.head in updates

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            weight = requantize(name, tensor)
            return updates[name].apply(weight) if name in updates else weight

    for name, tensor in original.rewritten(_finished(original, change, form), form, untie=untie):
        writer.add(name, tensor)
    n_shards = writer.close()
    if form == "original":
        copy_side_files(original, writer.folder, untied=untie, rows=rows)
    else:
        write_native_files(original, writer.folder, untied=untie, rows=rows)
    count = 0 if updates is None else len(updates)
    return count, len(writer.names), n_shards, writer.total_bytes, updates is None


def _finished(original: Original, change: Change, form: Form) -> Change:
    """Divide a NormHead's rows by their lengths where the reader will not do it."""
    if form == "original" or not original.family.normalised_head:
        return change
    from raytune_ft.model.families.norm_head import normalised

    def finished(name: str, tensor: torch.Tensor) -> torch.Tensor:
        changed = change(name, tensor)
        return normalised(changed) if name == original.head else changed

    return finished


def low_rank_updates(config: Any, weights: dict[str, torch.Tensor]) -> dict[str, Update] | None:
    """Return base tensor name -> update; None if the adapter holds more than A and B matrices."""
    a_end, b_end = ".lora_A.weight", ".lora_B.weight"
    special = config.use_dora or config.alpha_pattern or config.fan_in_fan_out
    if special or not all(name.endswith((a_end, b_end)) for name in weights):
        return None
    updates = {}
    for name, a in weights.items():
        if name.endswith(a_end):
            stem = name.removesuffix(a_end)
            rank = a.shape[0]
            scale = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
            target = stem.removeprefix(PEFT_PREFIX) + ".weight"
            updates[target] = Update(a, weights[stem + b_end], scale)
    return updates


def _requantizer(original: Original, base: Base, section: ModelSection | None) -> Change:
    if base == "original":
        return lambda _name, weight: weight
    from raytune_ft.model.nf4 import through_nf4

    names = original.linear_names()
    double_quant = section.double_quant if section else True
    given = section.dtype if section else "auto"
    dtype = None if given == "auto" else getattr(torch, given)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return weight
        seen = through_nf4(weight.to(dtype or weight.dtype), double_quant=double_quant)
        return seen.to(weight.dtype)

    return change


def _check_in_base(original: Original, updates: dict[str, Update]) -> None:
    shapes = original.shapes()
    for name, update in updates.items():
        if name == original.head and original.tied:
            continue
        wanted = torch.Size((update.b.shape[0], update.a.shape[1]))
        if shapes.get(name) != wanted:
            found = tuple(shapes[name]) if name in shapes else "absent"
            raise ModelError(
                f"{original.folder}: adapter target '{name}' {tuple(wanted)} is {found} in this "
                "base; merge into the model that the adapter was trained on"
            )


def _merged_by_peft(
    original: Original, adapter_folder: Path, requantize: Change
) -> tuple[Change, bool, int | None]:
    """Merge in memory; return what gives each native tensor its new content, `untie`, `rows`."""
    from raytune_ft.model.adapter import load_adapter

    section = ModelSection(path=str(original.folder), dtype="float32")
    # Baichuan2's head as in the files, with the lengths of its rows
    model = load_model(original.folder, section, torch.device("cpu"), head_trained=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(requantize(name, parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untied head is handled below
        merged: Any = load_adapter(model, adapter_folder).merge_and_unload()
    state: dict[str, torch.Tensor] = merged.state_dict()
    embedding = merged.get_input_embeddings().weight
    untie = original.tied and state[original.head].data_ptr() != embedding.data_ptr()
    grown = len(embedding) != original.config.get_text_config().vocab_size
    rows = len(embedding) if grown else None
    return lambda name, tensor: state[name].to(tensor.dtype), untie, rows
