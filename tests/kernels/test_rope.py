"""Rotary positions against transformers' own functions in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3

from raytune_ft.kernels.rope import rope
from tests.kernels.gradients import Tensor, assert_near, outputs_and_gradients

pytestmark = pytest.mark.usefixtures("way")
Rotation = Callable[..., tuple[Tensor, Tensor]]


def _heads(
    rows: int, heads: int, length: int, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(rows, heads, length, width, generator=random).to(dtype)


def _angles(rows: int, length: int, rotated: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(7)
    half = torch.rand(rows, length, rotated // 2, generator=random) * 30
    both = torch.cat((half, half), -1)
    return both.cos() * scale, both.sin() * scale


CASES = {
    "half": (llama, 2, (3, 1), 12, 12, False),
    "all heads": (llama, 1, (2, 2), 10, 10, False),
    "partial": (phi3, 2, (4, 2), 14, 6, False),
    "interleaved": (glm, 2, (3, 3), 12, 12, True),
    "interleaved, partial": (glm, 2, (4, 1), 14, 6, True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("one_row_of_angles", [False, True])
def test_equals_transformers_in_both_directions(case: str, one_row_of_angles: bool) -> None:
    theirs, rows, heads, width, rotated, interleaved = CASES[case]
    inputs = [_heads(rows, count, 5, width, seed) for seed, count in enumerate(heads)]
    # a scale as some long-context rotations have it: rotating back is still the gradient
    cos, sin = _angles(1 if one_row_of_angles else rows, 5, rotated, scale=1.2)

    def ours(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return rope(q, k, cos, sin, interleaved=interleaved)

    def exact(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return theirs(q, k, cos.double(), sin.double())

    got = outputs_and_gradients(ours, inputs)
    assert_near(got, outputs_and_gradients(exact, inputs, torch.float64), 1e-6, case)


def test_bfloat16_stays_within_its_last_place() -> None:
    q, k = (_heads(2, heads, 5, 8, heads, torch.bfloat16) for heads in (2, 1))
    cos, sin = (x.to(torch.bfloat16) for x in _angles(2, 5, 8))

    got = rope(q, k, cos, sin)
    exact = llama(q.double(), k.double(), cos.double(), sin.double())

    assert [x.dtype for x in got] == [torch.bfloat16] * 2
    assert_near(got, exact, 2**-7)


def test_slices_of_a_fused_projection_are_read_where_they_lie() -> None:
    rows, length, width = 2, 5, 8
    fused = torch.randn(rows, length, 4 * width, generator=torch.Generator().manual_seed(0))
    cos, sin = _angles(rows, length, width)

    def parts(fused: Tensor) -> tuple[Tensor, Tensor]:
        q, k = fused.split([3 * width, width], -1)
        return tuple(x.view(rows, length, -1, width).transpose(1, 2) for x in (q, k))

    got = outputs_and_gradients(lambda x: rope(*parts(x), cos, sin), [fused])
    exact = outputs_and_gradients(
        lambda x: llama(*parts(x), cos.double(), sin.double()), [fused], torch.float64
    )

    assert_near(got, exact, 1e-6)


def test_inputs_stay_as_they_are() -> None:
    q, k = (_heads(1, 2, 3, 4, seed) for seed in range(2))
    before = q.clone(), k.clone()

    rope(q, k, *_angles(1, 3, 4))

    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
