"""Packs in the loss: under compat a pack is one row of the reference's, without its id-0 defect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.packing import Pack, collate
from raytune_ft.model.loss import TokenLoss, predicted
from raytune_ft.training.batching import count_targets, to_tensors
from tests.data.conftest import join_examples


def example(ids: list[int], trained: list[bool]) -> Example:
    input_ids = np.array(ids, np.int32)
    labels = np.where(np.array(trained), input_ids, IGNORE_INDEX).astype(np.int32)
    return Example(input_ids, labels, len(ids))


def examples() -> list[Example]:
    """Three stretches of conversations; the second is cut in an answer, so it begins trained."""
    random = np.random.default_rng(2)
    sizes = ((9, 4), (6, 0), (12, 5))
    return [
        example(random.integers(2, 200, size).tolist(), [at >= first for at in range(size)])
        for size, first in sizes
    ]


def packed(*, isolated: bool) -> Pack:
    return join_examples(examples(), range(3), isolated=isolated)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def loss_of(model: Any, packs: list[Pack]) -> tuple[float, int]:
    with torch.no_grad():
        total, count = TokenLoss(model)(**to_tensors(collate(packs)))
    return float(total), int(count)


def test_one_segment_gives_the_loss_of_the_whole_row_as_transformers_counts_it(model: Any) -> None:
    """The reference hands ids and labels alone to the model: shifted over the whole row."""
    pack = packed(isolated=False)
    ids, labels = (
        torch.from_numpy(a.astype(np.int64))[None] for a in (pack.input_ids, pack.labels)
    )
    with torch.no_grad():
        mean = float(model(input_ids=ids, labels=labels).loss)
    positions = (labels[0, 1:] != IGNORE_INDEX).nonzero().flatten().tolist()
    kept = predicted(labels, torch.zeros_like(ids))[0].nonzero().flatten().tolist()
    assert kept == positions
    total, count = loss_of(model, [pack])
    assert count == len(positions) == count_targets(pack) == 5 + 6 + 7
    assert total / count == pytest.approx(mean, rel=1e-6)


def test_isolated_segments_give_the_losses_of_the_samples_apart(model: Any) -> None:
    """The label at the second segment's start has nothing before it, so it does not count."""
    pack = packed(isolated=True)
    apart = [loss_of(model, [join_examples([one], [0])]) for one in examples()]
    total, count = loss_of(model, [pack])
    assert count == sum(n for _, n in apart) == count_targets(pack) == 5 + 5 + 7
    assert total == pytest.approx(sum(loss for loss, _ in apart), rel=1e-6)
    assert total != pytest.approx(loss_of(model, [packed(isolated=False)])[0], rel=1e-3)


@pytest.mark.parametrize("isolated", [True, False])
def test_a_real_token_0_is_seen_and_padding_is_not(model: Any, isolated: bool) -> None:
    """The reference derives its mask from `ids != 0`, and so hides real tokens; ours does not."""
    ids = [5, 0, 7, 8, 0, 9, 11, 12]
    zero = join_examples([example(ids, [False] * 4 + [True] * 4)], [0], isolated=isolated)
    other = join_examples(
        [example([id_ or 3 for id_ in ids], [False] * 4 + [True] * 4)], [0], isolated=isolated
    )
    other.labels[4] = 0  # the same targets, so that only what is seen differs
    assert loss_of(model, [zero])[1] == 4
    assert loss_of(model, [zero])[0] != pytest.approx(loss_of(model, [other])[0], rel=1e-4)

    long = join_examples([example(list(range(20, 40)), [False] * 20)], [1])
    batch = collate([zero, long])
    assert batch["segment_ids"][0].tolist() == [0] * 8 + [-1] * 12
    assert loss_of(model, [zero, long])[0] == pytest.approx(loss_of(model, [zero])[0], rel=1e-6)
