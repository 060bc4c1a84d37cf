"""Capped attention as a GPU computes it: Gemma 2's shapes, against float64 and transformers' eager.

    python -m pytest tests/gpu/test_kernels_capped.py -s -q

prints times and memory beside the eager way. About a minute on an H100, most of it compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from raytune_ft.kernels.capped_attention import (
    attend_capped,
    reach_of,
    reference_attend_capped,
)
from tests.kernels.gradients import (
    Tensor,
    assert_near,
    outputs_and_gradients,
    relative_error,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CAP = 50.0
DOCUMENTS = {"one to a row": [0, 384, 768], "few": [0, 100, 384, 385, 640, 768, 768]}


def _qkv(heads: int, keys: int, width: int, length: int, dtype: torch.dtype) -> list[Tensor]:
    random = torch.Generator(device="cuda").manual_seed(heads)
    return [
        (3 * torch.randn(2, length, n, width, generator=random, device="cuda"))
        .to(dtype)
        .transpose(1, 2)
        for n in (heads, keys, keys)
    ]


def _bounds(ends: list[int]) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("sizes", [(8, 4, 256), (4, 2, 128), (3, 1, 80)])
def test_samples_and_their_gradients(
    sizes: tuple[int, int, int], documents: str, window: int | None, dtype: torch.dtype
) -> None:
    """No further from float64 than the eager way by more than a fifth."""
    inputs, bounds = _qkv(*sizes, 384, dtype), _bounds(DOCUMENTS[documents])
    told: Any = {"scale": sizes[2] ** -0.5, "cap": CAP, "window": window}

    def way(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: attend(q, k, v, bounds, **told)

    got = outputs_and_gradients(way(attend_capped), inputs)
    exact = outputs_and_gradients(way(reference_attend_capped), inputs, torch.float64)
    assert_near(got, exact, 5e-5 if dtype is torch.float32 else 2e-2)
    if dtype is torch.bfloat16:
        eager = outputs_and_gradients(way(reference_attend_capped), inputs)
        for mine, other, right in zip(got, eager, exact, strict=True):
            assert relative_error(mine, right) <= 1.2 * relative_error(other, right) + 2**-9


def test_samples_know_nothing_of_each_other() -> None:
    """Other numbers in one document leave outputs and gradients of all others bit-equal."""
    bounds, inputs = _bounds(DOCUMENTS["few"]), _qkv(8, 4, 256, 384, torch.bfloat16)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[0, :, 100:384] = 7.0
    first, second = (
        outputs_and_gradients(
            lambda q, k, v: attend_capped(q, k, v, bounds, scale=0.06, cap=CAP), some
        )
        for some in (inputs, changed)
    )
    for one, other in zip(
        [first[0].transpose(1, 2), *first[1:]], [second[0].transpose(1, 2), *second[1:]],
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one[0, :, :100], other[0, :, :100])
        assert torch.equal(one[1], other[1])
        assert not torch.equal(one[0, :, 100:384], other[0, :, 100:384])


@pytest.mark.parametrize("window", [None, 1024])
def test_what_a_layer_takes(window: int | None) -> None:
    """Prints; no time is asserted, and the kernels take less memory than written scores."""
    bounds = _bounds([0, 700, 2048, 2100, 4096])
    leaves = [x.detach().requires_grad_() for x in _qkv(16, 8, 256, 2048, torch.bfloat16)]
    reach = reach_of(4096, bounds, window)
    told: Any = {"scale": 0.0625, "cap": CAP, "window": window}
    ways: dict[str, Callable[[], Tensor]] = {
        "kernels": lambda: attend_capped(*leaves, bounds, reach=reach, **told),
        "eager": lambda: reference_attend_capped(*leaves, bounds, **told),
    }
    peaks = {}
    for name, way in ways.items():
        _step(way, leaves)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            _step(way, leaves)
        end.record()
        torch.cuda.synchronize()
        peaks[name] = torch.cuda.max_memory_allocated() - before
        ms = begin.elapsed_time(end) / 10
        print(f"{name}, window {window}: {ms:.2f} ms, {peaks[name] / 2**20:.0f} MiB")
    assert peaks["kernels"] < peaks["eager"]


def _step(way: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    found = way()
    torch.autograd.grad(found, leaves, torch.ones_like(found))
