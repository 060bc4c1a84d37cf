"""Feeder: ranks get the packs of a plain loop, whatever runs beside it and whatever is killed."""

from __future__ import annotations

import os
import queue
import re
import signal
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from raytune_ft.data.counting import estimate
from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed
from raytune_ft.errors import DataError, TrainingError
from tests.conftest import write_chats
from tests.data.feeds import COMPAT, feed_of, fingerprint

pytestmark = pytest.mark.ray

EPOCHS = 2


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Feed:
    """Ten windows."""
    path = write_chats(tmp_path_factory.mktemp("feeder") / "a.jsonl", 320)
    return feed_of(path, tokenizer, window=32)


@pytest.fixture(scope="module")
def whole(feed: Feed) -> list[tuple[object, ...]]:
    """What a plain loop gives."""
    return [fingerprint(placed) for placed in iter_packs(feed, epochs=EPOCHS)]


@pytest.fixture(scope="module", autouse=True)
def ray() -> Iterator[None]:
    from raytune_ft.cluster import ray_session

    with ray_session():
        yield


@pytest.mark.parametrize("tasks", [1, 2, 4, 16])
def test_packs_are_those_of_a_plain_loop(
    feed: Feed, whole: list[tuple[object, ...]], tasks: int
) -> None:
    from raytune_ft.data.feeder import Rows, feeding

    with feeding({"train": Rows(feed, EPOCHS)}, at_once=tasks) as supply:
        assert [fingerprint(placed) for placed in supply.packs("train")] == whole


def test_packs_of_compat_are_those_of_a_plain_loop(chats: Path, tokenizer: TextTokenizer) -> None:
    from raytune_ft.data.feeder import Rows, feeding

    feed = feed_of(chats, tokenizer, window=8, compat=COMPAT)
    expected = [fingerprint(placed) for placed in iter_packs(feed, epochs=1)]
    with feeding({"train": Rows(feed)}) as supply:
        assert [fingerprint(placed) for placed in supply.packs("train")] == expected


def test_going_on_makes_no_earlier_window(feed: Feed, whole: list[tuple[object, ...]]) -> None:
    from raytune_ft.data.feeder import Rows, feeding

    places = list(iter_packs(feed, epochs=EPOCHS))
    done = next(i for i, placed in enumerate(places, 1) if placed.behind.window == 7)
    with feeding({"train": Rows(feed, EPOCHS)}) as supply:
        rest = supply.packs("train", places[done - 1].behind)
        assert [fingerprint(placed) for placed in rest] == whole[done:]
        assert supply.state("train")["made"] == EPOCHS * feed.n_windows - 7


def test_all_ranks_read_windows_that_are_made_once(
    feed: Feed, whole: list[tuple[object, ...]]
) -> None:
    from raytune_ft.data.feeder import Rows, feeding

    got: list[list[tuple[object, ...]]] = [[], []]
    kinds = {"train": Rows(feed, EPOCHS, tuple(estimate(feed).windows)), "validation": Rows(feed)}
    with feeding(kinds, readers=2, begin=["train"]) as supply:

        def follow(rank: int) -> None:
            got[rank] = [fingerprint(p) for p in supply.packs("train", reader=rank)]

        threads = [threading.Thread(target=follow, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        made = supply.state("train")["made"]
        _, held_out = supply.of_rank(1)
        assert held_out is not None
        assert len(list(held_out())) == len(list(iter_packs(feed, epochs=1)))
    assert got == [whole, whole]
    assert made == EPOCHS * feed.n_windows - 2, "the windows of the estimate are used"


def test_windows_come_when_workers_hold_every_core(
    feed: Feed, whole: list[tuple[object, ...]]
) -> None:
    """As training workers do, or a sweep: a task that asks for any part of a core waits on."""
    import ray as ray_library

    from raytune_ft.data.feeder import Rows, feeding

    cores = ray_library.cluster_resources()["CPU"]
    worker = ray_library.remote(num_cpus=cores)(Holder).remote()
    assert ray_library.get(worker.ready.remote())
    with feeding({"train": Rows(feed, EPOCHS)}) as supply:
        assert [fingerprint(placed) for placed in supply.packs("train")] == whole
    ray_library.kill(worker)


def test_a_killed_feeder_changes_nothing(feed: Feed, whole: list[tuple[object, ...]]) -> None:
    from raytune_ft.data.feeder import Rows, feeding

    got = []
    with feeding({"train": Rows(feed, EPOCHS)}) as supply:
        first = supply.state("train")["pid"]
        for number, placed in enumerate(supply.packs("train")):
            got.append(fingerprint(placed))
            if number == len(whole) // 3:
                os.kill(first, signal.SIGKILL)
        assert supply.state("train")["pid"] != first
    assert got == whole


def test_a_bad_row_ends_every_rank_with_one_line(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    from raytune_ft.data.feeder import Rows, feeding

    path = write_chats(tmp_path / "a.jsonl", 64)
    lines = path.read_text().splitlines()
    lines[33] = "{broken"
    path.write_text("\n".join(lines))
    feed = feed_of(path, tokenizer, window=16)
    with feeding({"train": Rows(feed)}, readers=2) as supply:
        for rank in range(2):
            with pytest.raises(DataError, match=r"^\S+a\.jsonl:34: not valid JSON") as caught:
                list(supply.packs("train", reader=rank))
            assert type(caught.value) is DataError
            assert "\n" not in str(caught.value)


def test_a_slow_rank_finds_the_next_windows_there(feed: Feed) -> None:
    """So it does not wait: they are in its hands before it asks."""
    from raytune_ft.data.feeder import PREFETCHED_WINDOWS, Rows, feeding

    with feeding({"train": Rows(feed, EPOCHS)}) as supply:
        packs = supply.packs("train")
        window = 0
        while window < 6:
            window = next(packs).behind.window
            state = supply.state("train")
            # this window, those prefetched, and the one that waits for room
            while state["asked"][0] < window + PREFETCHED_WINDOWS:
                time.sleep(0.01)
                state = supply.state("train")
            assert state["asked"][0] <= window + PREFETCHED_WINDOWS + 2
        packs.close()  # type: ignore[attr-defined]


def test_nothing_goes_on_behind_the_end(feed: Feed) -> None:
    import ray as ray_library

    from raytune_ft.data.feeder import Rows, feeding

    threads = threading.active_count()
    with feeding({"train": Rows(feed, 10**6)}) as supply:
        packs = supply.packs("train")
        assert len(list(islice(packs, 5))) == 5
        packs.close()  # type: ignore[attr-defined]
        assert threading.active_count() <= threads
    with pytest.raises(ray_library.exceptions.RayActorError):
        supply.state("train")
    with pytest.raises(TrainingError, match=r"^the process that has windows made is gone: "):
        next(supply.packs("train"))


def test_a_window_that_never_comes_is_an_error_that_says_what_is_known(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytune_ft.data import feeder

    monkeypatch.setattr(feeder, "LIMIT_SECONDS", 0.0)
    with feeder.feeding({"train": feeder.Rows(feed)}) as supply:
        os.kill(supply.state("train")["pid"], signal.SIGSTOP)
        asked: queue.Queue[BaseException] = queue.Queue()

        def ask() -> None:
            try:
                next(supply.packs("train"))
            except TrainingError as error:
                asked.put(error)

        threading.Thread(target=ask, daemon=True).start()
        error = asked.get(timeout=60)
    assert re.match("train: window 0 of epoch 0 has not come for 0 minutes; the ", str(error))


class Holder:
    """Holds cores, as training workers do."""

    def ready(self) -> bool:
        return True
