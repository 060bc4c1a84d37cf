"""Capped attention of packed rows: each sample's own, against float64 of its definition.

float16 stands for half precision: Triton's interpreter multiplies no bfloat16.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from raytune_ft.kernels.capped_attention import attend_capped, reach_of
from tests.kernels.gradients import Tensor, assert_near, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("way")
LENGTH, CAP, SCALE = 21, 3.0, 0.5
ENDS = [0, 5, 6, 21, 38, 42, 42]
"""Two rows of samples, one of a single token, and an empty one."""


def _qkv(heads: int, keys: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator().manual_seed(heads)
    return [
        (2 * torch.randn(2, LENGTH, n, width, generator=random)).to(dtype).transpose(1, 2)
        for n in (heads, keys, keys)
    ]


def _exact(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attend sample by sample, token by token."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    found = []
    for start, end in pairwise(ENDS):
        for at in range(start, end):
            low = start if window is None else max(start, at - window + 1)
            keys, values = k[low : at + 1], v[low : at + 1]
            scores = CAP * torch.tanh(torch.einsum("hd,nhd->hn", q[at], keys) * SCALE / CAP)
            found.append(torch.einsum("hn,nhd->hd", scores.softmax(-1), values))
    return torch.stack(found).view(2, LENGTH, *found[0].shape)


@pytest.mark.parametrize(
    ("sizes", "window", "dtype"),
    [
        ((4, 2, 12), None, torch.float32),
        ((4, 2, 12), 4, torch.float32),
        ((2, 2, 16), 2, torch.float32),
        ((2, 1, 20), 40, torch.float16),
    ],
)
def test_samples_and_their_gradients(
    sizes: tuple[int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    inputs, bounds = _qkv(*sizes, dtype), torch.tensor(ENDS, dtype=torch.int32)

    got = outputs_and_gradients(
        lambda q, k, v: attend_capped(q, k, v, bounds, scale=SCALE, cap=CAP, window=window),
        inputs,
    )
    exact = outputs_and_gradients(lambda q, k, v: _exact(q, k, v, window), inputs, torch.float64)

    assert got[0].shape == (2, LENGTH, sizes[0], sizes[2]) and got[0].is_contiguous()
    assert_near(got, exact, 2e-5 if dtype is torch.float32 else 3e-2)


def test_reach_of_samples_and_windows() -> None:
    first, last = reach_of(7, torch.tensor([0, 4, 7]), None)
    assert (first.tolist(), last.tolist()) == ([0, 0, 0, 0, 4, 4, 4], [4, 4, 4, 4, 7, 7, 7])
    first, last = reach_of(7, torch.tensor([0, 4, 7]), 2)
    assert (first.tolist(), last.tolist()) == ([0, 0, 1, 2, 4, 4, 5], [2, 3, 4, 4, 6, 7, 7])
