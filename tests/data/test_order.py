"""Order: every row once an epoch, from any window, and only as much shuffled as is asked for."""

from __future__ import annotations

import pickle
import tracemalloc
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.order import RowOrder

Numbers = npt.NDArray[np.int64]

chunk_sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30)
windows = st.integers(1, 70)
shuffled_together = st.integers(1, 200)


def order_of(
    chunks: list[int], window: int, shuffle_rows: int, seed: int = 3, shuffle: bool = True
) -> RowOrder:
    ends = np.cumsum(chunks, dtype=np.int64)
    return RowOrder(ends, seed, window=window, shuffle_rows=shuffle_rows, shuffle=shuffle)


def epoch_of(order: RowOrder, epoch: int) -> list[int]:
    found = [order.window_rows(epoch, window) for window in range(order.n_windows)]
    return [int(row) for rows in found for row in rows]


def plain_pools(chunks: list[int], shuffle_rows: int, seed: int, epoch: int) -> list[list[int]]:
    """Order an epoch the slow way: lists of rows, one pool after the other.

    Only the three random choices (their seeds are part of the format) are those of the package.
    """
    pieces: list[list[int]] = []
    first = 0
    for size in chunks:
        rows = list(range(first, first + size))
        parts = (size + shuffle_rows - 1) // shuffle_rows
        cuts = [size * part // parts for part in range(parts + 1)]
        pieces += [rows[a:b] for a, b in pairwise(cuts)]
        first += size
    visit = np.random.default_rng((seed, epoch, 10)).permutation(len(pieces))
    pools: dict[int, list[int]] = {}
    visited = 0
    for number in visit:
        pool = visited // shuffle_rows if first > shuffle_rows else 0
        pools.setdefault(pool, []).extend(pieces[number])
        visited += len(pieces[number])
    return [
        [
            rows[place]
            for place in np.random.default_rng((seed, epoch, k, 11)).permutation(len(rows))
        ]
        for k, rows in enumerate(pools.values())
    ]


@given(
    chunks=chunk_sizes,
    window=windows,
    together=shuffled_together,
    seed=st.integers(0, 2**32),
    epoch=st.integers(0, 5),
)
def test_the_order_is_that_of_a_plain_implementation(
    chunks: list[int], window: int, together: int, seed: int, epoch: int
) -> None:
    order = order_of(chunks, window, together, seed)
    expected = [row for pool in plain_pools(chunks, together, seed, epoch) for row in pool]
    assert epoch_of(order, epoch) == expected


@given(chunks=chunk_sizes, window=windows, together=shuffled_together, shuffle=st.booleans())
def test_each_epoch_visits_every_row_once_in_windows_of_the_size_asked_for(
    chunks: list[int], window: int, together: int, shuffle: bool
) -> None:
    order = order_of(chunks, window, together, shuffle=shuffle)
    n_rows = sum(chunks)
    assert (order.n_rows, order.n_windows) == (n_rows, -(-n_rows // window))
    for epoch in range(3):
        found = [order.window_rows(epoch, number) for number in range(order.n_windows)]
        assert [len(rows) for rows in found[:-1]] == [window] * (len(found) - 1)
        assert {rows.dtype for rows in found} == {np.dtype(np.int64)}
        assert sorted(np.concatenate(found).tolist()) == list(range(n_rows))


@given(chunks=chunk_sizes, window=windows, together=shuffled_together, shuffle=st.booleans())
def test_places_is_the_inverse(
    chunks: list[int], window: int, together: int, shuffle: bool
) -> None:
    order = order_of(chunks, window, together, shuffle=shuffle)
    for epoch in (0, 2):
        visited = np.array(epoch_of(order, epoch))
        assert order.places(epoch, visited).tolist() == list(range(len(visited)))
        some = np.unique(visited)[::3]
        assert visited[order.places(epoch, some)].tolist() == some.tolist()


@pytest.mark.parametrize("chunks", [[400], [1] * 400, [100] * 4], ids=["one", "single rows", "4"])
@pytest.mark.parametrize("together", [50, 400])
def test_seed_and_epoch_decide_the_order(chunks: list[int], together: int) -> None:
    runs = ((1, 0), (1, 1), (2, 0), (2, 1))
    orders = {run: epoch_of(order_of(chunks, 32, together, run[0]), run[1]) for run in runs}
    for run, rows in orders.items():
        assert epoch_of(order_of(chunks, 32, together, run[0]), run[1]) == rows
        assert rows != list(range(400))
    assert len({tuple(rows) for rows in orders.values()}) == 4


@given(chunks=chunk_sizes, window=windows, epoch=st.integers(0, 3))
def test_without_shuffling_rows_come_by_number(chunks: list[int], window: int, epoch: int) -> None:
    order = order_of(chunks, window, 7, shuffle=False)
    assert epoch_of(order, epoch) == list(range(sum(chunks)))


@given(chunks=chunk_sizes, window=windows, together=shuffled_together, data=st.data())
def test_a_window_is_made_from_its_number_alone(
    chunks: list[int], window: int, together: int, data: st.DataObject
) -> None:
    """Whatever was asked before, in whatever order of epochs and windows, here or elsewhere."""
    used = order_of(chunks, window, together)
    asked = st.tuples(st.integers(0, 3), st.integers(0, used.n_windows - 1))
    for epoch, number in data.draw(st.lists(asked, max_size=8)):
        fresh = order_of(chunks, window, together).window_rows(epoch, number)
        assert used.window_rows(epoch, number).tolist() == fresh.tolist()
        places = number * window + np.arange(len(fresh))
        assert used.places(epoch, fresh).tolist() == places.tolist()
        travelled = pickle.loads(pickle.dumps(used))
        assert travelled.window_rows(epoch, number).tolist() == fresh.tolist()


@given(chunks=chunk_sizes, together=shuffled_together, epoch=st.integers(0, 2))
def test_few_rows_are_shuffled_as_a_whole_and_many_in_bounded_pools(
    chunks: list[int], together: int, epoch: int
) -> None:
    pools = plain_pools(chunks, together, 3, epoch)
    if sum(chunks) <= together:
        assert len(pools) == 1
    assert all(len(pool) < 2 * together for pool in pools)
    assert len(pools) <= -(-sum(chunks) // together)


@given(chunks=chunk_sizes, window=windows, together=shuffled_together)
def test_a_window_reads_few_pools(chunks: list[int], window: int, together: int) -> None:
    order = order_of(chunks, window, together)
    pools = plain_pools(chunks, together, 3, 0)
    pool_of = {row: number for number, rows in enumerate(pools) for row in rows}
    for number in range(order.n_windows):
        touched = {pool_of[row] for row in order.window_rows(0, number).tolist()}
        assert len(touched) <= -(-window // together) + 2


def test_rows_that_lie_together_are_mixed_with_those_of_other_chunks() -> None:
    """100 chunks of 100 rows, pools of 1,000: a window draws on about ten distant chunks."""
    order = order_of([100] * 100, 250, 1000)
    chunks = [np.unique(order.window_rows(0, w) // 100) for w in range(order.n_windows)]
    assert all(len(found) >= 9 for found in chunks)
    spread = [int(np.ptp(found)) for found in chunks]
    assert min(spread) > 40


def test_a_chunk_of_all_rows_is_shuffled_in_parts() -> None:
    """A file that knows no chunks costs no more memory than one that does."""
    order = order_of([1000], 100, 100)
    first = order.window_rows(0, 0)
    assert int(np.ptp(first)) < 100  # one part, from anywhere in the file
    assert epoch_of(order, 0) != epoch_of(order, 1)


def test_time_and_memory_of_a_window_do_not_grow_with_the_rows() -> None:
    """A thousand million rows in one chunk per million; only the chunks are held."""
    sizes = [1_000_000] * 1000
    tracemalloc.start()
    order = order_of(sizes, 1024, 65_536)
    windows = (0, order.n_windows // 2, order.n_windows - 1)
    found = [order.window_rows(epoch, number) for epoch in (0, 7) for number in windows]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert order.n_rows == 10**9
    assert peak < 2**24  # 16 MB; the rows' numbers alone are 8,000 MB
    assert len(pickle.dumps(order)) < 2**18
    assert all(len(np.unique(rows)) == len(rows) for rows in found)
    places = order.places(7, found[4])
    assert places.tolist() == list(range(windows[1] * 1024, windows[1] * 1024 + 1024))


def test_no_row_means_no_window() -> None:
    order = order_of([], 8, 8)
    assert (order.n_rows, order.n_windows) == (0, 0)
