"""Packing: nothing lost, nothing mixed, nothing cut unless asked, nothing left to chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import DataSection
from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.packing import (
    Numbers,
    Pack,
    Pieces,
    WindowTokens,
    build_packs,
    collate,
    divide_rows,
    pack_lengths,
    pack_pieces,
)
from raytune_ft.training.batching import count_targets
from tests.data.conftest import join_examples

PACKINGS = ("best_fit", "concat", "none")
lengths_lists = st.lists(st.integers(1, 64), max_size=80)
row_lengths = st.lists(st.integers(0, 200), min_size=1, max_size=40)  # 64 tokens are a pack
labelled = st.sampled_from((0.0, 0.02, 0.3, 1.0))


def section(**data: Any) -> DataSection:
    return DataSection.model_validate({"sources": [{"path": "x"}], "max_length": 64, **data})


def example(length: int, start: int) -> Example:
    ids = np.arange(start, start + length, dtype=np.int32)
    labels = np.where(ids % 2 == 0, ids, IGNORE_INDEX).astype(np.int32)
    return Example(ids, labels, length)


def rows_of(lengths: list[int], share: float = 0.3) -> list[Example | None]:
    """Rows whose every token is one of a kind, a share of them labelled; None for no token."""
    random = np.random.default_rng(0)
    rows: list[Example | None] = []
    for number, length in enumerate(lengths):
        ids = np.arange(1000 * number, 1000 * number + length, dtype=np.int32)
        trained = random.random(length) < share
        labels = np.where(trained, ids, IGNORE_INDEX).astype(np.int32)
        labels[:1] = IGNORE_INDEX
        rows.append(Example(ids, labels, length) if length else None)
    return rows


def pieces_of(lengths: list[int], data: DataSection, seed: int = 0) -> tuple[Numbers, Pieces]:
    pieces = divide_rows(lengths, data)
    return pieces, pack_pieces(pieces, data, np.random.default_rng(seed))


def tokens_of(pieces: Numbers) -> list[tuple[int, int]]:
    """Name each token by its row and its place in the row."""
    return [(row, place) for row, a, b in pieces.tolist() for place in range(a, b)]


def plain_best_fit(lengths: list[int], max_length: int) -> list[int]:
    """Do the same the slow and obvious way."""
    rooms: list[int] = []
    packs = [0] * len(lengths)
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [p for p, room in enumerate(rooms) if room >= lengths[index]]
        if not fitting:
            rooms.append(max_length)
            fitting = [len(rooms) - 1]
        packs[index] = min(fitting, key=lambda p: (rooms[p], p))
        rooms[packs[index]] -= lengths[index]
    return packs


@given(lengths=lengths_lists)
def test_best_fit_is_that_of_a_plain_implementation(lengths: list[int]) -> None:
    packs = pack_lengths(lengths, 64)
    assert packs.tolist() == plain_best_fit(lengths, 64)
    assert packs.tolist() == pack_lengths(np.array(lengths, dtype=np.int32), 64).tolist()
    fills = np.bincount(packs, weights=lengths) if lengths else np.zeros(0)
    assert all(0 < fill <= 64 for fill in fills)


def test_windows_of_real_sizes_are_packed_as_the_plain_implementation_packs_them() -> None:
    random = np.random.default_rng(0)
    for _ in range(5):
        lengths = np.clip(random.lognormal(5.8, 0.9, 1024), 8, 2048).astype(np.int64)
        assert pack_lengths(lengths, 2048).tolist() == plain_best_fit(lengths.tolist(), 2048)


@pytest.mark.parametrize("lengths", [[0], [65], [5, -1]])
def test_lengths_that_fit_nowhere_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"lengths must lie in 1\.\.64"):
        pack_lengths(lengths, 64)


def test_many_lengths_fill_their_packs() -> None:
    lengths = np.random.default_rng(0).integers(1, 2048, 200_000)
    packs = int(pack_lengths(lengths, 2048).max()) + 1
    assert packs < lengths.sum() / 2048 * 1.01


@given(lengths=row_lengths, packing=st.sampled_from(PACKINGS))
def test_rows_are_divided_only_where_they_are_longer_than_a_pack(
    lengths: list[int], packing: str
) -> None:
    pieces = divide_rows(lengths, section(pack=packing, over_length="split"))
    limit = 10**6 if packing == "concat" else 64
    expected = [
        [row, start, min(start + limit, length)]
        for row, length in enumerate(lengths)
        for start in range(0, length, limit)
    ]
    assert pieces.tolist() == expected


@given(lengths=row_lengths, packing=st.sampled_from(PACKINGS), seed=st.integers(0, 5))
def test_every_token_stands_in_exactly_one_pack_that_is_not_too_long(
    lengths: list[int], packing: str, seed: int
) -> None:
    data = section(pack=packing, over_length="split")
    pieces, laid = pieces_of(lengths, data, seed)
    assert sorted(tokens_of(laid.pieces)) == tokens_of(pieces)
    packs = [laid.pack(number) for number in range(len(laid))]
    assert all(0 < len(tokens_of(pack)) <= 64 for pack in packs)
    assert np.array_equal(np.concatenate([pieces[:0], *packs]), laid.pieces)
    again = pack_pieces(pieces, data, np.random.default_rng(seed))
    assert np.array_equal(again.pieces, laid.pieces)
    assert np.array_equal(again.ends, laid.ends)


@given(lengths=row_lengths)
def test_best_fit_cuts_no_row_and_none_gives_each_its_own_pack(lengths: list[int]) -> None:
    for packing in ("best_fit", "none"):
        pieces, laid = pieces_of(lengths, section(pack=packing))
        assert sorted(laid.pieces.tolist()) == pieces.tolist()
        assert packing == "best_fit" or len(laid) == len(pieces)


@given(lengths=row_lengths)
def test_concat_is_the_rows_end_to_end_cut_at_every_length(lengths: list[int]) -> None:
    data = section(pack="concat")
    pieces, laid = pieces_of(lengths, data)
    stream = tokens_of(pieces)
    expected = [stream[start : start + 64] for start in range(0, len(stream), 64)]
    got = [tokens_of(laid.pack(number)) for number in range(len(laid))]
    assert sorted(got) == expected


def test_another_random_state_gives_the_packs_in_another_order() -> None:
    lengths = np.random.default_rng(0).integers(1, 65, 300).tolist()
    for packing in PACKINGS:
        data = section(pack=packing)
        laid = [pieces_of(lengths, data, seed)[1] for seed in (0, 1)]
        packs = [[one.pack(n).tolist() for n in range(len(one))] for one in laid]
        assert packs[0] != packs[1]
        assert sorted(packs[0]) == sorted(packs[1])


def test_unpacked_neighbours_are_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 64, 520).tolist()
    _, laid = pieces_of(lengths, section(pack="none"))
    groups = [laid.sizes[start : start + 16].tolist() for start in range(0, 520, 16)]
    spread = [max(group) - min(group) for group in groups]
    assert max(spread) < 6
    assert groups[:-1] != sorted(groups[:-1])


@given(lengths=row_lengths, packing=st.sampled_from(PACKINGS), share=labelled)
def test_a_pack_gives_its_pieces_back(lengths: list[int], packing: str, share: float) -> None:
    """Ids, labels, positions, borders and row numbers, all of them, for any rows."""
    rows = rows_of(lengths, share)
    tokens = WindowTokens.of(rows)
    _, laid = pieces_of(tokens.lengths.tolist(), section(pack=packing))
    row_ids = 7 * np.arange(len(rows))
    packs = tokens.packs(laid, row_ids)
    assert len(packs) == len(laid)
    for number, pack in enumerate(packs):
        pieces = laid.pack(number).tolist()
        assert pack.row_ids.tolist() == [7 * row for row, _, _ in pieces]
        assert pack.cu_seqlens.tolist() == np.cumsum([0, *(b - a for _, a, b in pieces)]).tolist()
        borders = zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True)
        for (row, start, stop), (first, last) in zip(pieces, borders, strict=True):
            whole = rows[row]
            assert whole is not None
            assert pack.input_ids[first:last].tolist() == whole.input_ids[start:stop].tolist()
            assert pack.position_ids[first:last].tolist() == list(range(stop - start))
            expected = whole.labels[start:stop].tolist()
            assert pack.labels[first:last].tolist() == [IGNORE_INDEX, *expected[1:]]
        assert pack.n_targets == count_targets(pack)
        arrays = [pack.input_ids, pack.labels, pack.position_ids, pack.cu_seqlens]
        assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
        assert pack.row_ids.dtype == np.int64


@given(lengths=row_lengths, packing=st.sampled_from(PACKINGS), share=labelled)
def test_what_is_learned_of_a_piece_is_all_its_labels_but_the_first(
    lengths: list[int], packing: str, share: float
) -> None:
    """A piece's first token has nothing before it, so a label there would not count."""
    rows = rows_of(lengths, share)
    tokens = WindowTokens.of(rows)
    _, laid = pieces_of(tokens.lengths.tolist(), section(pack=packing, over_length="split"))
    expected = []
    for row, start, stop in laid.pieces.tolist():
        whole = rows[row]
        assert whole is not None
        expected.append(int((whole.labels[start + 1 : stop] != IGNORE_INDEX).sum()))
    assert tokens.targets(laid.pieces).tolist() == expected
    packs = tokens.packs(laid, np.arange(len(rows)))
    assert sum(count_targets(pack) for pack in packs) == sum(expected)


