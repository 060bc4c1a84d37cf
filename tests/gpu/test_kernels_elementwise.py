"""Norm, rotation, gate, loss and packed attention as a GPU computes them.

Against float64 of the same numbers, and against transformers' modules: never less exact. Nothing
waits for the device, and a CUDA graph replays each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb as phi3

from raytune_ft.kernels.attention import attend, mask_of, needs_mask, reference_attend
from raytune_ft.kernels.cross_entropy import capped, losses_and_gradient, write_hidden_gradient
from raytune_ft.kernels.layer_norm import add_layer_norm
from raytune_ft.kernels.norm import add_rms_norm, rms_norm
from raytune_ft.kernels.rope import rope
from raytune_ft.kernels.swiglu import fused_swiglu, swiglu
from raytune_ft.model.loss import head_losses
from tests.kernels.gradients import (
    Tensor,
    assert_near,
    outputs_and_gradients,
    relative_error,
    root_mean_square,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EPS = 1e-5
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCES)


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    random = torch.Generator(device="cuda").manual_seed(seed)
    return torch.randn(shape, generator=random, device="cuda").to(dtype)


def _normed(x: Tensor, weight: Tensor, offset: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * (weight + offset)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the device inside raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_as_exact(
    ours: Callable[..., Any],
    theirs: Callable[..., Any],
    exact: Callable[..., Any],
    inputs: list[Tensor],
    dtype: torch.dtype,
) -> None:
    """Hold ours against float64, and its error against that of transformers."""
    got = outputs_and_gradients(ours, inputs)
    right = outputs_and_gradients(exact, inputs, torch.float64)
    assert_near(got, right, TOLERANCES[dtype])
    for mine, other, wanted in zip(got, outputs_and_gradients(theirs, inputs), right, strict=True):
        assert mine.dtype == other.dtype
        # Triton's exponential is a few last places of float32 off, which no bfloat16 shows
        if dtype is torch.bfloat16:
            assert root_mean_square(mine, wanted) <= 1.02 * root_mean_square(other, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("module", [LlamaRMSNorm, Gemma2RMSNorm])
@pytest.mark.parametrize("shape", [(3, 7, 4096), (2, 5, 9, 128), (1031, 896), (5, 12288)])
def test_norm(shape: tuple[int, ...], module: Any, dtype: torch.dtype) -> None:
    inputs = [_random(*shape, dtype=dtype), _random(shape[-1], dtype=dtype, seed=1)]
    norm, offset = module(shape[-1], eps=EPS), float(module is Gemma2RMSNorm)

    assert_as_exact(
        lambda x, w: rms_norm(x, w, EPS, offset=offset),
        lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)),
        lambda x, w: _normed(x, w, offset),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_sum_and_norm(dtype: torch.dtype) -> None:
    inputs = [_random(3, 65, 1536, dtype=dtype, seed=seed) for seed in range(2)]
    inputs.append(_random(1536, dtype=dtype, seed=2))

    def theirs(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        norm = LlamaRMSNorm(1536, eps=EPS)
        return torch.func.functional_call(norm, {"weight": weight}, (total,)), total

    assert_as_exact(
        lambda x, r, w: add_rms_norm(x, r, w, EPS),
        theirs,
        lambda x, r, w: (_normed(x + r, w, 0.0), x + r),
        inputs,
        dtype,
    )
    assert torch.equal(add_rms_norm(*inputs, EPS)[1], inputs[0] + inputs[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 65, 6144), (1031, 768), (7, 100)])
def test_sum_and_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs = [_random(*shape, dtype=dtype, seed=seed) for seed in range(2)]
    inputs += [_random(shape[-1], dtype=dtype, seed=seed) for seed in (2, 3)]

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return nn.functional.layer_norm(total, weight.shape, weight, bias, EPS), total

    assert_as_exact(
        lambda x, r, w, b: add_layer_norm(x, r, w, b, EPS), theirs, theirs, inputs, dtype
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("theirs", [phi3, glm])
@pytest.mark.parametrize("sizes", [(32, 8, 128, 128), (3, 1, 80, 32), (16, 2, 128, 64)])
def test_rotation(sizes: tuple[int, ...], theirs: Any, dtype: torch.dtype) -> None:
    heads, keys, width, rotated = sizes
    inputs = [_random(2, 77, n, width, dtype=dtype, seed=n).transpose(1, 2) for n in (heads, keys)]
    half = torch.arange(77, device="cuda").unsqueeze(1) / 10000 ** (
        torch.arange(0, rotated, 2, device="cuda") / rotated
    )
    both = torch.cat((half, half), -1).expand(2, -1, -1)
    cos, sin = both.cos().to(dtype), both.sin().to(dtype)

    assert_as_exact(
        lambda q, k: rope(q, k, cos, sin, interleaved=theirs is glm),
        lambda q, k: theirs(q, k, cos, sin),
        lambda q, k: theirs(q, k, cos.double(), sin.double()),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("fused", [False, True])
def test_gate(fused: bool, activation: Any, dtype: torch.dtype) -> None:
    inputs = [_random(3, 33, 11008, dtype=dtype, seed=seed) for seed in range(2)]

    def plain(gate: Tensor, up: Tensor) -> Tensor:
        if activation == "silu":
            return nn.functional.silu(gate) * up
        return nn.functional.gelu(gate, approximate="tanh") * up

    def ours(gate: Tensor, up: Tensor) -> Tensor:
        if fused:
            return fused_swiglu(torch.cat((gate, up), -1), activation=activation)
        return swiglu(gate, up, activation=activation)

    assert_as_exact(ours, plain, plain, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [None, 30.0])
@pytest.mark.parametrize("words", [32000, 103168, 151937])
def test_loss_and_gradient_in_place(words: int, cap: float | None, dtype: torch.dtype) -> None:
    logits = 4 * _random(37, words, dtype=dtype)
    targets = torch.randint(0, words, (37,), device="cuda")
    targets[0], targets[1] = 0, words - 1
    wide = logits.double().requires_grad_()
    exact = nn.functional.cross_entropy(capped(wide, cap), targets, reduction="none")
    gradient = torch.autograd.grad(exact.sum(), wide)[0]

    with no_waiting():
        losses = losses_and_gradient(logits, targets, cap)

    assert_near([losses], [exact], 2e-6)
    assert_near([logits], [gradient], 4e-6 if dtype is torch.float32 else 2**-8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_frozen_head(dtype: torch.dtype) -> None:
    head = nn.Linear(512, 32003, bias=False, device="cuda", dtype=dtype).requires_grad_(False)
    hidden, targets = _random(2500, 512, dtype=dtype), torch.arange(2500, device="cuda")

    def losses(fused: bool) -> Callable[[Tensor], Tensor]:
        return lambda x: head_losses(head, x, targets, fused=fused)

    def exact(x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(x @ head.weight.double().T, targets, reduction="none")

    got, plain = (outputs_and_gradients(losses(fused), [hidden]) for fused in (True, False))
    right = outputs_and_gradients(exact, [hidden], torch.float64)
    for mine, other, wanted in zip(got, plain, right, strict=True):
        assert relative_error(mine, wanted) <= (1e-5 if dtype is torch.float32 else 2e-2)
        if dtype is torch.bfloat16:
            assert root_mean_square(mine, wanted) <= 1.1 * root_mean_square(other, wanted)


@pytest.mark.parametrize("rows", [452, 512, 1024, 2048])
def test_gradient_of_hidden_states_is_rounded_once(rows: int) -> None:
    """Prints the error of each way to sum over words, in roundings of the exact product.

    Ways of cuBLAS that sum parts in bfloat16 come to 1.4 and more; ours to 1.
    """
    weight, hidden = _random(32003, 512) * 0.026, _random(rows, 512)
    logits, targets = hidden @ weight.T, torch.arange(rows, device="cuda")
    losses_and_gradient(logits, targets)
    exact = logits.double() @ weight.double()
    once = root_mean_square(exact.bfloat16(), exact)
    ours = torch.empty_like(hidden)
    write_hidden_gradient(logits, weight, ours)

    found = {"ours": ours, "bfloat16 parts allowed": logits @ weight}
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        found["float32 parts"] = logits @ weight
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
    errors = {name: root_mean_square(one, exact) / once for name, one in found.items()}
    print(f"head's product, {rows} rows, in roundings: {errors}")
    assert errors["ours"] <= 1.01


DOCUMENTS = {
    "one to a row": [0, 384, 768],
    "few": [0, 100, 384, 385, 640, 768],
    "many": [*range(0, 384, 32), 384, *range(391, 768, 29), 768],
    "with empty ones behind": [0, 100, 384, 768, 768, 768, 768],
}
SIZES = [(32, 32, 128), (8, 2, 64), (4, 1, 80), (4, 4, 256), (6, 6, 36)]


def _qkv(heads: int, keys: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    # in memory as projections leave them, token by token
    return [
        _random(2, 384, n, width, dtype=dtype, seed=seed).transpose(1, 2)
        for seed, n in enumerate((heads, keys, keys))
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("sizes", SIZES)
def test_packed_samples_are_as_each_alone(
    sizes: tuple[int, int, int], documents: str, window: int | None, dtype: torch.dtype
) -> None:
    inputs, ends = _qkv(*sizes, dtype), DOCUMENTS[documents]
    bounds = torch.tensor(ends, dtype=torch.int32, device="cuda")
    longest, scale = max(b - a for a, b in pairwise(ends)), sizes[2] ** -0.5
    mask = mask_of(2, 384, bounds, torch.float64, window=window)

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference_attend(q, k, v, mask, scale=scale)

    got = outputs_and_gradients(
        lambda q, k, v: attend(q, k, v, bounds, longest, scale=scale, window=window), inputs
    )
    # float32 products may be TF32's, and half precision rounds scores and weights in between
    tolerance = 2e-3 if dtype is torch.float32 else 2e-2
    assert_near(got, outputs_and_gradients(exact, inputs, torch.float64), tolerance)
    if dtype is torch.bfloat16 and sizes[2] != 36:
        assert not needs_mask(inputs[0], bounds, longest, window=window)


@pytest.mark.parametrize("documents", ["one to a row", "few"])
def test_weights_of_keys_drop_at_their_rate(documents: str) -> None:
    """Values of 1 give each query the sum of its weights: 1 on average, other draws each time.

    The same state of the generator gives the same numbers, so layers can be computed again.
    """
    ends = DOCUMENTS[documents]
    bounds = torch.tensor(ends, dtype=torch.int32, device="cuda")
    q, k, v = _qkv(8, 1, 64, torch.bfloat16)
    v = torch.ones_like(v)

    def sums() -> Tensor:
        return attend(q, k, v, bounds, 384, scale=0.1, dropout=0.25).float()

    torch.manual_seed(1)
    first, second = sums(), sums()
    torch.manual_seed(1)
    assert torch.equal(sums(), first)
    assert not torch.equal(first, second)
    assert abs(float(first.mean()) - 1) < 0.02


def test_samples_know_nothing_of_each_other() -> None:
    """Other numbers in one document leave outputs and gradients of all others bit-equal."""
    ends = DOCUMENTS["few"]
    bounds = torch.tensor(ends, dtype=torch.int32, device="cuda")
    inputs = _qkv(8, 2, 64, torch.bfloat16)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[0, :, 100:384] = 7.0

    first, second = (
        outputs_and_gradients(lambda q, k, v: attend(q, k, v, bounds, 284, scale=0.1), some)
        for some in (inputs, changed)
    )

    for one, other in zip(
        [first[0].transpose(1, 2), *first[1:]], [second[0].transpose(1, 2), *second[1:]],
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one[0, :, :100], other[0, :, :100])
        # queries' gradients are summed in no fixed order
        assert relative_error(one[1], other[1]) < 1e-2
        assert not torch.equal(one[0, :, 100:384], other[0, :, 100:384])


def _step(x: Tensor, bounds: Tensor) -> Callable[[], list[Tensor]]:
    weight = _random(512, seed=3).requires_grad_()
    angle = torch.rand(1, 384, 32, device="cuda")
    cos, sin = (torch.cat((y, y), -1) for y in (angle.cos(), angle.sin()))

    def step() -> list[Tensor]:
        normed, total = add_rms_norm(x, x, weight, EPS)
        heads = normed.view(2, 384, 8, 64).transpose(1, 2)
        q, k = rope(heads, heads[:, :2], cos, sin)
        seen = attend(q, k, heads[:, :2], bounds, 384, scale=0.125).reshape(2, 384, 512)
        y = swiglu(seen, total)
        return [y, *torch.autograd.grad(y, (x, weight), torch.ones_like(y))]

    return step


@pytest.mark.parametrize("documents", DOCUMENTS)
def test_all_of_them_run_without_waiting_and_in_a_graph(documents: str) -> None:
    bounds = torch.tensor(DOCUMENTS[documents], dtype=torch.int32, device="cuda")
    x = _random(2, 384, 512).requires_grad_()
    step = _step(x, bounds)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    with no_waiting():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()

    with torch.no_grad():
        x.copy_(_random(2, 384, 512, seed=9))
    graph.replay()

    assert_near(captured, [y.double() for y in step()], 1e-2)
