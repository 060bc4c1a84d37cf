"""Held-out loss of a merged model, on the base it was merged into and on the other one.

In: a run with `data.validation`, and the folder of its merged model. Out: figures by base. The
other base's model is written beside, read and removed, so only small models are measured unasked.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raytune_ft.config.schema import ModelSection, Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Pack, collate
from raytune_ft.data.windows import make_feed
from raytune_ft.errors import DataError, RecipeError
from raytune_ft.exporting.beside import tokenizer_of
from raytune_ft.model import loading
from raytune_ft.model.generate import evaluating
from raytune_ft.model.merge import bytes_of, merge_to
from raytune_ft.model.preference import build_loss
from raytune_ft.training.batching import to_tensors
from raytune_ft.training.evaluating.validation import batches
from raytune_ft.training.run_folder import RunFolder

UNASKED_BYTES = 2 << 30
"""Of a model's files: about a billion weights in half precision."""
TOKENS = 32_768
"""Of held-out packs that are read: enough for two digits of a difference."""
BATCH_TOKENS = 4096


def of_both(
    run: RunFolder,
    recipe: Recipe,
    merged: Path,
    base: str,
    wanted: bool | None,
    tell: Any,
) -> dict[str, Any]:
    """Return base -> held-out loss per labelled token; nothing where it is not measured.

    Args:
        run: its adapter was merged.
        recipe: of the run.
        merged: folder of the merged model.
        base: what it was merged into.
        wanted: False: no; None: where the run trained on quantised weights and the model is small.
        tell: gets a line for people.

    Raises:
        RecipeError: asked for, and the run has no held-out rows or learns from pairs.
    """
    source = Path(run.info()["model_folder"])
    possible = recipe.data.validation is not None and recipe.train.objective == "sft"
    if wanted and not possible:
        raise RecipeError(
            f"{run.path}: --held-out-loss: the run has no data.validation of answers; leave it out"
        )
    quantized = recipe.model.quantization != "none"
    if not possible or wanted is False or (wanted is None and not quantized):
        return {}
    if wanted is None and bytes_of(source) > UNASKED_BYTES:
        tell("held-out loss of both bases: not measured for a model of this size; --held-out-loss")
        return {}
    try:
        packs = list(_packs(run, recipe))
    except DataError as error:
        tell(f"held-out loss: not measured ({error})")
        return {}
    losses = {base: loss_of(merged, recipe, packs)}
    if quantized:
        other = "original" if base == "dequantized" else "dequantized"
        losses[other] = _on_other_base(run, recipe, merged, other, packs)
    shown = ", ".join(f"{name} {loss:.4f}" for name, loss in sorted(losses.items()))
    tell(f"held-out loss by base: {shown}")
    return losses


def loss_of(folder: Path, recipe: Recipe, packs: Iterable[Pack]) -> float:
    """Return a model's loss per labelled token over packs, in float32 or the GPU's own type."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    section = ModelSection(path=str(folder))
    module = build_loss(loading.load_model(folder, section, device), recipe.train)
    sums: list[tuple[float, int]] = []
    with evaluating(module):
        for group in batches(packs, BATCH_TOKENS):
            batch = to_tensors(collate(group))
            loss, count = module(**{k: v.to(device) if v.ndim else v for k, v in batch.items()})
            sums.append((float(loss), int(count)))
    return math.fsum(loss for loss, _ in sums) / max(1, sum(count for _, count in sums))


def _on_other_base(
    run: RunFolder, recipe: Recipe, merged: Path, other: str, packs: Iterable[Pack]
) -> float:
    # inside the folder that is being written, which a killed process leaves as a whole
    with tempfile.TemporaryDirectory(prefix=".other_base_", dir=merged) as scratch:
        folder = Path(scratch) / "model"
        merge_to(
            Path(run.info()["model_folder"]), run.adapter, folder, base=other, section=recipe.model
        )
        return loss_of(folder, recipe, packs)


def _packs(run: RunFolder, recipe: Recipe) -> Iterator[Pack]:
    """Yield the first held-out packs, as validation has them."""
    rows = sources.open_sources(recipe.data, recipe.train.seed)
    _, held_out = sources.split_validation(rows, recipe.data, recipe.train.seed)
    if held_out is None:
        return
    still = recipe.data.model_copy(update={"shuffle_before_pack": False, "compat": None})
    encoder = replace(Encoder.of(recipe, tokenizer_of(run)), data=still)
    feed = make_feed(held_out, encoder, recipe.train.seed)
    tokens = 0
    for number in range(feed.n_windows):
        for pack in feed.window(0, number).packs:
            yield pack
            tokens += len(pack.input_ids)
            if tokens >= TOKENS:
                return
