"""Stream: rows counted, and packs made ahead of training, by stateless Ray Data tasks.

Every task gets numbers alone, a range of rows or a window, and can be run again on any node. So
the pack sequence does not depend on how many tasks there are, and resuming starts at a window.
`data.windows` does the work; this module only spreads it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from raytune_ft import errors
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Position, build_packs
from raytune_ft.data.places import Placed, placed, window_numbers
from raytune_ft.data.report import add_report, new_report
from raytune_ft.data.sources import RowSource
from raytune_ft.data.windows import (
    Feed,
    Measurement,
    Window,
    measure_rows,
)

__all__ = ["measure", "packs"]

TASK_CPUS = 0.25
"""Less than a core, so that tasks find room beside training workers on a small machine; with
whole cores Ray Data would wait for ever."""
IN_PROCESS_ROWS = 2000
"""Fewer rows are counted here sooner than a Ray Data task starts."""
ROWS_PER_TASK = 2048
WINDOWS_PER_RUN = 16
"""Windows per Ray Data execution; the next one starts (0.2 s) when these are used up. Bounds what
is made ahead: memory, and on a CPU the time taken from training."""
WINDOW_TASKS = 2
"""Windows made at once; one core tokenises far more than a training process takes."""

Progress = Callable[[int, int], None]
Task = Callable[..., dict[str, Any]]


def measure(source: RowSource, encoder: Encoder, progress: Progress | None = None) -> Measurement:
    """Count the tokens of every row.

    Args:
        source: rows.
        encoder: makes examples of rows.
        progress: called with (rows done, rows in all).

    Raises:
        DataError: the first row, by number, that is unusable, if the recipe does not skip it.
    """
    report_progress = progress or (lambda done, total: None)
    n_rows = len(source)
    if n_rows < IN_PROCESS_ROWS:
        whole = measure_rows(source, encoder, np.arange(n_rows))
        report_progress(n_rows, n_rows)
        return whole
    shared = ray.put((source, encoder))
    ranges = [
        {"start": start, "end": min(start + ROWS_PER_TASK, n_rows)}
        for start in range(0, n_rows, ROWS_PER_TASK)
    ]
    lengths, targets, report = [], [], new_report()
    for row in _run(_measure_task, ranges, shared):
        lengths.append(np.frombuffer(row["lengths"], dtype=np.int32))
        targets.append(np.frombuffer(row["targets"], dtype=np.int32))
        add_report(report, json.loads(row["report"]))
        report_progress(report["rows"], n_rows)
    sets = source.sets_of(np.arange(n_rows))
    return Measurement(np.concatenate(lengths), np.concatenate(targets), sets, report)


def packs(
    feed: Feed, start: Position | None = None, *, epochs: int | None = None
) -> Iterator[Placed]:
    """Yield packs in the canonical order, windows being made ahead by Ray Data tasks.

    Arguments and result are those of `places.iter_packs`. Close the generator to stop the tasks.
    Memory: Ray's object store holds a bounded number of windows; none is read before `start`.
    """
    start = start or Position()
    yield from placed(_windows(feed, start, epochs), start, feed.n_windows)


def _windows(feed: Feed, start: Position, epochs: int | None) -> Iterator[tuple[int, int, Window]]:
    shared = ray.put(feed)
    numbers = window_numbers(feed.n_windows, start, epochs)
    while chosen := list(islice(numbers, WINDOWS_PER_RUN)):
        tasks = [{"epoch": epoch, "window": window} for epoch, window in chosen]
        with closing(_run(_window_task, tasks, shared, WINDOW_TASKS)) as results:
            for (epoch, number), row in zip(chosen, results, strict=True):
                yield epoch, number, _unpacked(row)


def _run(
    task: Task,
    arguments: list[dict[str, int]],
    shared: ray.ObjectRef,
    at_once: int | None = None,
) -> Generator[dict[str, Any], None, None]:
    """Run one task per argument with Ray Data; yield their results in the arguments' order.

    Raises:
        RaytuneError: of the first task, by its argument, that raised one.
    """
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True

    def call(batch: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(
            [_guarded(task, argument, shared) for argument in batch.to_pylist()]
        )

    with ray.data.DataContext.current(context):
        # from_items makes its blocks here. ray.data.range and from_arrow start tasks of their own
        # that want a whole core: with less than one free beside the workers, they wait for ever.
        blocks = ray.data.from_items(arguments, override_num_blocks=len(arguments))
        results = blocks.map_batches(
            call,
            batch_size=1,
            batch_format="pyarrow",
            num_cpus=TASK_CPUS,
            compute=ray.data.TaskPoolStrategy(size=at_once),
        )
    for row in results.iter_rows():
        if row["error"]:
            raise getattr(errors, row["kind"])(row["error"])
        yield row


def _guarded(task: Task, argument: dict[str, int], shared: ray.ObjectRef) -> dict[str, Any]:
    """Run a task; hand a user's mistake back as values, since Ray would wrap and retry it."""
    try:
        return {"kind": "", "error": "", **task(_cached(shared), **argument)}
    except errors.RaytuneError as error:
        return {"kind": type(error).__name__, "error": str(error)}


_cache: dict[str, Any] = {}


def _cached(shared: ray.ObjectRef) -> Any:
    """Fetch what all tasks of a run share once per process; a tokenizer takes long to build."""
    key = shared.hex()
    if key not in _cache:
        _cache.clear()
        _cache[key] = ray.get(shared)
    return _cache[key]


def _measure_task(shared: tuple[RowSource, Encoder], start: int, end: int) -> dict[str, Any]:
    measured = measure_rows(*shared, np.arange(start, end))
    return {
        "lengths": measured.lengths.tobytes(),
        "targets": measured.targets.tobytes(),
        "report": json.dumps(measured.report),
    }


def _window_task(feed: Feed, epoch: int, window: int) -> dict[str, Any]:
    """Make one window; packs travel as six arrays, which is far smaller than one row per pack."""
    made = feed.window(epoch, window)
    packs = made.packs
    empty = [np.zeros(0, np.int32)]
    sizes = [np.diff(pack.cu_seqlens) for pack in packs]
    return {
        "input_ids": np.concatenate([*empty, *(pack.input_ids for pack in packs)]).tobytes(),
        "labels": np.concatenate([*empty, *(pack.labels for pack in packs)]).tobytes(),
        "row_ids": np.concatenate([np.zeros(0, np.int64), *(p.row_ids for p in packs)]).tobytes(),
        "sizes": np.concatenate([*empty, *sizes]).astype(np.int32).tobytes(),
        "rows_per_pack": np.array([len(pack.row_ids) for pack in packs], np.int32).tobytes(),
        "segments_per_pack": np.array([len(part) for part in sizes], np.int32).tobytes(),
        "report": json.dumps(made.report),
        "first": made.first,
        "last": made.last,
    }


def _unpacked(row: dict[str, Any]) -> Window:
    """Rebuild the window of `_window_task`."""
    ids, labels, sizes, n_rows, n_segments = (
        np.frombuffer(row[key], np.int32)
        for key in ("input_ids", "labels", "sizes", "rows_per_pack", "segments_per_pack")
    )
    row_ids = np.frombuffer(row["row_ids"], np.int64)
    packs = build_packs(ids, labels, sizes, n_segments, row_ids, n_rows)
    return Window(packs, json.loads(row["report"]), row["first"], row["last"])
