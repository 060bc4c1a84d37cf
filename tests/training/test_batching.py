"""Steps hold the same packs whatever the number of ranks and however a batch is split."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import TrainSection
from raytune_ft.data.packing import IGNORE_INDEX, Pack, Position
from raytune_ft.training.batching import StepData, count_targets, steps


def pack(number: int, sizes: list[int]) -> Pack:
    n = sum(sizes)
    return Pack(
        input_ids=np.full(n, number, np.int32),
        labels=np.full(n, number, np.int32),
        position_ids=np.concatenate([np.arange(s) for s in sizes]).astype(np.int32),
        cu_seqlens=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        row_ids=np.array([number * 10 + k for k in range(len(sizes))], np.int64),
    )


def epochs(counts: list[int], sizes: list[int]) -> list[tuple[Position, Pack]]:
    """Packs of one window per epoch, numbered through."""
    found = []
    for epoch, count in enumerate(counts):
        for i in range(count):
            behind = Position(epoch, 0, i + 1) if i + 1 < count else Position(epoch + 1, 0, 0)
            found.append((behind, pack(len(found), sizes)))
    return found


def packs_of(step: StepData) -> list[int]:
    ids = [row for batch in step.micro_batches for row in batch["input_ids"]]
    return [int(row[0]) for row, keep in zip(ids, labelled(step), strict=True) if keep]


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
            assert (share.n_targets, share.n_tokens, share.position, share.row_ids) == (
                step.n_targets, step.n_tokens, step.position, step.row_ids,
            )  # fmt: skip
    assert [p for s in whole for p in packs_of(s)] == list(range(len(stream)))
    assert all(s.epoch == s.position.epoch or s.position.pack == 0 for s in whole)


def test_the_first_token_of_a_sample_is_never_predicted() -> None:
    assert count_targets(pack(1, [3, 4])) == 5
