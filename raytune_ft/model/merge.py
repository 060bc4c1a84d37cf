"""Merging: base weights and an adapter in, a plain model folder out.

W + scale * B A is computed in float32, tensor by tensor, so memory holds one output shard and
the adapter. Adapters with more than A and B (DoRA, trained biases or whole modules) are merged
by PEFT in memory instead.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from raytune_ft.config.schema import ModelSection
from raytune_ft.errors import ModelError, RecipeError
from raytune_ft.model.families import detect
from raytune_ft.model.loading import load_model, quiet, read_config, weight_files
from raytune_ft.model.tensors import ShardWriter, size_bytes, stream_tensors, tensor_names

Base = Literal["original", "dequantized"]
PEFT_PREFIX = "base_model.model."
HEAD = "lm_head.weight"
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
SKIPPED_FILES = {"model.safetensors.index.json", "pytorch_model.bin.index.json", "README.md"}

Tensors = Iterator[tuple[str, torch.Tensor]]
Change = Callable[[str, torch.Tensor], torch.Tensor]


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
) -> MergeReport:
    """Write the folder of the merged model, in the base's precision, with its tokenizer.

    Args:
        base_folder: model that the adapter was trained on.
        adapter_folder: PEFT folder.
        out: target; must not exist or be empty. It appears at the end, whole.
        max_shard_size: such as `2GB`.
        base: `original`: the files' weights. `dequantized`: those weights sent through NF4 and
            back, which an adapter trained on NF4 has seen, so its answers are kept.
        section: the run's model section; its `dtype` and `double_quant` count for `dequantized`.

    Raises:
        RecipeError: a bad size or kind of base, or `out` is not empty.
        ModelError: an adapter target is not in the base.
        CheckpointError: the adapter cannot be read.
    """
    limit = size_bytes(max_shard_size)
    if base not in get_args(Base):
        raise RecipeError(f"merge base '{base}': unknown; use original or dequantized")
    kind: Base = "dequantized" if base == "dequantized" else "original"
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RecipeError(f"{out}: exists and is not empty; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        report = _merge(base_folder, adapter_folder, folder, limit, kind, section)
        folder.rename(out)
    return MergeReport(out, kind, *report)


def _merge(
    base_folder: Path,
    adapter_folder: Path,
    folder: Path,
    limit: int,
    base: Base,
    section: ModelSection | None,
) -> tuple[int, int, int, int, bool]:
    # imported late: adapter offers this module's merge_to as its own
    from raytune_ft.model.adapter import read_adapter_config, read_adapter_weights

    config = read_adapter_config(adapter_folder)
    weights = read_adapter_weights(adapter_folder)
    change = _requantizer(base_folder, base, section)
    updates = low_rank_updates(config, weights)
    tied = has_tied_head(base_folder)
    if updates is None:
        merged = _merged_by_peft(base_folder, adapter_folder, change)
    else:
        _check_in_base(base_folder, updates, tied=tied)
        merged = _merged_by_stream(base_folder, updates, change, tied=tied)
    writer = ShardWriter(folder, limit)
    for name, tensor in merged:
        writer.add(name, tensor)
    n_shards = writer.close()
    _copy_side_files(base_folder, folder, untied=tied and HEAD in writer.names)
    count = 0 if updates is None else len(updates)
    return count, len(writer.names), n_shards, writer.total_bytes, updates is None


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


def quantized_names(base_folder: Path) -> set[str]:
    """Return the tensors that loading in NF4 quantises: all linear layers but the head."""
    from transformers.quantizers.base import get_keys_to_not_convert

    config_json = read_config(base_folder)
    family = detect(config_json, str(base_folder / "config.json"))
    config = family.translate(config_json)
    with torch.device("meta"), quiet():
        model = family.network(config)(config)
    kept = set(get_keys_to_not_convert(model))
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name not in kept
    }


def through_nf4(weight: torch.Tensor, *, double_quant: bool) -> torch.Tensor:
    """Quantise a weight to NF4 and back, as training sees it."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(
        weight.contiguous(), quant_type="nf4", compress_statistics=double_quant
    )
    seen: torch.Tensor = dequantize_4bit(packed, state)
    return seen


def _requantizer(base_folder: Path, base: Base, section: ModelSection | None) -> Change:
    if base == "original":
        return lambda _name, weight: weight
    names = quantized_names(base_folder)
    double_quant = section.double_quant if section else True
    given = section.dtype if section else "auto"
    dtype = None if given == "auto" else getattr(torch, given)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return weight
        seen = through_nf4(weight.to(dtype or weight.dtype), double_quant=double_quant)
        return seen.to(weight.dtype)

    return change


def has_tied_head(base_folder: Path) -> bool:
    """Tell whether a model's head is its embedding; families differ in what silence means."""
    config_json = read_config(base_folder)
    config = detect(config_json, str(base_folder / "config.json")).translate(config_json)
    return bool(config.get_text_config().tie_word_embeddings)


def _check_in_base(base_folder: Path, updates: dict[str, Update], *, tied: bool) -> None:
    shapes = tensor_names(weight_files(base_folder))
    for name, update in updates.items():
        if name == HEAD and tied:
            continue
        wanted = torch.Size((update.b.shape[0], update.a.shape[1]))
        if shapes.get(name) != wanted:
            found = tuple(shapes[name]) if name in shapes else "absent"
            raise ModelError(
                f"{base_folder}: adapter target '{name}' {tuple(wanted)} is {found} in this base; "
                "merge into the model that the adapter was trained on"
            )


def _merged_by_stream(
    base_folder: Path, updates: dict[str, Update], change: Change, *, tied: bool
) -> Tensors:
    for name, original in stream_tensors(weight_files(base_folder)):
        if tied and name == HEAD:
            continue
        weight = change(name, original)
        yield name, updates[name].apply(weight) if name in updates else weight
        if tied and HEAD in updates and name.endswith("embed_tokens.weight"):
            yield HEAD, updates[HEAD].apply(weight)


def _merged_by_peft(base_folder: Path, adapter_folder: Path, change: Change) -> Tensors:
    from raytune_ft.model.adapter import load_adapter

    section = ModelSection(path=str(base_folder), dtype="float32")
    model = load_model(base_folder, section, torch.device("cpu"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(change(name, parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untied head is handled below
        merged: Any = load_adapter(model, adapter_folder).merge_and_unload()
    types = {name: t.dtype for name, t in stream_tensors(weight_files(base_folder))}
    state = merged.state_dict()
    if HEAD in state:
        if state[HEAD].data_ptr() == merged.get_input_embeddings().weight.data_ptr():
            del state[HEAD]
        else:  # perhaps training took a tied head apart
            types.setdefault(HEAD, next(iter(types.values())))
    for name, tensor in state.items():
        if name in types:
            yield name, tensor.to(types[name])


def _copy_side_files(base_folder: Path, folder: Path, *, untied: bool) -> None:
    for file in sorted(base_folder.iterdir()):
        wanted = file.suffix not in WEIGHT_SUFFIXES and file.name not in SKIPPED_FILES
        if wanted and file.is_file() and not file.name.startswith("."):
            shutil.copyfile(file, folder / file.name)
    if untied:
        config = read_config(folder) | {"tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
