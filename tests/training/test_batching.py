"""Steps hold the same packs whatever the number of ranks and however a batch is split."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import TrainSection
from raytune_ft.data.packing import IGNORE_INDEX, Pack, Position, collate
from raytune_ft.data.places import Placed
from raytune_ft.data.report import new_report
from raytune_ft.model.loss import Attention, predicted
from raytune_ft.training.batching import (
    StepData,
    TensorBatch,
    count_targets,
    empty_batch,
    steps,
    to_tensors,
)


def pack(number: int, sizes: list[int]) -> Pack:
    n = sum(sizes)
    return Pack(
        input_ids=np.full(n, number, np.int32),
        labels=np.full(n, number, np.int32),
        position_ids=np.concatenate([np.arange(s) for s in sizes]).astype(np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        row_ids=np.array([number * 10 + k for k in range(len(sizes))], np.int64),
    )


def epochs(counts: list[int], sizes: list[int]) -> list[Placed]:
    """Packs of one window per epoch, numbered through; each tells of one row."""
    found: list[Placed] = []
    for epoch, count in enumerate(counts):
        for i in range(count):
            behind = Position(epoch, 0, i + 1) if i + 1 < count else Position(epoch + 1, 0, 0)
            done = epoch + (i + 1) / count
            found.append(Placed(pack(len(found), sizes), behind, done, new_report(1)))
    return found


def packs_of(step: StepData) -> list[int]:
    ids = [row for batch in step.micro_batches for row in batch["input_ids"]]
    return [int(row[0]) for row, keep in zip(ids, labelled(step), strict=True) if keep]


def without_batches(step: StepData) -> dict[str, object]:
    own = ("micro_batches", "remade")
    return {key: value for key, value in vars(step).items() if key not in own}


def labelled(step: StepData) -> list[bool]:
    rows = [row for batch in step.micro_batches for row in batch["labels"]]
    return [bool((row != IGNORE_INDEX).any()) for row in rows]


@given(
    counts=st.lists(st.integers(1, 13), min_size=1, max_size=3),
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=3),
    micro=st.integers(1, 3),
    accumulation=st.integers(1, 3),
    workers=st.integers(1, 4),
)
def test_ranks_share_one_sequence(
    counts: list[int], sizes: list[int], micro: int, accumulation: int, workers: int
) -> None:
    train = TrainSection(micro_batch_size=micro, accumulation=accumulation)
    stream = epochs(counts, sizes)
    ranks = [list(steps(stream, train, rank=r, workers=workers)) for r in range(workers)]
    whole = list(
        steps(stream, TrainSection(micro_batch_size=micro * accumulation * workers, accumulation=1),
              rank=0, workers=1)
    )  # fmt: skip
    assert [len(r) for r in ranks] == [len(whole)] * workers
    for number, step in enumerate(whole):
        shares = [r[number] for r in ranks]
        assert sorted(p for s in shares for p in packs_of(s)) == sorted(packs_of(step))
        for share in shares:
            assert len(share.micro_batches) == accumulation
            assert without_batches(share) == without_batches(step)
    assert [p for s in whole for p in packs_of(s)] == list(range(len(stream)))
    squares = sum(int(n) ** 2 for one in stream for n in np.diff(one.pack.cu_seqlens))
    assert sum(s.n_pairs for s in whole) == squares
    assert all(s.epoch == s.position.epoch or s.position.pack == 0 for s in whole)
    assert sum(s.n_packs for s in whole) == sum(s.report["rows"] for s in whole) == len(stream)
    assert [s.progress for s in whole if s.ends_epoch] == list(range(1, len(counts) + 1))


def test_the_first_token_of_a_sample_is_never_predicted() -> None:
    assert count_targets(pack(1, [3, 4])) == 5


def bounds(batch: TensorBatch) -> tuple[list[int], int]:
    assert batch["cu_seqlens"].dtype == torch.int32
    return batch["cu_seqlens"].tolist(), int(batch["max_seqlen"])


def test_bounds_of_segments_are_those_of_the_tokens_end_to_end() -> None:
    """Two packs of 5 and 9 tokens: the first row's padding is a segment of its own."""
    batch = to_tensors(collate([pack(1, [2, 3]), pack(2, [4, 1, 4])]))
    assert bounds(batch) == ([0, 2, 5, 9, 13, 14, 18], 4)
    assert bounds(to_tensors(collate([pack(1, [3]), pack(2, [3])]))) == ([0, 3, 6], 3)
    assert bounds(to_tensors(collate([pack(1, [7, 2])]))) == ([0, 7, 9], 7)


