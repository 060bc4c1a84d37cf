"""Stream: rows counted and windows made by stateless Ray Data tasks, on any node that can read.

Every task gets numbers alone, a range of rows or a window, and can be run again anywhere. So what
is made does not depend on how many tasks there are. `data.windows` does the work; this module only
spreads it, and `data.feeder` decides which windows are made when.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray
import ray.data
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ft import errors
from raytune_ft.data.ahead import Made
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import build_packs
from raytune_ft.data.report import add_report, new_report
from raytune_ft.data.sources import RowSource
from raytune_ft.data.windows import Feed, Measurement, Window, measure_rows

__all__ = [
    "made_table",
    "make_windows",
    "measure",
    "node_with",
    "on_node",
    "read_window",
    "window_table",
]

TASK_CPUS = 0
"""Data tasks ask for no core of Ray's books, so that workers or trials that hold every core cannot
starve them; how many run at once is bounded by their number instead."""
IN_PROCESS_ROWS = 2000
"""Fewer rows are counted here sooner than a Ray Data task starts."""
ROWS_PER_TASK = 2048
MEASURE_TASKS = 8
PROBE_SECONDS = 60

Progress = Callable[[int, int], None]
Task = Callable[..., dict[str, Any]]

_context_lock = threading.Lock()


def measure(
    source: RowSource,
    encoder: Encoder,
    progress: Progress | None = None,
) -> Measurement:
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
    node = node_with([source])
    shared = ray.put((source, encoder))
    ranges = [
        {"start": start, "end": min(start + ROWS_PER_TASK, n_rows)}
        for start in range(0, n_rows, ROWS_PER_TASK)
    ]
    lengths, targets, report = [], [], new_report()
    for ref, _ in _run(_measure_task, ranges, shared, MEASURE_TASKS, node):
        row = _result(ray.get(ref))
        lengths.append(_ints(row["lengths"]))
        targets.append(_ints(row["targets"]))
        add_report(report, json.loads(row["report"].as_py()))
        report_progress(report["rows"], n_rows)
    sets = source.sets_of(np.arange(n_rows))
    return Measurement(np.concatenate(lengths), np.concatenate(targets), sets, report)


def make_windows(
    feeds: ray.ObjectRef,
    kind: str,
    numbers: Sequence[tuple[int, int]],
    *,
    at_once: int,
    node: str | None = None,
) -> Generator[Made, None, None]:
    """Make windows by one Ray Data execution; yield them in the order asked for.

    Nothing holds what is made but the references yielded. Close the generator to stop the tasks.

    Args:
        feeds: reference to a mapping of kinds to feeds.
        kind: whose windows.
        numbers: (epoch, window) of each; bounds what is made ahead of the consumer.
        at_once: tasks that run at the same time.
        node: id of the node that has the files; None if any node can read them.

    Yields:
        A reference to a table for `read_window`, and its bytes.
    """
    tasks = [{"kind": kind, "epoch": epoch, "window": window} for epoch, window in numbers]
    yield from _run(_window_task, tasks, feeds, at_once, node)


def window_table(feed: Feed, epoch: int, number: int) -> pa.Table:
    """Make a window in this process, in the form in which a data task gives it."""
    return _guarded(lambda: _packed(feed.window(epoch, number)))


def made_table(window: Window) -> pa.Table:
    """Give a window the form in which a data task gives it."""
    return _guarded(lambda: _packed(window))


def read_window(table: pa.Table) -> Window:
    """Rebuild a window; its arrays are views of the table, which many processes share.

    Raises:
        RaytuneError: what was wrong with the data, as the task raised it.
    """
    row = _result(table)
    names = ("input_ids", "labels", "sizes", "rows_per_pack", "segments_per_pack")
    ids, labels, sizes, n_rows, n_segments = (_ints(row[name]) for name in names)
    row_ids = np.frombuffer(row["row_ids"].as_buffer(), np.int64)
    packs = build_packs(ids, labels, sizes, n_segments, row_ids, n_rows)
    report = json.loads(row["report"].as_py())
    return Window(packs, report, row["first"].as_py(), row["last"].as_py())


def on_node(node: str | None) -> Any:
    """Return Ray's scheduling strategy for one node, or for any.

    Never that of the caller: a trial's processes would share the little that the trial reserved.
    """
    if node is None:
        return "DEFAULT"
    return NodeAffinitySchedulingStrategy(node_id=node, soft=False)


def node_with(sources: Sequence[RowSource]) -> str | None:
    """Find out where data tasks can read every file.

    Files on this machine's disk may be nowhere else; URLs and the hub are everywhere. So every node
    is asked once whether it has these files, of the same size and time.

    Returns:
        None if every node can read all, else the id of the one that opened them.
    """
    files = [Path(file).resolve() for source in sources for file in source.local_files()]
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    if not files or len(nodes) == 1:
        return None
    here: str = ray.get_runtime_context().get_node_id()
    expected = _file_states(files)
    probe = ray.remote(num_cpus=0)(_file_states)
    asked = {
        probe.options(scheduling_strategy=on_node(node)).remote(files): node
        for node in nodes
        if node != here
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PROBE_SECONDS)
    same = {asked[ref] for ref in answered if _answer(ref) == expected}
    return None if len(same) == len(asked) else here


def _file_states(files: list[Path]) -> list[tuple[int, int] | None]:
    """Return size and time of change of files, None for one that is not there."""
    states: list[tuple[int, int] | None] = []
    for file in files:
        try:
            found = file.stat()
            states.append((found.st_size, found.st_mtime_ns))
        except OSError:
            states.append(None)
    return states


def _answer(ref: ray.ObjectRef) -> Any:
    try:
        return ray.get(ref)
    except ray.exceptions.RayError:
        return None  # a node that went away meanwhile has no files


def _run(
    task: Task,
    arguments: list[dict[str, Any]],
    shared: ray.ObjectRef,
    at_once: int,
    node: str | None,
) -> Generator[Made, None, None]:
    """Run one task per argument with Ray Data; yield their tables in the arguments' order."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def call(batch: pa.Table) -> pa.Table:
        tables = [_guarded(task, _cached(shared), **each) for each in batch.to_pylist()]
        return pa.concat_tables(tables)

    # the context is one per process, and kinds of rows are made side by side in threads
    with _context_lock:
        context = ray.data.DataContext.get_current().copy()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        with ray.data.DataContext.current(context):
            # from_items makes its blocks here. ray.data.range and from_arrow start tasks of their
            # own that want a whole core: with less than one free they wait for ever.
            blocks = ray.data.from_items(arguments, override_num_blocks=len(arguments))
            results = blocks.map_batches(
                call,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=TASK_CPUS,
                compute=ray.data.TaskPoolStrategy(size=min(at_once, len(arguments))),
                ray_remote_args_fn=lambda: {"scheduling_strategy": on_node(node)},
            )
    for bundle in results.iter_internal_ref_bundles():
        for entry in bundle.blocks:
            yield entry.ref, int(entry.metadata.size_bytes or 0)


