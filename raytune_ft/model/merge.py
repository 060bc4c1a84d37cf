"""Merging: base weights and an adapter in, the merged model's tensors out, one after another.

Each tensor of the base is read, sent through quantisation where the adapter was trained behind it,
changed by its formula (`updates`) and handed on: memory holds the adapter and one tensor. Parts of
fused layers are changed on their rows. What no formula knows is merged by PEFT in memory instead.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from raytune_ft.config.schema import ModelSection
from raytune_ft.errors import ModelError, RecipeError
from raytune_ft.model.drift import Drift, length
from raytune_ft.model.loading import load_model, weight_files
from raytune_ft.model.original import Change, Form, Original
from raytune_ft.model.side_files import copy_side_files, write_native_files
from raytune_ft.model.tensors import ShardWriter, size_bytes
from raytune_ft.model.updates import Replaced, TokenRows, Update, updates_of
from raytune_ft.model.writing import check_free, new_folder

Base = Literal["original", "dequantized"]


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
    drift: Drift


@dataclass(frozen=True)
class Merge:
    """A merge that can be read, tensor by tensor."""

    original: Original
    change: Change
    """Gives each native tensor its merged content, and writes down in `drift` what it did."""
    n_merged: int = 0
    untie: bool = False
    """The head is a tensor of its own from now on."""
    rows: int | None = None
    """Of embedding and head, where they grew."""
    in_memory: bool = False
    drift: Drift = field(default_factory=Drift)

    def tensors(self, form: Form) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor), under the names of the base's files or under native ones."""
        change = _finished(self.original, self.change, form)
        yield from self.original.rewritten(change, form, untie=self.untie)

    def shapes(self, form: Form) -> Iterator[tuple[str, torch.Size]]:
        """Yield (name, shape) in the order of `tensors`, without reading one."""
        tables = (self.original.embedding, self.original.head)

        def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
            if self.rows is None or name not in tables:
                return tensor
            return tensor.new_empty((max(self.rows, len(tensor)), *tensor.shape[1:]))

        hollow = self.original.hollow()
        for name, tensor in self.original.rewritten(change, form, untie=self.untie, tensors=hollow):
            yield name, tensor.shape


def merge_to(
    base_folder: Path,
    adapter_folder: Path,
    out: Path,
    max_shard_size: str = "2GB",
    base: str = "original",
    section: ModelSection | None = None,
    layout: Form = "original",
    finish: Callable[[Path, MergeReport], None] = lambda _folder, _report: None,
    *,
    replace: bool = False,
) -> MergeReport:
    """Write the folder of the merged model, in the base's precision, with its side files.

    Args:
        base_folder: model that the adapter was trained on.
        adapter_folder: PEFT folder.
        out: target; must not exist or be empty. It appears at the end, whole.
        max_shard_size: such as `2GB`.
        base: see `read_merge`.
        section: see `read_merge`.
        layout: `original`: tensor names, config.json, tokenizer files and the model's own Python
            files as in the base's folder. `native`: as transformers has the network; the
            tokenizer is left to the caller.
        finish: writes what else belongs into the folder, before it takes its place.
        replace: a folder that is there is replaced.

    Raises:
        RecipeError: a bad size or kind of base, `out` is not empty, the disk is too full, or the
            model has no native form.
        ModelError: an adapter target is not in the base.
        CheckpointError: the adapter cannot be read.
    """
    limit = size_bytes(max_shard_size)
    if not replace:
        check_free(out)
    check_layout(Original.of(base_folder), layout)
    merge = read_merge(base_folder, adapter_folder, base, section)
    with new_folder(out, bytes_of(base_folder), replace=replace) as folder:
        writer = ShardWriter(folder, limit)
        n_shards = _write(merge, writer, layout)
        report = MergeReport(
            out, cast(Base, base), merge.n_merged, len(writer.names), n_shards, writer.total_bytes,
            merge.in_memory, merge.drift,
        )  # fmt: skip
        finish(folder, report)
    return report


def _write(merge: Merge, writer: ShardWriter, layout: Form) -> int:
    """Write all tensors and what stands beside them; return the number of files."""
    for name, tensor in merge.tensors(layout):
        writer.add(name, tensor)
        del tensor  # or it is held while the next one is made
    n_shards = writer.close()
    write = copy_side_files if layout == "original" else write_native_files
    write(merge.original, writer.folder, untied=merge.untie, rows=merge.rows)
    return n_shards


def check_layout(original: Original, layout: Form) -> None:
    """Refuse a native layout that a model does not have; RecipeError says which it has."""
    if layout == "native" and original.family.no_native_form:
        raise RecipeError(
            f"{original.folder}: no native layout ({original.family.no_native_form}); "
            "merge with layout original"
        )


def bytes_of(folder: Path) -> int:
    """Return the bytes of a model's weights; a merge writes about as many."""
    return sum(file.stat().st_size for file in weight_files(folder))


def as_it_is(folder: Path) -> Merge:
    """Read a model that has nothing to merge as if it had."""
    return Merge(Original.of(folder), lambda _name, tensor: tensor)


