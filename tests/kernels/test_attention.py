"""Attention of packed rows: each sample as if it were alone, by every way that the CPU has."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from raytune_ft.kernels import attention
from raytune_ft.kernels.attention import attend, mask_of, needs_mask
from raytune_ft.model.families.alibi import biased_mask, slopes
from tests.kernels.gradients import Tensor, assert_near, outputs_and_gradients

ROWS, LENGTH, WIDTH = 2, 11, 6
BOUNDS = [0, 1, 5, 11, 18, 22]
"""Row by row: 1, 4 and 6 tokens; 7 and 4."""
HEADS = {"as many": (3, 3), "groups": (4, 2), "one key head": (3, 1)}


def _inputs(heads: tuple[int, int], width: int = WIDTH) -> list[Tensor]:
    random = torch.Generator().manual_seed(sum(heads))
    queries, keys = heads
    return [torch.randn(ROWS, n, LENGTH, width, generator=random) for n in (queries, keys, keys)]


def _bounds(*ends: int) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32)


def _alone(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, steep: Tensor | None = None
) -> Tensor:
    """Attend segment by segment and head by head, as the formula says."""
    ends = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    groups = q.shape[1] // k.shape[1]
    found = torch.zeros_like(ends[0])
    for start, stop in pairwise(BOUNDS):
        for head in range(q.shape[1]):
            a, b, c = ends[0][start:stop, head], *(x[start:stop, head // groups] for x in ends[1:])
            steps = torch.arange(stop - start)
            distance = steps.unsqueeze(1) - steps
            scores = a @ b.T * 0.4
            if steep is not None:
                scores = scores - steep[head] * distance
            far = distance >= (window or LENGTH)
            weights = scores.masked_fill((distance < 0) | far, -torch.inf).softmax(-1)
            found[start:stop, head] = weights @ c
    return found.view(ROWS, LENGTH, *found.shape[1:])


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("window", [None, 2, 4, 100])
def test_packed_samples_are_as_each_alone(heads: str, window: int | None) -> None:
    inputs = _inputs(HEADS[heads])

    got = outputs_and_gradients(
        lambda q, k, v: attend(q, k, v, _bounds(*BOUNDS), 7, scale=0.4, window=window), inputs
    )
    exact = outputs_and_gradients(
        lambda q, k, v: _alone(q, k, v, window=window), inputs, torch.float64
    )

    assert_near(got, exact, 2e-6)


@pytest.mark.parametrize("heads", [3, 12])
def test_linear_biases(heads: int) -> None:
    inputs = _inputs((heads, heads))
    steep = torch.tensor(slopes(heads))

    got = outputs_and_gradients(
        lambda q, k, v: attend(q, k, v, _bounds(*BOUNDS), 7, scale=0.4, alibi_slopes=steep), inputs
    )
    exact = outputs_and_gradients(
        lambda q, k, v: _alone(q, k, v, steep=steep.double()), inputs, torch.float64
    )

    assert_near(got, exact, 2e-6)


def test_biases_are_those_of_the_network_of_that_family() -> None:
    numbers = torch.bucketize(torch.arange(ROWS * LENGTH), torch.tensor(BOUNDS[1:]), right=True)
    segments = numbers.view(ROWS, 1, LENGTH)
    allowed = (segments.unsqueeze(3) == segments.unsqueeze(2)) & torch.ones(
        LENGTH, LENGTH, dtype=torch.bool
    ).tril()
    theirs = biased_mask(allowed, 5, LENGTH, LENGTH, torch.zeros(1))

    mine = mask_of(
        ROWS, LENGTH, _bounds(*BOUNDS), torch.float32, alibi_slopes=torch.tensor(slopes(5))
    )

    seen = allowed.expand_as(mine)
    assert torch.equal(mine[seen], theirs[seen])
    assert (mine[~seen] == -torch.inf).all()


def test_empty_segments_at_the_end_change_nothing() -> None:
    inputs = _inputs((2, 2))
    few, many = _bounds(*BOUNDS), _bounds(*BOUNDS, 22, 22, 22)

    found = [attend(*inputs, bounds, 7, scale=0.4) for bounds in (few, many)]

    assert torch.equal(*found)


@pytest.mark.parametrize("heads", HEADS)
def test_whole_rows_need_no_mask_and_give_the_same(heads: str) -> None:
    inputs, bounds = _inputs(HEADS[heads]), _bounds(0, LENGTH, 2 * LENGTH)
    mask = mask_of(ROWS, LENGTH, bounds, torch.float64)

    got = outputs_and_gradients(lambda q, k, v: attend(q, k, v, bounds, LENGTH, scale=0.4), inputs)
    exact = outputs_and_gradients(
        lambda q, k, v: attention.reference_attend(q, k, v, mask, scale=0.4), inputs, torch.float64
    )

    assert not needs_mask(inputs[0], bounds, LENGTH)
    assert needs_mask(inputs[0], bounds, LENGTH, window=3)
    assert_near(got, exact, 2e-6)


def test_a_mask_made_once_serves_as_well_as_one_made_anew() -> None:
    inputs, bounds = _inputs((4, 2)), _bounds(*BOUNDS)
    mask = mask_of(ROWS, LENGTH, bounds, torch.float32, window=2)

    once = attend(*inputs, bounds, 7, scale=0.4, window=2, mask=mask)

    assert torch.equal(once, attend(*inputs, bounds, 7, scale=0.4, window=2))
    assert mask.stride(-2) % 16 == 0  # torch would copy it in every layer


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_flash_attention_is_called_as_torch_declares_it(dropout: float) -> None:
    """Shapes and arguments only: its kernels run on a GPU, see tests/gpu."""
    q, k, v = (
        torch.randn(ROWS, n, LENGTH, 16, device="meta", dtype=torch.bfloat16, requires_grad=True)
        for n in (4, 2, 2)
    )
    bounds = torch.zeros(6, dtype=torch.int32, device="meta")

    found = attention._by_bounds(q, k, v, bounds, 7, 0.4, 3, dropout)
    gradients = torch.autograd.grad(found.sum(), (q, k, v))

    assert found.shape == (ROWS, LENGTH, 4, 16)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]
