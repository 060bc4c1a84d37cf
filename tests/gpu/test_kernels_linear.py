"""NF4, adapters' dropout and groups of linear layers as a GPU computes them, at shapes of a 7B.

Weights are bitsandbytes' own bit for bit, masks are those of the plain form, products are as near
to exact ones as PEFT's. Nothing waits for the device, and a CUDA graph replays each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from raytune_ft.kernels.dropout import Mask, draw_seed, kept, project, project_backward
from raytune_ft.kernels.linear import Base, Lora, Part, adapted, reserve
from raytune_ft.kernels.nf4 import Nf4Weight, dequantize
from tests.kernels.gradients import Tensor, outputs_and_gradients, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda", 0)
BF16 = torch.bfloat16
HIDDEN, MLP, TOKENS = 4096, 11008, 2048
PLACE = 2**-8
"""Of bfloat16, half of a last place."""


def _random(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    random = torch.Generator(device=DEVICE).manual_seed(seed)
    return torch.randn(shape, generator=random, device=DEVICE).to(dtype)


@contextmanager
def _no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _nf4(out: int, width: int, dtype: torch.dtype = BF16, double_quant: bool = True) -> Linear4bit:
    layer = Linear4bit(width, out, bias=False, quant_type="nf4", compute_dtype=dtype)
    weight = (_random(out, width, seed=out) * 0.02).to(dtype).cpu()
    layer.weight = Params4bit(
        weight, quant_type="nf4", compress_statistics=double_quant, module=layer
    )
    return layer.to(DEVICE)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(HIDDEN, HIDDEN), (MLP, HIDDEN), (HIDDEN, MLP), (129, 70), (7, 13), (5, 2600)]
)
def test_weights_are_bitsandbytes_own(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool
) -> None:
    layer = _nf4(*shape, dtype, double_quant)
    exact = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    weight = Nf4Weight.of(layer)
    dequantize(weight)

    with _no_waiting():
        got = dequantize(weight)

    assert torch.equal(got, exact.view(shape))


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("shape", [(300, HIDDEN), (65, 200), (2048, 72)])
def test_masks_are_those_of_the_plain_form(shape: tuple[int, int], p: float) -> None:
    """Adapters that copy columns show the mask, each element exactly."""
    x = _random(*shape).abs() + 1
    mask = Mask(draw_seed(DEVICE), 5, p)
    copies = torch.zeros(3, 64, shape[1], device=DEVICE, dtype=BF16)
    for index, start in enumerate((0, 8, shape[1] - 64)):
        copies[index, torch.arange(64), torch.arange(start, start + 64)] = 1

    got = project(x, copies, mask)

    for index, start in enumerate((0, 8, shape[1] - 64)):
        whole = (x.float() * kept(mask, index, *shape)) * mask.growth
        exact = whole.to(BF16)[:, start : start + 64]
        assert torch.equal(got[:, 64 * index : 64 * index + 64], exact)


@pytest.mark.parametrize(
    ("tokens", "width", "n", "rank"),
    [
        (TOKENS, HIDDEN, 3, 64),
        (4 * TOKENS, HIDDEN, 2, 64),
        (TOKENS, MLP, 1, 64),
        (777, 1000, 2, 8),
        (100, 136, 4, 20),
        (513, 520, 2, 256),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_dropout_and_its_gradients(
    dtype: torch.dtype, tokens: int, width: int, n: int, rank: int
) -> None:
    x, before = _random(tokens, width, dtype=dtype), _random(tokens, width, dtype=dtype, seed=1)
    a = (_random(n, rank, width, seed=2) / width**0.5).to(dtype)
    gradient = _random(tokens, n * rank, dtype=dtype, seed=3)
    mask = Mask(draw_seed(DEVICE), 9, 0.1)
    project_backward(x, a, gradient, mask, before.clone()), project(x, a, mask)
    into = before.clone()
    with _no_waiting():
        got = project(x, a, mask)
        of_a = project_backward(x, a, gradient, mask, into)

    wide, right = x.double(), before.double()
    tolerance = 2 * PLACE if dtype == BF16 else 5e-6
    # tensor cores cut off what they add to float32 sums
    of_sums = 1e-4 if dtype == BF16 else 1e-5
    for index in range(n):
        mine = kept(mask, index, tokens, width) * mask.growth
        part = gradient[:, index * rank : (index + 1) * rank].double()
        exact = (wide * mine) @ a[index].double().t()
        assert relative_error(got[:, index * rank : (index + 1) * rank], exact) < tolerance
        assert relative_error(of_a[index], part.t() @ (wide * mine)) < of_sums
        right += (part @ a[index].double()) * mine
    # what several launches add is rounded by each of them
    launches = 1 if n < 4 and rank <= 64 else n
    assert relative_error(into, right) < tolerance * launches
    into = torch.full_like(before, torch.nan)
    project_backward(x, a, gradient, mask, into, adds=False)
    assert relative_error(into, right - before.double()) < tolerance * launches


class _Group(nn.Module):
    def __init__(self, width: int, outs: Sequence[int]) -> None:
        super().__init__()
        for index, out in enumerate(outs):
            setattr(self, f"layer{index}", _nf4(out, width))


def _layers(width: int, outs: Sequence[int], dropout: float = 0.0) -> list[Any]:
    torch.manual_seed(0)
    config = LoraConfig(
        r=64, lora_alpha=16, lora_dropout=dropout, init_lora_weights=False,
        target_modules=r"layer\d",
    )  # fmt: skip
    group: Any = get_peft_model(_Group(width, outs), config).base_model.model  # type: ignore[arg-type]
    return [getattr(group, f"layer{index}") for index in range(len(outs))]


def _weights(layers: Sequence[Any]) -> list[Tensor]:
    a = [layer.lora_A["default"].weight for layer in layers]
    return a + [layer.lora_B["default"].weight for layer in layers]


def _parts(layers: Sequence[Any], weights: Sequence[Tensor], p: float) -> list[Part]:
    n = len(layers)
    return [
        (Base(layer.base_layer), Lora(a, b, layer.scaling["default"], p))
        for layer, a, b in zip(layers, weights[:n], weights[n:], strict=True)
    ]


GROUPS = {"qkv": (HIDDEN, (HIDDEN,) * 3), "up": (HIDDEN, (MLP,) * 2), "down": (MLP, (HIDDEN,))}


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("group", GROUPS)
def test_groups_against_exact_products(group: str, p: float) -> None:
    """Values, and gradients of the input and all adapters, of bfloat16 inputs.

    Without dropout PEFT's own errors are the measure.
    """
    width, outs = GROUPS[group]
    layers = _layers(width, outs)
    bases = [dequantize(Nf4Weight.of(layer.base_layer)).clone() for layer in layers]
    leaves, n, seed = [_random(512, width), *_weights(layers)], len(outs), draw_seed(DEVICE)

    def exact(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for index, (base, a, b) in enumerate(zip(bases, weights[:n], weights[n:], strict=True)):
            mask = Mask(seed, 20 + index, p)
            dropped = x * (kept(mask, 0, *x.shape) * mask.growth)
            outputs.append(x @ base.t().to(x.dtype) + 0.25 * (dropped @ a.t()) @ b.t())
        return tuple(outputs)

    def ours(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return tuple(adapted(x, _parts(layers, weights, p), seed, 20))

    got = outputs_and_gradients(ours, leaves)
    right = outputs_and_gradients(exact, leaves, torch.float64)
    errors = [relative_error(mine, other) for mine, other in zip(got, right, strict=True)]
    # the input's gradient is a sum of products, rounded after each
    assert max(errors) < 4 * PLACE, errors
    cosines = [
        float(nn.functional.cosine_similarity(mine.double().flatten(), other.flatten(), dim=0))
        for mine, other in zip(got, right, strict=True)
    ]
    assert min(cosines) > 0.9999, cosines


def test_groups_are_as_near_to_exact_as_pefts() -> None:
    width, outs = HIDDEN, (HIDDEN,) * 3
    layers = _layers(width, outs)
    x = _random(256, width)
    bases = [dequantize(Nf4Weight.of(layer.base_layer)).double() for layer in layers]
    weights = _weights(layers)
    ours = adapted(x, _parts(layers, weights, 0.0))
    for index, layer in enumerate(layers):
        a, b = weights[index].double(), weights[index + 3].double()
        exact = x.double() @ bases[index].t() + 0.25 * (x.double() @ a.t()) @ b.t()
        mine, other = relative_error(ours[index], exact), relative_error(layer(x), exact)
        assert mine <= 1.5 * other


def _gradients(parts: Sequence[Part], x: Tensor, run: Any) -> list[Tensor]:
    torch.manual_seed(5)
    outputs = run(x) + run(x)
    leaves = [x, *(w for _, lora in parts if lora for w in (lora.a, lora.b))]
    loss = sum(y.float().square().mean() for y in outputs)
    return [*outputs, *torch.autograd.grad(loss, leaves)]  # type: ignore[arg-type]


def test_recomputed_layers_see_the_same_masks() -> None:
    layers = _layers(HIDDEN, (HIDDEN,) * 2)
    parts = _parts(layers, _weights(layers), 0.1)
    x = _random(300, HIDDEN).requires_grad_()

    once = _gradients(parts, x, lambda x: adapted(x, parts))
    again = _gradients(parts, x, lambda x: checkpoint(adapted, x, parts, use_reentrant=False))

    for one, two in zip(once, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(once[0], once[2])


def test_a_graph_replays_a_step_with_new_masks_each_time() -> None:
    layers = _layers(HIDDEN, (HIDDEN,) * 3)
    parts = _parts(layers, _weights(layers), 0.1)
    x, leaves = _random(TOKENS, HIDDEN).requires_grad_(), _weights(layers)
    pulls = [_random(TOKENS, HIDDEN, seed=index) for index in range(3)]
    reserve([base for base, _ in parts])

    def step(seed: Tensor | None = None) -> list[Tensor]:
        outputs = adapted(x, parts, seed)
        return [*outputs, *torch.autograd.grad(outputs, [x, *leaves], pulls)]

    fixed, side = draw_seed(DEVICE), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(fixed)
    torch.cuda.current_stream().wait_stream(side)
    drawn, given = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(drawn):
        of_drawn = step()
    with torch.cuda.graph(given):
        of_given = step(fixed)

    drawn.replay()
    first = of_drawn[0].clone()
    drawn.replay()
    assert not torch.equal(first, of_drawn[0])
    fixed.fill_(77)
    given.replay()
    for got, eager in zip(of_given, step(torch.tensor([77], device=DEVICE)), strict=True):
        assert torch.equal(got, eager)


def test_a_step_waits_for_nothing() -> None:
    layers = _layers(HIDDEN, (HIDDEN, MLP))
    parts = _parts(layers, _weights(layers), 0.1)
    x = _random(256, HIDDEN).requires_grad_()
    for waiting in (True, False):  # the first time kernels are compiled
        context = _no_waiting() if not waiting else torch.enable_grad()
        with context:
            sum(y.float().mean() for y in adapted(x, parts)).backward()  # type: ignore[union-attr]
    assert x.grad is not None
    assert x.grad.isfinite().all()
