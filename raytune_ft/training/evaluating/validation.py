"""Validation: held-out packs in, one set of figures out, the same on every rank.

Batches are a function of the packs alone and ranks take them by stride; the sums of each batch are
exchanged and added up exactly (`math.fsum`). So the figures do not depend on the number of ranks,
and on packing and batches only as far as the model's own arithmetic does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist

from raytune_ft.data.packing import Pack, collate
from raytune_ft.errors import TrainingError
from raytune_ft.model.generate import evaluating
from raytune_ft.model.preference import PreferenceLoss
from raytune_ft.training.batching import empty_batch, to_tensors
from raytune_ft.training.engine import Engine, rank, world_size
from raytune_ft.training.vitals import take_sums

LARGEST_EXPONENT = 700.0
"""exp() of more is no float64."""


def held_out_figures(engine: Engine, packs: Iterable[Pack], batch_tokens: int) -> dict[str, float]:
    """Measure held-out packs with dropout off; every rank has to call it.

    Args:
        engine: its module is measured, and is left in the modes that it was in.
        packs: in their order, all of them on every rank.
        batch_tokens: tokens of a batch, padding included, unless a single pack has more.

    Returns:
        `val_loss`, per labelled token, and `val_perplexity`; of a preference objective
        `val_loss` per pair and its measures.

    Raises:
        TrainingError: there is no labelled token to measure.
    """
    take_sums(engine.module)  # of training steps; they are told already
    names: list[str] = []
    rows: list[list[float]] = []
    with evaluating(engine.module):
        # under ZeRO-3 every rank has to run the module as often as the others do
        for group in _groups(batches(packs, batch_tokens), world_size()):
            mine = group[rank()] if rank() < len(group) else []
            batch = to_tensors(collate(mine)) if mine else empty_batch()
            loss_sum, count = engine.module(**engine.put(batch))
            sums = take_sums(engine.module)
            names = ["loss", "count", *sums]
            found = [float(value) for value in (loss_sum, count, *sums.values())]
            empty = [0.0] * len(found)
            rows += [found if place == rank() else empty for place in range(len(group))]
    totals = dict(zip(names, _added(engine.device, rows), strict=True))
    if not totals.get("count"):
        raise TrainingError("data.validation: no token is labelled; name rows with answers")
    return figures(engine.module, totals)


def figures(module: torch.nn.Module, totals: dict[str, float]) -> dict[str, float]:
    """Turn sums over all held-out tokens, or pairs, into what stands in metrics.jsonl."""
    if isinstance(module, PreferenceLoss):
        sums = {name: totals.get(name, 0.0) for name in totals if name not in ("loss", "count")}
        measured = {f"val_{name}": value for name, value in module.measures(sums).items()}
        return {"val_loss": module.mean_loss(sums), **measured}
    loss = totals["loss"] / totals["count"]
    return {"val_loss": loss, "val_perplexity": math.exp(min(loss, LARGEST_EXPONENT))}


def batches(packs: Iterable[Pack], batch_tokens: int) -> Iterator[list[Pack]]:
    """Group packs, in their order, into batches of at most `batch_tokens`, padding included."""
    batch: list[Pack] = []
    longest = 0
    for pack in packs:
        length = len(pack.input_ids)
        if batch and max(longest, length) * (len(batch) + 1) > batch_tokens:
            yield batch
            batch, longest = [], 0
        batch.append(pack)
        longest = max(longest, length)
    if batch:
        yield batch


def _groups(found: Iterator[list[Pack]], size: int) -> Iterator[list[list[Pack]]]:
    """Take `size` batches at a time, one for each rank; the last group may be short."""
    group: list[list[Pack]] = []
    for batch in found:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _added(device: torch.device, rows: list[list[float]]) -> list[float]:
    """Add up each column over the rows of all ranks, rounding once.

    A row is one rank's and 0 on the others, so the exchange itself adds nothing.
    """
    table = torch.tensor(rows, dtype=torch.float64)
    if world_size() > 1 and rows:
        table = table.to(device)
        dist.all_reduce(table)
    return [math.fsum(column) for column in zip(*table.tolist(), strict=True)]
