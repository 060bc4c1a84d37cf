"""Feeder: one actor per run that has windows made ahead and hands them to every rank.

Ranks ask for windows by number, in order, and get references to them: a window is made once and
lies once in each node's shared memory, however many ranks read it. What is made ahead is bounded
in windows and in bytes, counted from the slowest rank. The actor keeps nothing that cannot be made
again from a window's number: killed, it is started again and asked again.

    driver                  feeder actor                       rank
    Rows --- feeding() ---> Line per kind <--- number ------   Supply.packs()
                            Ray Data tasks --- window ----->   a few windows, prefetched
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray import exceptions

from raytune_ft.data import stream
from raytune_ft.data.ahead import Line, Made, last_line
from raytune_ft.data.packing import Pack, Position
from raytune_ft.data.places import Placed, placed, window_numbers
from raytune_ft.data.shelf import Shelf
from raytune_ft.data.windows import Feed, Window
from raytune_ft.errors import TrainingError

__all__ = ["Feeder", "Rows", "Supply", "feeding"]

PREFETCHED_WINDOWS = 2
"""Windows that a rank holds beside the one it trains on."""
POLL_SECONDS = 2.0
LIMIT_SECONDS = 600.0
"""Waiting longer for one window is an error that says what is known."""


@dataclass(frozen=True)
class Rows:
    """Rows of one kind and how often they are gone through.

    `made` are the first windows of epoch 0, if they are made already.
    """

    feed: Feed
    epochs: int = 1
    made: tuple[Window, ...] = ()


class Feeder:
    """The actor: a line per kind of rows.

    Args:
        shared: references to a mapping of kinds to feeds, and to one of kinds to tables of the
            first windows of epoch 0. In a list, so that they arrive as references.
        epochs: of each kind.
        readers: ranks that will ask.
        at_once: Ray Data tasks of a kind at the same time.
        node: id of the node that has the files; None if any node can read them.
        keeps: whether readers begin and end when they like, so that windows are kept for all.
    """

    def __init__(
        self,
        shared: list[ray.ObjectRef],
        epochs: Mapping[str, int],
        readers: int,
        at_once: int,
        node: str | None,
        keeps: bool = False,
    ) -> None:
        reference = shared[0]
        feeds, made = ray.get(shared)
        line = Shelf if keeps else Line
        self._lines = {
            kind: line(
                feed.n_windows,
                epochs[kind],
                readers,
                lambda numbers, kind=kind: stream.make_windows(  # type: ignore[misc]
                    reference, kind, numbers, at_once=at_once, node=node
                ),
                lambda numbers, feed=feed: _make_here(feed, numbers),  # type: ignore[misc]
                at_once,
                [_put(table) for table in made[kind]],
            )
            for kind, feed in feeds.items()
        }

    def begin(self, kind: str) -> None:
        """Start to make the first windows of a kind."""
        self._lines[kind].begin()

    def window(self, kind: str, reader: int, index: int) -> tuple[list[ray.ObjectRef], str]:
        """Return a reference to a window's table in a list, empty if it takes longer; an error."""
        try:
            made = self._lines[kind].window(reader, index, POLL_SECONDS)
        except TrainingError as error:
            return [], str(error)
        return [made[0]] if made else [], ""

    def read_by(self, readers: int) -> None:
        """Serve so many ranks from now on."""
        for line in self._lines.values():
            line.read_by(readers)

    def lost(self, kind: str, index: int) -> None:
        """Forget a window that cannot be fetched."""
        self._lines[kind].lost(index)

    def state(self, kind: str) -> dict[str, Any]:
        """Return `Line.state` and this process's id."""
        return {**self._lines[kind].state(), "pid": os.getpid()}


def _make_here(feed: Feed, numbers: Sequence[tuple[int, int]]) -> Generator[Made, None, None]:
    for epoch, number in numbers:
        yield _put(stream.window_table(feed, epoch, number))


def _put(table: pa.Table) -> Made:
    return ray.put(table), table.nbytes


