"""Places: where the stream goes on behind each pack, and every window told of exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.packing import Pack, Position
from raytune_ft.data.places import Placed, placed, window_numbers
from raytune_ft.data.report import Report, add_report, new_report
from raytune_ft.data.windows import Window
from raytune_ft.errors import DataError
from tests.data.conftest import join_examples
from tests.data.test_packing import example

Epochs = list[list[int]]
"""Epoch -> window -> number of packs."""

epochs_of_windows = st.integers(1, 6).flatmap(
    lambda n_windows: st.lists(
        st.lists(st.integers(0, 3), min_size=n_windows, max_size=n_windows).filter(any),
        min_size=1,
        max_size=4,
    )
)


def pack_of(epoch: int, window: int, number: int) -> Pack:
    """A pack that can be told from all others."""
    return join_examples([example(1 + number, 0)], [100 * epoch + 10 * window + number])


def report_of(epoch: int, window: int) -> Report:
    """A report that shows which window it is of."""
    report = new_report(rows=10 ** (window + 6 * epoch))
    report["places"]["cut"] = [f"epoch {epoch} window {window}"]
    return report


def window_of(epochs: Epochs, epoch: int, number: int) -> Window:
    packs = [pack_of(epoch, number, pack) for pack in range(epochs[epoch][number])]
    n_windows = len(epochs[epoch])
    return Window(packs, report_of(epoch, number), number / n_windows, (number + 1) / n_windows)


def stream(epochs: Epochs, start: Position | None = None) -> Iterator[Placed]:
    start, n_windows = start or Position(), len(epochs[0])
    numbers = window_numbers(n_windows, start, len(epochs))
    made = ((epoch, number, window_of(epochs, epoch, number)) for epoch, number in numbers)
    return placed(made, start, n_windows)


def rows_of(packs: list[Placed]) -> list[int]:
    return [int(one.pack.row_ids[0]) for one in packs]


def told(packs: list[Placed]) -> Report:
    total = new_report()
    for one in packs:
        add_report(total, one.report)
    return total


@given(epochs=epochs_of_windows)
def test_packs_come_in_order_and_each_knows_the_next(epochs: Epochs) -> None:
    places = [
        Position(epoch, window, pack)
        for epoch, windows in enumerate(epochs)
        for window, packs in enumerate(windows)
        for pack in range(packs)
    ]
    got = list(stream(epochs))
    assert rows_of(got) == [100 * p.epoch + 10 * p.window + p.pack for p in places]
    following = [
        after if after.epoch == here.epoch else Position(after.epoch, 0, 0)
        for here, after in pairwise([*places, Position(len(epochs))])
    ]
    assert [one.behind for one in got] == following


@given(epochs=epochs_of_windows)
def test_every_window_is_told_of_once_and_within_its_epoch(epochs: Epochs) -> None:
    got = list(stream(epochs))
    expected = sum(10 ** (w + 6 * e) for e in range(len(epochs)) for w in range(len(epochs[0])))
    assert told(got)["rows"] == expected
    for one in got:
        epoch = int(one.pack.row_ids[0]) // 100
        named = one.report["places"].get("cut", [])
        assert all(place.startswith(f"epoch {epoch} ") for place in named)
        assert named == sorted(named)


@given(epochs=epochs_of_windows, data=st.data())
def test_a_run_that_stops_and_goes_on_sees_the_same_packs_and_tells_the_same(
    epochs: Epochs, data: st.DataObject
) -> None:
    whole = list(stream(epochs))
    got: list[Placed] = []
    start = Position()
    while start.epoch < len(epochs):
        part = list(islice(stream(epochs, start), data.draw(st.integers(1, 5))))
        got += part
        start = part[-1].behind
    assert rows_of(got) == rows_of(whole)
    assert [(one.behind, one.progress) for one in got] == [
        (one.behind, one.progress) for one in whole
    ]
    assert [one.report for one in got] == [one.report for one in whole]


@given(epochs=epochs_of_windows)
def test_progress_rises_and_ends_each_epoch_at_a_whole_number(epochs: Epochs) -> None:
    got = list(stream(epochs))
    progress = [0.0, *(one.progress for one in got)]
    assert all(before < after for before, after in pairwise(progress))
    for one in got:
        ends_epoch = one.behind.window == one.behind.pack == 0
        assert (one.progress == one.behind.epoch) == ends_epoch
        assert one.behind.epoch <= one.progress <= one.behind.epoch + 1


def test_progress_within_a_window_is_its_share_of_tokens() -> None:
    got = list(stream([[3, 1], [1, 1]]))  # packs of 1, 2 and 3 tokens
    expected = [0.5 * 1 / 6, 0.5 * 3 / 6, 0.5, 1.0, 1.5, 2.0]
    assert [one.progress for one in got] == pytest.approx(expected)


def test_windows_without_packs_are_told_of_with_the_pack_before_or_the_first() -> None:
    got = list(stream([[0, 2, 0, 1, 0], [0, 1, 0, 0, 0]]))
    assert [one.report["places"].get("cut", []) for one in got] == [
        ["epoch 0 window 0", "epoch 0 window 1"],
        ["epoch 0 window 2"],
        ["epoch 0 window 3", "epoch 0 window 4"],
        [f"epoch 1 window {number}" for number in range(5)],
    ]


@given(n_windows=st.integers(1, 5), before=st.integers(0, 2))
def test_an_epoch_without_any_pack_ends_the_run(n_windows: int, before: int) -> None:
    epochs = [[1] * n_windows] * before + [[0] * n_windows]
    got = stream(epochs)
    assert len(list(islice(got, n_windows * before))) == n_windows * before
    rows = sum(10 ** (window + 6 * before) for window in range(n_windows))
    with pytest.raises(DataError, match=f"none of {rows} rows can be trained on"):
        next(got)


def test_no_window_at_all_ends_the_run() -> None:
    with pytest.raises(DataError, match=r"data\.sources: there is no row to train on; give them"):
        next(placed(iter(()), Position(), 0))


def test_empty_windows_in_a_row_over_an_epoch_s_end_are_no_empty_epoch() -> None:
    """The only good row stands in the first window of one epoch and in the last of the next."""
    got = list(stream([[1, 0, 0, 0], [0, 0, 0, 1]]))
    assert [one.behind for one in got] == [Position(1), Position(2)]


@given(epochs=epochs_of_windows, data=st.data())
def test_only_what_is_needed_is_made(epochs: Epochs, data: st.DataObject) -> None:
    """An epoch's last pack waits for no window of the next one, a resumed run makes no earlier."""
    whole = list(stream(epochs))
    done = data.draw(st.integers(0, len(whole) - 1))
    start = whole[done - 1].behind if done else Position()
    asked: list[tuple[int, int]] = []

    def made() -> Iterator[tuple[int, int, Window]]:
        for epoch, number in window_numbers(len(epochs[0]), start, len(epochs)):
            asked.append((epoch, number))
            yield epoch, number, window_of(epochs, epoch, number)

    first = next(placed(made(), start, len(epochs[0])))
    assert asked[0] == (start.epoch, start.window)
    assert asked[-1][0] == int(first.pack.row_ids[0]) // 100


@given(n_windows=st.integers(1, 5), epochs=st.integers(1, 3), data=st.data())
def test_windows_are_numbered_from_any_place_to_the_last_epoch_s_end(
    n_windows: int, epochs: int, data: st.DataObject
) -> None:
    start = Position(
        data.draw(st.integers(0, epochs - 1)), data.draw(st.integers(0, n_windows - 1))
    )
    every = [(epoch, window) for epoch in range(epochs) for window in range(n_windows)]
    expected = every[start.epoch * n_windows + start.window :]
    assert list(window_numbers(n_windows, start, epochs)) == expected
    endless = list(islice(window_numbers(n_windows, start, None), len(expected) + 1))
    assert endless == [*expected, (epochs, 0)]


def test_positions_are_ordered_as_the_stream_visits_them() -> None:
    places = [Position(e, w, p) for e in range(2) for w in range(2) for p in range(2)]
    mixed = [places[number] for number in (5, 0, 7, 2, 4, 1, 6, 3)]
    assert sorted(mixed) == places