def _guarded(task: Callable[..., Mapping[str, Any]], *args: Any, **kwargs: Any) -> pa.Table:
    """Run a task; hand a user's mistake back as values, since Ray would wrap and retry it."""
    try:
        row = {"kind": "", "error": "", **task(*args, **kwargs)}
    except errors.RaytuneError as error:
        row = {"kind": type(error).__name__, "error": str(error)}
    return pa.Table.from_pylist([row])


def _result(table: pa.Table) -> dict[str, Any]:
    """Return a result's columns as Arrow scalars; raise what the task raised."""
    row = {name: table.column(name)[0] for name in table.column_names}
    if row["error"].as_py():
        raise getattr(errors, row["kind"].as_py())(row["error"].as_py())
    return row


def _ints(scalar: Any) -> npt.NDArray[np.int32]:
    return np.frombuffer(scalar.as_buffer(), np.int32)


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


def _window_task(feeds: Mapping[str, Feed], kind: str, epoch: int, window: int) -> dict[str, Any]:
    return _packed(feeds[kind].window(epoch, window))


def _packed(window: Window) -> dict[str, Any]:
    """Lay a window's packs end to end: six arrays are far smaller than one row per pack."""
    packs = window.packs
    empty = [np.zeros(0, np.int32)]
    sizes = [np.diff(pack.cu_seqlens) for pack in packs]
    return {
        "input_ids": np.concatenate([*empty, *(pack.input_ids for pack in packs)]).tobytes(),
        "labels": np.concatenate([*empty, *(pack.labels for pack in packs)]).tobytes(),
        "row_ids": np.concatenate([np.zeros(0, np.int64), *(p.row_ids for p in packs)]).tobytes(),
        "sizes": np.concatenate([*empty, *sizes]).astype(np.int32).tobytes(),
        "rows_per_pack": np.array([len(pack.row_ids) for pack in packs], np.int32).tobytes(),
        "segments_per_pack": np.array([len(part) for part in sizes], np.int32).tobytes(),
        "report": json.dumps(window.report),
        "first": window.first,
        "last": window.last,
    }