def read_merge(
    base_folder: Path,
    adapter_folder: Path,
    base: str = "original",
    section: ModelSection | None = None,
) -> Merge:
    """Bind an adapter to its base, to be read as the merged model.

    Args:
        base_folder: model that the adapter was trained on.
        adapter_folder: PEFT folder.
        base: `original`: the files' weights. `dequantized`: those weights sent through NF4, or
            int8, and back, which an adapter trained on them has seen, so its answers are kept.
        section: the run's model section; its `quantization` (`none`: NF4, where `base` asks for
            it), `double_quant` and `dtype` say what training saw.

    Raises:
        RecipeError: no such kind of base.
        ModelError: an adapter target is not in the base.
        CheckpointError: the adapter cannot be read.
    """
    # imported late: adapter offers this module's merge_to as its own
    from raytune_ft.model.adapter import read_adapter

    if base not in get_args(Base):
        raise RecipeError(f"merge base '{base}': unknown; use original or dequantized")
    original = Original.of(base_folder)
    config, weights = read_adapter(adapter_folder, original.family.layout, original.widths)
    updates = updates_of(config, weights)
    seen = _what_training_saw(original, base, section)
    if updates is None:
        return _merged_by_peft(original, adapter_folder, seen if base == "dequantized" else None)
    _check_in_base(original, updates)
    drift, rows = Drift(), _rows(original, updates)
    change = partial(_changed, original, updates, seen, base == "dequantized", rows, drift)
    return Merge(original, change, len(updates), _untied(original, updates), rows, drift=drift)


def _changed(
    original: Original,
    updates: dict[str, Update],
    seen: Change | None,
    dequantized: bool,
    rows: int | None,
    drift: Drift,
    name: str,
    tensor: torch.Tensor,
) -> torch.Tensor:
    update, lost = updates.get(name), None
    weight = tensor
    if seen is not None and (dequantized or update is not None):
        weight = seen(name, tensor)
        lost = None if weight is tensor else length(tensor, weight)
        weight = weight if dequantized else tensor
    if rows is not None and name in (original.embedding, original.head):
        weight = _grown(weight, rows)
    if update is None:
        if lost is not None:
            drift.add(name, tensor, 0.0, lost)
        return weight
    applied = update.apply(weight)
    drift.add(name, tensor, applied.moved, lost)
    return applied.weight


def _grown(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a table with more rows; those that nobody trained are the mean of the others."""
    if len(weight) >= rows:
        return weight
    mean = weight.float().mean(0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(rows - len(weight), -1)])


def _rows(original: Original, updates: dict[str, Update]) -> int | None:
    """Return the rows that embedding and head need; None where they have them."""
    known = int(original.network.get_input_embeddings().weight.shape[0])
    needed = [known]
    for name in (original.embedding, original.head):
        update = updates.get(name)
        if isinstance(update, Replaced):
            needed.append(len(update.value))
        elif isinstance(update, TokenRows):
            needed.append(max(update.indices) + 1)
    return max(needed) if max(needed) > known else None


def _untied(original: Original, updates: dict[str, Update]) -> bool:
    """Tell whether a head that was the embedding differs from it behind the merge.

    PEFT changes one of the two, and what was tied comes apart; but rows of tokens it keeps tied.
    """
    changed = [updates[name] for name in (original.embedding, original.head) if name in updates]
    return original.tied and any(not isinstance(update, TokenRows) for update in changed)


def _finished(original: Original, change: Change, form: Form) -> Change:
    """Divide a NormHead's rows by their lengths where the reader will not do it."""
    if form == "original" or not original.family.normalised_head:
        return change
    from raytune_ft.model.families.norm_head import normalised

    def finished(name: str, tensor: torch.Tensor) -> torch.Tensor:
        changed = change(name, tensor)
        return normalised(changed) if name == original.head else changed

    return finished


def _what_training_saw(
    original: Original, base: str, section: ModelSection | None
) -> Change | None:
    """Return what sends a weight through quantisation and back; None where there was none."""
    kind = section.quantization if section else "none"
    if kind == "none" and base == "original":
        return None
    from raytune_ft.model.nf4 import through_int8, through_nf4

    names = original.linear_names()
    double_quant = section.double_quant if section else True
    given = section.dtype if section else "auto"
    dtype = None if given == "auto" else getattr(torch, given)

    def through(name: str, weight: torch.Tensor) -> torch.Tensor:
        if name not in names:
            return weight
        given = weight.to(dtype or weight.dtype)
        seen = (
            through_int8(given) if kind == "int8" else through_nf4(given, double_quant=double_quant)
        )
        return seen.to(weight.dtype)

    return through


def _check_in_base(original: Original, updates: dict[str, Update]) -> None:
    shapes = original.shapes()
    if original.tied and original.embedding in shapes:
        shapes.setdefault(original.head, shapes[original.embedding])
    for name, update in updates.items():
        shape = shapes.get(name)
        if shape is None or not update.fits(shape):
            found = "absent" if shape is None else f"{tuple(shape)}, which it does not fit,"
            raise ModelError(
                f"{original.folder}: adapter target '{name}' is {found} in this base; merge into "
                "the model that the adapter was trained on"
            )


def _merged_by_peft(original: Original, adapter_folder: Path, seen: Change | None) -> Merge:
    """Merge in memory."""
    from raytune_ft.model.adapter import load_adapter

    section = ModelSection(path=str(original.folder), dtype="float32")
    # Baichuan2's head as in the files, with the lengths of its rows
    model = load_model(original.folder, section, torch.device("cpu"), head_trained=True)
    if seen is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(seen(name, parameter))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an untied head is handled below
        merged: Any = load_adapter(model, adapter_folder).merge_and_unload()
    state: dict[str, torch.Tensor] = merged.state_dict()
    embedding = merged.get_input_embeddings().weight
    untie = original.tied and state[original.head].data_ptr() != embedding.data_ptr()
    grown = len(embedding) != original.config.get_text_config().vocab_size

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return state[name].to(tensor.dtype)

    return Merge(
        original, change, untie=untie, rows=len(embedding) if grown else None, in_memory=True
    )