def test_a_cut_in_an_answer_costs_the_label_behind_it() -> None:
    """128 labelled tokens in packs of 64: the last label of one pack is its own last token's."""
    ids = np.arange(130, dtype=np.int32)
    rows: list[Example | None] = [Example(ids, np.where(ids > 1, ids, IGNORE_INDEX), 130)]
    tokens = WindowTokens.of(rows)
    pieces, laid = pieces_of([130], section(pack="concat"))
    packs = sorted(tokens.packs(laid, np.array([4])), key=lambda pack: int(pack.input_ids[0]))
    assert tokens.targets(pieces).tolist() == [128]
    assert [pack.n_targets for pack in packs] == [62, 63, 1]
    assert packs[1].labels[:2].tolist() == [IGNORE_INDEX, 65]
    assert [pack.position_ids[0] for pack in packs] == [0, 0, 0]
    assert [pack.row_ids.tolist() for pack in packs] == [[4]] * 3


def test_packs_that_are_one_segment_run_through_their_rows() -> None:
    """As the reference's do, with data.compat: positions run on and the first label stays."""
    pack = join_examples([example(4, 10), example(3, 20)], [5, 9], isolated=False)
    assert pack.position_ids.tolist() == list(range(7))
    assert pack.cu_seqlens.tolist() == [0, 7]
    assert pack.row_ids.tolist() == [5, 9]
    assert pack.labels.tolist() == [10, IGNORE_INDEX, 12, IGNORE_INDEX, 20, IGNORE_INDEX, 22]


