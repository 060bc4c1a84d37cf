"""Ahead: windows are made once, in order, bounded, and again from wherever a reader asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Sequence

import pytest

from raytune_ft.data.ahead import AHEAD_WINDOWS, BEHIND_WINDOWS, RUN_WINDOWS, Line, Made
from raytune_ft.errors import TrainingError

N_WINDOWS = 10


class Maker:
    """Makes a window's (epoch, number) as its value; remembers what it made, and fails at will."""

    def __init__(self, size: int = 1, failures: int = 0) -> None:
        self.size, self.failures = size, failures
        self.made: list[tuple[int, int]] = []

    def __call__(self, numbers: Sequence[tuple[int, int]]) -> Generator[Made, None, None]:
        for number in numbers:
            if self.failures:
                self.failures -= 1
                raise OSError("Traceback\nno room left")
            self.made.append(number)
            yield number, self.size


def line_of(maker: Maker, *, readers: int = 1, epochs: int = 4, here: Maker | None = None) -> Line:
    return Line(N_WINDOWS, epochs, readers, maker, here or maker, at_once=2)


def settled(line: Line) -> dict[str, object]:
    """Wait until nothing is on its way."""
    state = line.state()
    while state["on their way"]:
        time.sleep(0.005)
        state = line.state()
    return state


def read(line: Line, index: int, reader: int = 0) -> object:
    made = line.window(reader, index, 5.0)
    assert made is not None
    return made[0]


def test_every_window_is_made_once_for_all_readers() -> None:
    maker = Maker()
    line = line_of(maker, readers=3)
    got: list[list[object]] = [[] for _ in range(3)]

    def follow(reader: int) -> None:
        got[reader] = [read(line, index, reader) for index in range(4 * N_WINDOWS)]

    threads = [threading.Thread(target=follow, args=(reader,)) for reader in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [(epoch, number) for epoch in range(4) for number in range(N_WINDOWS)]
    assert got == [expected] * 3
    assert sorted(maker.made) == expected
    assert line.state()["made"] == len(expected)


def test_what_is_made_ahead_is_bounded_and_ends_with_the_epochs() -> None:
    maker = Maker()
    line = line_of(maker)
    for index in range(12):
        read(line, index)
    kept = settled(line)["kept"]
    assert isinstance(kept, list)
    assert kept[0] == 11 - BEHIND_WINDOWS
    assert 11 + AHEAD_WINDOWS <= kept[-1] <= 11 + AHEAD_WINDOWS + RUN_WINDOWS
    last = 4 * N_WINDOWS - 1
    for index in range(12, last + 1):
        read(line, index)
    assert settled(line)["kept"] == list(range(last - BEHIND_WINDOWS, last + 1))


def test_the_slowest_reader_holds_windows_back() -> None:
    line = line_of(Maker(), readers=2)
    read(line, 0, reader=1)
    for index in range(25):  # one reader may need many windows for a step that both take
        read(line, index, reader=0)
    assert settled(line)["kept"] == list(range(25))
    assert read(line, 3, reader=1) == (0, 3)


def test_a_reader_that_is_gone_holds_nothing_back() -> None:
    """A run goes on with fewer ranks, and later with all of them again."""
    line = line_of(Maker(), readers=2)
    read(line, 0, reader=1)
    line.read_by(1)
    for index in range(13):
        read(line, index)
    assert settled(line)["kept"][0] == 12 - BEHIND_WINDOWS
    assert settled(line)["asked"] == {0: 12}
    line.read_by(2)
    for index in range(13, 24):
        read(line, index)
    assert settled(line)["kept"][0] == 12 - BEHIND_WINDOWS, "who has not asked yet may need all"


def test_large_windows_are_made_only_as_they_are_asked_for() -> None:
    maker = Maker(size=2**30)
    line = line_of(maker)
    for index in range(6):
        assert read(line, index) == (0, index)
        settled(line)
        assert len(maker.made) <= index + 3, "two at once before the first size is known"


def test_an_earlier_window_is_made_again_and_what_is_kept_is_used() -> None:
    maker, here = Maker(), Maker()
    line = line_of(maker, here=here)
    assert read(line, 23) == (2, 3)
    assert here.made == [(2, 3)], "the first window of a start waits for nothing"
    settled(line)
    assert min(maker.made) == (2, 4), "no window before the start is made"
    known = len(maker.made)
    assert [read(line, index) for index in (20, 21, 22, 23)] == [(2, n) for n in range(4)]
    settled(line)
    again = maker.made[known:]
    assert (2, 1) in again
    assert not set(again) & set(maker.made[:known]), "kept windows are not made twice"


def test_a_lost_window_is_made_again() -> None:
    line = line_of(Maker())
    read(line, 0)
    settled(line)
    line.lost(1)
    assert read(line, 1) == (0, 1)


def test_a_failure_is_tried_again_and_ends_as_one_line() -> None:
    once = Maker(failures=2)
    line = line_of(once)
    assert [read(line, index) for index in range(3)] == [(0, 0), (0, 1), (0, 2)]
    always = line_of(Maker(failures=1000))
    with pytest.raises(TrainingError) as caught:
        read(always, 0)
    assert str(caught.value) == "windows failed 3 times in a row: no room left"


def test_windows_that_are_there_already_are_not_made() -> None:
    maker = Maker()
    line = Line(N_WINDOWS, 1, 1, maker, maker, 2, made=[("first", 1), ("second", 1)])
    line.begin()
    settled(line)
    assert maker.made[0] == (0, 2)
    assert [read(line, index) for index in range(3)] == ["first", "second", (0, 2)]


def test_a_later_window_that_fails_does_not_take_back_what_nobody_has_read_yet() -> None:
    here, tried = Maker(), threading.Event()

    def later(numbers: Sequence[tuple[int, int]]) -> Generator[Made, None, None]:
        if not tried.is_set():
            while line.state()["kept"] != [0]:
                time.sleep(0.001)
            tried.set()
            raise OSError("no room left")
        yield from Maker()(numbers)

    line = Line(N_WINDOWS, 1, 1, later, here, at_once=2)
    line.window(0, 0, timeout=0)  # made by now or not
    assert tried.wait(30)
    settled(line)
    assert line.window(0, 0, timeout=0) == ((0, 0), 1)
    assert here.made == [(0, 0), (0, 1)]


def test_a_later_window_that_fails_first_does_not_lose_an_earlier_one() -> None:
    """The first is still being made here when Ray Data, started for those behind it, fails."""
    failed = threading.Event()

    def later(numbers: Sequence[tuple[int, int]]) -> Generator[Made, None, None]:
        if not failed.is_set():
            failed.set()
            raise OSError("no room left")
        yield from Maker()(numbers)

    def here(numbers: Sequence[tuple[int, int]]) -> Generator[Made, None, None]:
        assert failed.wait(5.0)
        yield from Maker()(numbers)

    line = Line(N_WINDOWS, 1, 1, later, here, at_once=2)
    assert [read(line, index) for index in range(4)] == [(0, index) for index in range(4)]
