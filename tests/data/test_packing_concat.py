"""Concat-and-cut packs: the reference's examples, its rule written again, and ours against both."""

from __future__ import annotations

import json
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import DataSection
from raytune_ft.data import concat_packing
from raytune_ft.data.concat_packing import ConcatPlan, cut_rows, pack_bounds
from raytune_ft.data.packing import Pieces, divide_rows, pack_pieces
from tests.data.conftest import GOLDEN

COMPAT = "xtuner-0.1.9"
EXAMPLES: list[dict[str, Any]] = json.loads((GOLDEN / "encode_pack.json").read_text())["pack"]
lengths_lists = st.lists(st.integers(0, 64), min_size=1, max_size=60)


def section(**data: Any) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": "x"}], "max_length": 64, **data})


def plan_of(lengths: list[int], sets: list[int] | None = None, **data: Any) -> ConcatPlan:
    sizes = np.array(lengths, dtype=np.int32)
    numbers = np.array(sets or [0] * len(lengths), dtype=np.int32)
    return ConcatPlan(sizes, section(compat=COMPAT, **data), 3, numbers)


def listed(laid: Pieces) -> list[list[list[int]]]:
    """Packs as lists of [row, start, stop]."""
    return [laid.pack(number).tolist() for number in range(len(laid))]


def packs_of(plan: ConcatPlan, epoch: int = 0) -> list[list[list[int]]]:
    """All packs of an epoch, in its order."""
    windows = range(plan.n_windows)
    return [pack for window in windows for pack in listed(plan.window_pieces(epoch, window))]


def ours(lengths: list[int], max_length: int = 64) -> list[list[list[int]]]:
    """The packs of the same rows without `compat`."""
    data = section(max_length=max_length)
    pieces = divide_rows(lengths, data)
    return listed(pack_pieces(pieces, data, np.random.default_rng(3)))


def tokens_of(pack: list[list[int]]) -> list[tuple[int, int]]:
    """Name each token by its row and its place in the row."""
    return [(row, place) for row, start, stop in pack for place in range(start, stop)]


def joined_and_cut(groups: list[list[list[Any]]], max_length: int) -> list[list[Any]]:
    """Pack token lists, a list per row, by the reference's rule, the plain way."""
    packs: list[list[Any]] = []
    carried: list[Any] = []
    for rows in groups:
        stream = carried + [token for row in rows for token in row]
        carried = []
        if len(stream) < max_length:
            packs.append(stream)
            continue
        while len(stream) >= max_length:
            packs.append(stream[:max_length])
            stream = stream[max_length:]
        carried = stream
    return packs


def row_order(n_rows: int, data_set: int, shuffle: bool) -> list[int]:
    """Order a data set's rows as seed 3 does."""
    if not shuffle:
        return list(range(n_rows))
    return list(np.random.default_rng((3, data_set, 14)).permutation(n_rows))