@dataclass(frozen=True)
class Supply:
    """A run's windows, for its ranks; picklable. `windows` and `epochs` have an entry per kind."""

    actor: Any
    windows: Mapping[str, int]
    epochs: Mapping[str, int]

    def packs(
        self, kind: str, start: Position | None = None, *, reader: int = 0
    ) -> Iterator[Placed]:
        """Yield packs in the canonical order, a few windows being fetched ahead by a thread.

        Close the generator to end the thread.

        Args:
            kind: as in the mapping given to `feeding`.
            start: the first pack to yield; None is the beginning. No window before is made.
            reader: the rank that asks.

        Raises:
            DataError: the first row, in the order of the visit, that is unusable, if the recipe
                does not skip it.
            TrainingError: no window comes.
        """
        start = start or Position()
        made = self._fetched(kind, start, reader)
        with contextlib.closing(made):
            yield from placed(made, start, self.windows[kind])

    def of_rank(
        self, rank: int, ranks: int | None = None
    ) -> tuple[Callable[[Position], Iterator[Placed]], Callable[[], Iterator[Pack]] | None]:
        """Return what gives a rank packs from a position on, and the held-out ones, if any.

        Args:
            rank: that asks.
            ranks: that there are from now on; None: as many as `feeding` was told.
        """
        if ranks is not None:
            self.actor.read_by.remote(ranks)

        def held_out() -> Iterator[Pack]:
            return (placed.pack for placed in self.packs("validation", reader=rank))

        def packs(start: Position) -> Iterator[Placed]:
            return self.packs("train", start, reader=rank)

        return packs, held_out if "validation" in self.windows else None

    def state(self, kind: str) -> dict[str, Any]:
        """Return `Line.state` of a kind and the actor's process id."""
        state: dict[str, Any] = ray.get(self.actor.state.remote(kind))
        return state

    def _fetched(
        self, kind: str, start: Position, reader: int
    ) -> Generator[tuple[int, int, Window], None, None]:
        ready: queue.Queue[Any] = queue.Queue(PREFETCHED_WINDOWS)
        stopped = threading.Event()

        def put(item: Any) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def fetch() -> None:
            try:
                for epoch, number in window_numbers(self.windows[kind], start, self.epochs[kind]):
                    window = self._window(kind, reader, epoch, number, stopped)
                    if window is None:
                        return
                    put((epoch, number, window))
                put(None)
            except Exception as error:
                put(error)

        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join(LIMIT_SECONDS)

    def _window(
        self, kind: str, reader: int, epoch: int, number: int, stopped: threading.Event
    ) -> Window | None:
        """Ask until the window is there; None if nobody wants it any longer."""
        index = epoch * self.windows[kind] + number
        begun = time.monotonic()
        while not stopped.is_set():
            try:
                asked = self.actor.window.remote(kind, reader, index)
                refs, error = ray.get(asked, timeout=LIMIT_SECONDS)
                if error:
                    raise TrainingError(error)
                if refs:
                    return stream.read_window(ray.get(refs[0], timeout=LIMIT_SECONDS))
            except exceptions.ObjectLostError:
                self.actor.lost.remote(kind, index)  # its maker was killed: it is made again
                time.sleep(POLL_SECONDS / 10)
            except exceptions.ActorUnavailableError:
                time.sleep(POLL_SECONDS / 10)  # it is being started again
            except exceptions.GetTimeoutError:
                pass
            except exceptions.RayActorError as error:
                raise TrainingError(
                    f"the process that has windows made is gone: {last_line(error)}"
                ) from None
            if time.monotonic() - begun > LIMIT_SECONDS:
                raise TrainingError(
                    f"{kind}: window {number} of epoch {epoch} has not come for "
                    f"{LIMIT_SECONDS / 60:g} minutes; {self._waiting(kind)}"
                )
        return None

    def _waiting(self, kind: str) -> str:
        """Say what is known of the windows that are on their way."""
        try:
            state = ray.get(self.actor.state.remote(kind), timeout=2 * POLL_SECONDS)
        except exceptions.GetTimeoutError:
            return "the process that has them made does not answer"
        free, whole = ray.available_resources(), ray.cluster_resources()
        return (
            f"{state['made']} windows made, {len(state['on their way'])} on their way; "
            f"memory for tasks {free.get('memory', 0) / 2**30:.1f} of "
            f"{whole.get('memory', 0) / 2**30:.1f} GiB free, object store "
            f"{free.get('object_store_memory', 0) / 2**30:.1f} of "
            f"{whole.get('object_store_memory', 0) / 2**30:.1f} GiB; see Ray's logs"
        )


@contextlib.contextmanager
def feeding(
    rows: Mapping[str, Rows],
    *,
    readers: int = 1,
    at_once: int = 2,
    node: str | None = None,
    begin: Sequence[str] = (),
    keeps: bool = False,
) -> Iterator[Supply]:
    """Have windows made while the block runs; nothing goes on being made behind it.

    Args:
        rows: of each kind, such as `train` and `validation`.
        readers: ranks that will read every kind; with `keeps` the most at a time.
        at_once: Ray Data tasks of a kind at the same time.
        node: id of the one that has the files, which may be another one than this; None: the nodes
            are asked.
        begin: kinds whose first windows are made before anybody asks.
        keeps: as `Feeder` takes it.
    """
    feeds = {kind: each.feed for kind, each in rows.items()}
    made = {kind: [stream.made_table(w) for w in each.made] for kind, each in rows.items()}
    epochs = {kind: each.epochs for kind, each in rows.items()}
    node = node or stream.node_with([feed.source for feed in feeds.values()])
    shared = [ray.put(feeds), ray.put(made)]
    actor = (
        ray.remote(Feeder)
        .options(
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=2 * readers * len(rows) + 2,
            scheduling_strategy=stream.on_node(node),
        )
        .remote(shared, epochs, readers, at_once, node, keeps)
    )
    for kind in begin:
        actor.begin.remote(kind)
    try:
        yield Supply(actor, {kind: feed.n_windows for kind, feed in feeds.items()}, epochs)
    finally:
        ray.kill(actor)