@given(sizes=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), max_size=5))
def test_packs_of_a_window_are_divided_as_they_were_joined(sizes: list[list[int]]) -> None:
    tokens = np.arange(sum(map(sum, sizes)), dtype=np.int32)
    segments = np.array([size for pack in sizes for size in pack], dtype=np.int32)
    counts = np.array([len(pack) for pack in sizes], dtype=np.int32)
    packs = build_packs(tokens, tokens + 1, segments, counts, np.arange(len(segments)), counts)
    assert [np.diff(pack.cu_seqlens).tolist() for pack in packs] == sizes
    assert [t for pack in packs for t in pack.input_ids.tolist()] == tokens.tolist()
    assert [t for pack in packs for t in pack.labels.tolist()] == (tokens + 1).tolist()
    assert [r for pack in packs for r in pack.row_ids.tolist()] == list(range(len(segments)))


def two_packs() -> list[Pack]:
    return [
        join_examples([example(3, 11), example(3, 20)], [0, 1]),
        join_examples([example(2, 29)], [2]),
    ]


def test_a_batch_is_padded_at_the_right_with_values_that_count_nowhere() -> None:
    batch = collate(two_packs())
    x = IGNORE_INDEX
    assert {key: value.tolist() for key, value in batch.items()} == {
        "input_ids": [[11, 12, 13, 20, 21, 22], [29, 30, 0, 0, 0, 0]],
        "labels": [[x, 12, x, x, x, 22], [x, 30, x, x, x, x]],
        "position_ids": [[0, 1, 2, 0, 1, 2], [0, 1, 0, 0, 0, 0]],
        "segment_ids": [[0, 0, 0, 1, 1, 1], [0, 0, -1, -1, -1, -1]],
    }
    wide = collate(two_packs(), pad_to=8)
    assert {value.shape for value in wide.values()} == {(2, 8)}
    assert all(np.array_equal(wide[key][:, :6], batch[key]) for key in batch)
