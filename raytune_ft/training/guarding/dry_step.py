"""Dry step: before the first optimizer step, whether the longest batch of a run fits in memory.

A forward and backward pass over `micro_batch_size` full packs in which every token is labelled,
with room taken for what comes later: the optimizer's averages and the gradients of earlier
micro-batches. It leaves weights, gradients, optimizer, random state and DeepSpeed's counts as they
were: gradients are asked for and thrown away, so no hook that collects or exchanges them runs, and
a rank whose memory is full keeps no other rank waiting.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch

from raytune_ft.data.packing import IGNORE_INDEX, Pack, collate
from raytune_ft.model.loss import causal_model
from raytune_ft.training.batching import TensorBatch, count_targets, pair_weights, to_tensors
from raytune_ft.training.engine import Engine, TorchEngine
from raytune_ft.training.guarding.room import ELSEWHERE, Room
from raytune_ft.training.vitals import exchange

AVERAGES = {"lion": 1, "muon": 1}
"""Tensors that an optimizer keeps per weight; the others keep two."""


def wanted(engine: Engine) -> bool:
    """Tell whether a dry step says anything.

    A CPU's allocator refuses nothing. Under ZeRO-3 ranks exchange weights in every pass, so one
    whose memory is full would keep the others waiting.
    """
    return engine.device.type == "cuda" and getattr(engine, "stage", 0) < 3


def find_room(engine: Engine, room: Room) -> None:
    """Shrink `room` until its longest batch fits on every rank; all ranks have to call it.

    Raises:
        MemoryPlanError: it does not fit, and is not to be made smaller or cannot be.
        Elsewhere: another rank's memory is full, and it says so.
    """
    model: Any = engine.module.model
    config = causal_model(model).config.get_text_config()
    while (problem := _problem(engine, room, config.vocab_size)) is not None:
        room.shrink(problem)
        room.put(engine)


def _problem(engine: Engine, room: Room, vocabulary: int) -> str | None:
    """Say what does not fit on this rank, or that something does not on another one."""
    own = None
    try:
        dry_step(engine, longest_batch(room, vocabulary), room.recipe.train.optimizer)
    except torch.OutOfMemoryError as error:
        own = room.described(error, "before the first step", [])
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(engine.device)
    full = exchange(torch.tensor([own is not None], dtype=torch.int64), engine.device)
    return own or (ELSEWHERE if any(row[0] for row in full) else None)


def dry_step(engine: Engine, batch: TensorBatch, optimizer: str) -> None:
    """Run one forward and backward pass that leaves no trace.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    trained = list(engine.trained.values())
    with _untouched(engine):
        averages = _averages_to_come(engine, optimizer)
        places = {id(p): torch.empty_like(p) for p in trained}
        hooks = [_give_way(p, places) for p in trained]
        try:
            loss, _ = engine.module(**engine.put(batch))
            torch.autograd.grad(loss, trained, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
            del averages


def _give_way(parameter: torch.Tensor, places: dict[int, torch.Tensor]) -> Any:
    """Give a gradient's place back when it comes, so that both never exist at once."""

    def free(_gradient: torch.Tensor) -> None:
        del places[id(parameter)]

    return cast(Any, parameter).register_hook(free)


def longest_batch(room: Room, vocabulary: int) -> TensorBatch:
    """Make the largest micro-batch that a run can meet; every token of it is labelled.

    Args:
        room: its sizes.
        vocabulary: token ids are below it.
    """
    length, pairs = room.recipe.data.max_length, room.objective != "sft"
    pack = _full_pack(length, 2 if pairs else 1, vocabulary)
    packs = [pack] * room.micro_batch_size
    batch = to_tensors(collate(packs))
    if pairs:
        batch |= pair_weights(packs, sum(count_targets(one) for one in packs))
    return batch


def _full_pack(length: int, segments: int, vocabulary: int) -> Pack:
    bounds = np.linspace(0, length, segments + 1).astype(np.int32)
    places = np.concatenate([np.arange(n, dtype=np.int32) for n in np.diff(bounds)])
    ids = (np.arange(length) % vocabulary).astype(np.int32)
    labels = np.where(places == 0, IGNORE_INDEX, ids).astype(np.int32)
    return Pack(ids, labels, places, bounds, np.zeros(segments, np.int64))


def _averages_to_come(engine: Engine, optimizer: str) -> list[torch.Tensor]:
    """Take the memory that the optimizer takes at its first step; it pages or has it by then."""
    if not isinstance(engine, TorchEngine) or engine.optimizer.state:
        return []  # DeepSpeed makes its own at the start
    if optimizer.startswith("paged"):
        return []
    number = AVERAGES.get(optimizer, 2)
    dtype = torch.uint8 if optimizer.endswith("8bit") else None
    masters = engine.masters.values()
    return [torch.empty_like(m, dtype=dtype) for m in masters for _ in range(number)]


@contextmanager
def _untouched(engine: Engine) -> Iterator[None]:
    """Put random state and the module's mode back, whatever happens."""
    was_training = engine.module.training
    devices = [engine.device] if engine.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        engine.module.train()
        try:
            yield
        finally:
            engine.module.train(was_training)
