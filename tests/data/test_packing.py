"""Packing: nothing lost, nothing mixed, nothing left to chance."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import DataSection
from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.packing import (
    Pack,
    Plan,
    Position,
    collate,
    epoch_order,
    join_examples,
    pack_lengths,
)

lengths_lists = st.lists(st.integers(1, 64), max_size=80)


def section(**data: Any) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": "x"}], "max_length": 64, **data})


def example(length: int, start: int) -> Example:
    ids = np.arange(start, start + length, dtype=np.int32)
    labels = np.where(ids % 2 == 0, ids, IGNORE_INDEX).astype(np.int32)
    return Example(ids, labels, length)


def plain_best_fit(lengths: list[int], max_length: int) -> list[list[int]]:
    """Do the same the slow and obvious way."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [p for p, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            packs.append([])
            rooms.append(max_length)
            fitting = [len(packs) - 1]
        best = min(fitting, key=lambda p: rooms[p])
        packs[best].append(index)
        rooms[best] -= lengths[index]
    return packs


@given(lengths=lengths_lists)
def test_every_item_stands_in_exactly_one_pack_that_holds_it(lengths: list[int]) -> None:
    packs = pack_lengths(lengths, 64)
    assert sorted(i for pack in packs for i in pack) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in pack) <= 64 for pack in packs)
    assert packs == pack_lengths(np.array(lengths, dtype=np.int32), 64)


@given(lengths=lengths_lists)
def test_packs_are_as_full_as_plain_best_fit_makes_them(lengths: list[int]) -> None:
    def fills(packs: list[list[int]]) -> list[int]:
        return sorted(sum(lengths[i] for i in pack) for pack in packs)

    assert fills(pack_lengths(lengths, 64)) == fills(plain_best_fit(lengths, 64))


@pytest.mark.parametrize("lengths", [[0], [65], [5, -1]])
def test_lengths_that_fit_nowhere_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.64"):
        pack_lengths(lengths, 64)


def test_many_lengths_are_packed_in_seconds() -> None:
    lengths = np.random.default_rng(0).integers(1, 2048, 200_000)
    start = time.process_time()
    packs = pack_lengths(lengths, 2048)
    assert time.process_time() - start < 10
    assert len(packs) < lengths.sum() / 2048 * 1.01


def test_an_order_is_a_permutation_that_seed_and_epoch_decide() -> None:
    pairs = ((1, 0), (1, 0), (1, 1), (2, 0))
    orders = [epoch_order(50, seed, epoch, True) for seed, epoch in pairs]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[3])
    assert epoch_order(5, 1, 1, False).tolist() == [0, 1, 2, 3, 4]


@given(
    lengths=st.lists(st.integers(0, 64), min_size=1, max_size=60),
    window=st.integers(1, 20),
    pack=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_an_epoch_holds_every_used_row_once(
    lengths: list[int], window: int, pack: bool, shuffle: bool, epoch: int
) -> None:
    data = section(window=window, pack=pack, shuffle_before_pack=shuffle)
    plan = Plan(np.array(lengths, dtype=np.int32), data, seed=3)
    groups = [plan.window_groups(epoch, w) for w in range(plan.n_windows)]
    rows = [int(row) for packs in groups for group in packs for row in group]
    assert sorted(rows) == [i for i, length in enumerate(lengths) if length]
    assert [len(packs) for packs in groups] == plan.packs_per_window(epoch)
    assert plan.n_packs(epoch) == sum(map(len, groups))
    assert plan.total_packs(epoch + 1) == sum(plan.n_packs(e) for e in range(epoch + 1))
    assert all(sum(lengths[row] for row in group) <= 64 for packs in groups for group in packs)
    if not pack:
        assert all(len(group) == 1 for packs in groups for group in packs)


def test_a_window_is_made_from_its_number_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 100).astype(np.int32)
    used = Plan(lengths, section(window=16), seed=1)
    for epoch in range(3):
        used.n_packs(epoch)
    for epoch, window in ((2, 5), (0, 0), (1, 6)):
        fresh = Plan(lengths, section(window=16), seed=1).window_groups(epoch, window)
        again = used.window_groups(epoch, window)
        assert [group.tolist() for group in fresh] == [group.tolist() for group in again]


def test_unpacked_neighbours_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 512).astype(np.int32)
    plan = Plan(lengths, section(window=512, pack=False), seed=1)
    ordered = np.array([lengths[group[0]] for group in plan.window_groups(0, 0)]).reshape(-1, 16)
    assert np.ptp(ordered, axis=1).mean() < 4
    assert not np.array_equal(ordered[:, 0], np.sort(ordered[:, 0]))


def test_no_usable_row_means_no_window() -> None:
    plan = Plan(np.zeros(4, dtype=np.int32), section(), seed=1)
    assert (plan.n_windows, plan.total_packs(3)) == (0, 0)


def test_positions_run_through_packs_windows_and_epochs() -> None:
    plan = Plan(np.full(4, 64, dtype=np.int32), section(window=2), seed=1)
    assert plan.after(0, 0, 0, 2) == Position(0, 0, 1)
    assert plan.after(0, 0, 1, 2) == Position(0, 1, 0)
    assert plan.after(0, 1, 1, 2) == Position(1, 0, 0)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_a_pack_gives_its_samples_back(sizes: list[int]) -> None:
    examples = [example(size, start=100 * i) for i, size in enumerate(sizes)]
    pack = join_examples(examples, range(len(sizes)))
    spans = list(zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True))
    for (start, end), one in zip(spans, examples, strict=True):
        assert pack.input_ids[start:end].tolist() == one.input_ids.tolist()
        assert pack.labels[start:end].tolist() == one.labels.tolist()
        assert pack.position_ids[start:end].tolist() == list(range(len(one.input_ids)))
    assert pack.n_targets == sum(one.n_targets for one in examples)
    dtypes = [pack.input_ids, pack.labels, pack.position_ids, pack.cu_seqlens]
    assert {array.dtype for array in dtypes} == {np.dtype(np.int32)}


def two_packs() -> list[Pack]:
    return [
        join_examples([example(3, 10), example(2, 20)], [0, 1]),
        join_examples([example(2, 30)], [2]),
    ]


def test_a_batch_is_padded_at_the_right_with_values_that_count_nowhere() -> None:
    batch = collate(two_packs())
    x = IGNORE_INDEX
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[10, 11, 12, 20, 21], [30, 31, 0, 0, 0]],
        "labels": [[10, x, 12, 20, x], [30, x, x, x, x]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]],
        "segment_ids": [[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]],
    }
    wide = collate(two_packs(), pad_to=8)
    assert {value.shape for value in wide.values()} == {(2, 8)}
    assert all(np.array_equal(wide[key][:, :5], batch[key]) for key in batch)