def test_places_are_those_whose_next_token_is_predicted() -> None:
    for sizes in ([[2, 3], [4, 1, 4]], [[7, 2]], [[1, 1], [1]]):
        batch = to_tensors(collate([pack(n, some) for n, some in enumerate(sizes)]))
        keep = predicted(batch["labels"], batch["segment_ids"])
        width = batch["labels"].shape[1]
        expected = [row * width + place for row, place in keep.nonzero().tolist()]
        assert batch["places"].tolist() == expected
    assert empty_batch()["places"].tolist() == []


def test_bounds_of_padded_rows() -> None:
    """`pack: none`: one row a pack, of differing lengths."""
    batch = to_tensors(collate([pack(n, [size]) for n, size in enumerate((2, 5, 3))]))
    assert bounds(batch) == ([0, 2, 5, 10, 13, 15], 5)
    assert bounds(empty_batch()) == ([0, 2], 2)


@given(
    packs=st.lists(
        st.lists(st.integers(1, 6), min_size=1, max_size=4).map(lambda sizes: pack(3, sizes)),
        min_size=1, max_size=4,
    )
)  # fmt: skip
def test_bounds_divide_tokens_as_segment_ids_do(packs: list[Pack]) -> None:
    batch = to_tensors(collate(packs))
    segments = batch["segment_ids"]
    rows = torch.arange(len(segments)).unsqueeze(1).expand_as(segments)
    labels = (rows * 1000 + segments).flatten().tolist()
    ends, longest = bounds(batch)
    parts = [labels[a:b] for a, b in itertools.pairwise(ends)]
    assert all(len(set(part)) == 1 for part in parts)
    assert all(a[0] != b[0] for a, b in itertools.pairwise(parts))
    assert list(itertools.chain(*parts)) == labels
    assert longest == max(map(len, parts))


class Config:
    """What `Attention` reads of a model's configuration."""

    model_type = "llama"
    _attn_implementation = "sdpa"

    def __init__(self, sliding_window: int | None = None) -> None:
        self.sliding_window = sliding_window


def drawn(mask: torch.Tensor) -> list[list[str]]:
    return [["".join("x" if seen else "." for seen in line) for line in row[0]] for row in mask]


def test_the_mask_of_three_rows_is_exactly_this() -> None:
    """Rows of 2, 5 and 3 tokens, each padded to 5. Padding sees only padding: never a token."""
    batch = to_tensors(collate([pack(n, [size]) for n, size in enumerate((2, 5, 3))]))
    mask = Attention(Config()).mask(batch["segment_ids"], batch["cu_seqlens"], batch["max_seqlen"])
    assert isinstance(mask, torch.Tensor)
    assert drawn(mask) == [
        ["x....", "xx...", "..x..", "..xx.", "..xxx"],
        ["x....", "xx...", "xxx..", "xxxx.", "xxxxx"],
        ["x....", "xx...", "xxx..", "...x.", "...xx"],
    ]


def test_the_mask_of_a_pack_of_two_rows_is_exactly_this() -> None:
    batch = to_tensors(collate([pack(1, [2, 3]), pack(2, [4])]))
    mask = Attention(Config()).mask(batch["segment_ids"], batch["cu_seqlens"], batch["max_seqlen"])
    assert isinstance(mask, torch.Tensor)
    assert drawn(mask) == [
        ["x....", "xx...", "..x..", "..xx.", "..xxx"],
        ["x....", "xx...", "xxx..", "xxxx.", "....x"],
    ]


@given(
    packs=st.lists(
        st.lists(st.integers(1, 6), min_size=1, max_size=4).map(lambda sizes: pack(3, sizes)),
        min_size=1, max_size=3,
    ),
    window=st.none() | st.integers(1, 8),
)  # fmt: skip
def test_bounds_change_no_mask(packs: list[Pack], window: int | None) -> None:
    batch = to_tensors(collate(packs))
    attention = Attention(Config(window))
    by_look = attention.mask(batch["segment_ids"])
    by_bounds = attention.mask(batch["segment_ids"], batch["cu_seqlens"], batch["max_seqlen"])
    if by_look is None:
        assert by_bounds is None
    else:
        assert isinstance(by_look, torch.Tensor) and isinstance(by_bounds, torch.Tensor)
        assert torch.equal(by_look, by_bounds)


def test_a_pad_id_that_is_a_word_hides_nothing() -> None:
    """The mask is made of lengths: ids that equal the padding's, 0, or the end's, are seen."""
    ended = pack(0, [4])  # all four ids are 0, as the padding's
    batch = to_tensors(collate([ended, pack(1, [6])]))
    mask = Attention(Config()).mask(batch["segment_ids"])
    assert isinstance(mask, torch.Tensor)
    assert drawn(mask)[0] == ["x.....", "xx....", "xxx...", "xxxx..", "....x.", "....xx"]
    assert batch["input_ids"][0].tolist() == [0] * 6