def groups_of(rows: list[list[Any]], size: int) -> list[list[list[Any]]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def cut_tokens(rows: list[list[int]], packed: Pieces) -> list[list[int]]:
    return [
        [token for row, start, stop in pack for token in rows[row][start:stop]]
        for pack in listed(packed)
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_packs_equal_the_reference(example: dict[str, Any]) -> None:
    rows = [row for batch in example["batches"] for row in batch]
    lengths = np.array([len(row) for row in rows])
    bounds = pack_bounds(lengths, example["chunk"], group_rows=len(example["batches"][0]))
    assert cut_tokens(rows, cut_rows(lengths, bounds)) == example["rows"]
    tokens = [token for row in rows for token in row]
    assert tokens[bounds[-1] :] == example["left_over"]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_ours_keeps_the_same_rows_whole_and_loses_none(example: dict[str, Any]) -> None:
    rows = [row for batch in example["batches"] for row in batch]
    longest = max(map(len, rows))
    packs = ours([len(row) for row in rows], max(8, longest, example["chunk"]))
    whole = sorted(piece for pack in packs for piece in pack)
    assert whole == [[row, 0, len(tokens)] for row, tokens in enumerate(rows) if tokens]


@given(
    lengths=st.lists(st.integers(1, 64), max_size=60),
    max_length=st.integers(1, 40),
    group=st.integers(1, 9),
)
def test_bounds_follow_the_rule_for_any_rows_and_groups(
    lengths: list[int], max_length: int, group: int
) -> None:
    rows = [[(row, place) for place in range(size)] for row, size in enumerate(lengths)]
    bounds = pack_bounds(np.array(lengths, dtype=np.int64), max_length, group)
    stream = [token for row in rows for token in row]
    got = [stream[a:b] for a, b in pairwise(bounds)]
    assert got == joined_and_cut(groups_of(rows, group), max_length)


@given(
    lengths=lengths_lists,
    sets=st.integers(1, 3),
    group=st.integers(1, 20),
    window=st.integers(1, 20),
    shuffle=st.booleans(),
)
def test_each_data_set_is_packed_on_its_own_from_its_used_rows(
    lengths: list[int], sets: int, group: int, window: int, shuffle: bool
) -> None:
    numbers = [row * sets // len(lengths) for row in range(len(lengths))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concat_packing, "GROUP_ROWS", group)
        plan = plan_of(lengths, numbers, window=window, shuffle_before_pack=shuffle)
        got = [tokens_of(pack) for pack in packs_of(plan)]
    expected = []
    for number in sorted(set(numbers)):
        used = [r for r, size in enumerate(lengths) if size and numbers[r] == number]
        visited = [used[place] for place in row_order(len(used), number, shuffle)]
        rows = [[(row, place) for place in range(lengths[row])] for row in visited]
        expected += joined_and_cut(groups_of(rows, group), 64)
    assert sorted(got) == sorted(expected)
    assert plan.lost_tokens == sum(lengths) - sum(map(len, got))


@given(lengths=lengths_lists, window=st.integers(1, 20), pack=st.booleans())
def test_every_epoch_visits_the_same_packs_once_in_another_order(
    lengths: list[int], window: int, pack: bool
) -> None:
    plan = plan_of(lengths, window=window, pack=pack)
    first, second = packs_of(plan, 0), packs_of(plan, 1)
    assert sorted(first) == sorted(second)
    for epoch in (0, 1):
        sizes = [len(plan.window_pieces(epoch, w)) for w in range(plan.n_windows)]
        assert all(sizes)
        assert plan.n_packs == sum(sizes) == len(first)
    if not pack:
        assert sorted(first) == [[[r, 0, size]] for r, size in enumerate(lengths) if size]


def test_a_window_holds_about_as_many_rows_as_asked() -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 5000).tolist()
    plan = plan_of(lengths, window=500)
    rows = [len(np.unique(plan.window_pieces(0, w).pieces[:, 0])) for w in range(9)]
    assert all(500 <= n <= 1000 for n in rows)  # rows at borders stand in two windows
    assert packs_of(plan, 0) != packs_of(plan, 1)


def test_a_window_is_made_from_its_number_alone_on_any_machine() -> None:
    lengths = np.random.default_rng(0).integers(0, 64, 300).tolist()
    numbers = [row // 100 for row in range(300)]
    used = plan_of(lengths, numbers, window=16)
    whole = {(e, w): used.window_pieces(e, w) for e in range(2) for w in range(used.n_windows)}
    for (epoch, window), expected in reversed(whole.items()):
        travelled = pickle.loads(pickle.dumps(used))
        assert listed(travelled.window_pieces(epoch, window)) == listed(expected)
    assert len(pickle.dumps(used)) < len(used.lengths) * 40


def test_the_reference_gives_short_packs_and_loses_a_tail_where_ours_does_not() -> None:
    exact = plan_of([40, 40, 48], shuffle_before_pack=False)
    halves = [[[0, 0, 40], [1, 0, 24]], [[1, 24, 40], [2, 0, 48]]]
    assert (sorted(packs_of(exact)), exact.lost_tokens) == (halves, 0)
    short = plan_of([40], shuffle_before_pack=False)
    assert packs_of(short) == [[[0, 0, 40]]]
    lost = plan_of([40, 40], shuffle_before_pack=False)
    assert (packs_of(lost), lost.lost_tokens) == ([[[0, 0, 40], [1, 0, 24]]], 16)
    assert sorted(ours([40, 40])) == [[[0, 0, 40]], [[1, 0, 40]]]


def test_no_usable_row_means_no_window() -> None:
    plan = plan_of([0, 0])
    assert (plan.n_windows, plan.n_packs, plan.lost_tokens) == (0, 0, 0)


def test_a_million_rows_are_cut_at_once() -> None:
    lengths = np.random.default_rng(0).integers(1, 2048, 1_000_000).astype(np.int64)
    bounds = pack_bounds(lengths, 2048, 1000)
    packed = cut_rows(lengths, bounds)
    assert 0 <= lengths.sum() - packed.sizes.sum() < 2048
    assert (np.diff(bounds) == 2048).all()
    assert (np.add.reduceat(packed.sizes, packed.ends[:-1]) == 2048).all()
