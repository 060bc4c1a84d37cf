"""Groups of linear layers with adapters, against float64, finite differences and PEFT's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from raytune_ft.kernels.dropout import Mask, kept
from raytune_ft.kernels.linear import Base, Lora, Part, adapted, reserve
from raytune_ft.model.nf4 import dequantized, mend_cpu_layers
from tests.kernels.gradients import Tensor, outputs_and_gradients, relative_error

WIDTH, OUTS = 40, (24, 16, 8)
SEED = torch.tensor([0x1234567890ABC])


class _Group(nn.Module):
    """Layers on one input."""

    def __init__(self, bias: bool, dtype: torch.dtype, quantized: bool) -> None:
        super().__init__()
        for index, out in enumerate(OUTS):
            layer: nn.Module = nn.Linear(WIDTH, out, bias=bias, dtype=dtype)
            if quantized:
                packed = Linear4bit(WIDTH, out, bias=bias, quant_type="nf4", compute_dtype=dtype)
                packed.load_state_dict(layer.state_dict())
                layer = packed.to(dtype).to("cpu")
            setattr(self, f"layer{index}", layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f"layer{index}")(x) for index in range(len(OUTS)))


def _peft(*, bias: bool, dtype: torch.dtype, quantized: bool, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    group = _Group(bias, dtype, quantized)
    mend_cpu_layers(group)
    config = LoraConfig(
        r=4, lora_alpha=6, lora_dropout=dropout, init_lora_weights=False, target_modules=r".*\d"
    )
    return get_peft_model(group, config).base_model.model  # type: ignore[arg-type]


def _layers(group: Any) -> list[Any]:
    return [getattr(group, f"layer{index}") for index in range(len(OUTS))]


def _trained(group: Any) -> list[Tensor]:
    weights = [layer.lora_A["default"].weight for layer in _layers(group)]
    return weights + [layer.lora_B["default"].weight for layer in _layers(group)]


def _ours(group: Any, x: Tensor, weights: Sequence[Tensor], dropout: float = 0.0) -> list[Tensor]:
    layers, n = _layers(group), len(OUTS)
    parts: list[Part] = [
        (Base(layer.base_layer), Lora(a, b, layer.scaling["default"], dropout))
        for layer, a, b in zip(layers, weights[:n], weights[n:], strict=True)
    ]
    return adapted(x, parts)


def _theirs(group: Any, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
    names = [n for n, p in group.named_parameters() if p.requires_grad]
    ordered = [n for n in names if "lora_A" in n] + [n for n in names if "lora_B" in n]
    return torch.func.functional_call(group, dict(zip(ordered, weights, strict=True)), (x,))  # type: ignore[no-any-return]


def _input(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_values_and_gradients_are_pefts(quantized: bool, bias: bool) -> None:
    """In float32: other orders of addition, nothing else."""
    group = _peft(bias=bias, dtype=torch.float32, quantized=quantized)
    leaves = [_input(2, 7, WIDTH, dtype=torch.float32), *_trained(group)]

    ours = outputs_and_gradients(lambda x, *w: tuple(_ours(group, x, w)), leaves)
    theirs = outputs_and_gradients(lambda x, *w: _theirs(group, x, w), leaves)

    assert len(ours) == len(theirs) == 3 + 1 + 6
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_as_near_to_exact_as_pefts() -> None:
    """PEFT multiplies in float32 and rounds the sum; here factors are rounded, sums are not.

    Both end in bfloat16, so a last place is what they can differ by; gradients of float32 adapters
    stay float32.
    """
    group = _peft(bias=True, dtype=torch.bfloat16, quantized=True)
    leaves = [_input(3, 50, WIDTH, dtype=torch.bfloat16), *(w.float() for w in _trained(group))]
    wide = _peft(bias=True, dtype=torch.float64, quantized=False)
    for layer, packed in zip(_layers(wide), _layers(group), strict=True):
        weight = packed.base_layer.weight
        layer.base_layer.weight.data = dequantized(weight.data, weight.quant_state).double()
        layer.base_layer.bias.data = packed.base_layer.bias.data.double()

    ours = outputs_and_gradients(lambda x, *w: tuple(_ours(group, x, w)), leaves)
    theirs = outputs_and_gradients(lambda x, *w: _theirs(group, x, w), leaves)
    exact = outputs_and_gradients(lambda x, *w: _theirs(wide, x, w), leaves, torch.float64)

    assert [one.dtype for one in ours] == [one.dtype for one in theirs]
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        assert relative_error(mine, right) < max(2**-7, 1.5 * relative_error(other, right))


def _stand_ins(ranks: Sequence[int | None], ps: Sequence[float], bias: bool = True) -> list[Part]:
    """Layers in float64, with and without adapters."""
    torch.manual_seed(3)
    parts: list[Part] = []
    for rank, p, out in zip(ranks, ps, (7, 5, 9, 4), strict=True):
        base = nn.Linear(13, out, bias=bias, dtype=torch.float64).requires_grad_(False)
        lora = None
        if rank is not None:
            a, b = (torch.randn(s, dtype=torch.float64) for s in ((rank, 13), (out, rank)))
            lora = Lora(a.requires_grad_(), b.requires_grad_(), 0.3, p)
        parts.append((Base(base), lora))
    return parts


def _formula(x: Tensor, parts: Sequence[Part], seed: Tensor, offset: int) -> list[Tensor]:
    outputs = []
    for place, (base, lora) in enumerate(parts):
        y = base.module(x)
        if lora is not None:
            mask = Mask(seed, offset + place, lora.dropout)
            rows = x.flatten(0, -2)
            dropped = (rows * kept(mask, 0, *rows.shape) * mask.growth).view_as(x)
            y = y + lora.scale * (dropped @ lora.a.t()) @ lora.b.t()
        outputs.append(y)
    return outputs


@pytest.mark.parametrize(
    ("ranks", "ps"),
    [
        ((3, 3, 3, 3), (0.25,) * 4),
        ((3, None, 3, 3), (0.25,) * 4),
        ((3, 2, 2, None), (0.25, 0.25, 0.5, 0.0)),
        ((None, None, 1, 2), (0.0, 0.0, 0.0, 0.5)),
    ],
)
def test_every_group_is_the_formula(ranks: tuple[int | None, ...], ps: tuple[float, ...]) -> None:
    """Each layer has the mask of its place, the same forward, backward and in differences."""
    parts = _stand_ins(ranks, ps)
    weights = [w for _, lora in parts if lora for w in (lora.a, lora.b)]
    x = torch.randn(2, 3, 13, dtype=torch.float64, requires_grad=True)

    exact = _formula(x, parts, SEED, 5)
    for got, right in zip(adapted(x, parts, SEED, 5), exact, strict=True):
        torch.testing.assert_close(got, right)

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        given = iter(weights)
        again = [
            (base, lora and replace(lora, a=next(given), b=next(given))) for base, lora in parts
        ]
        return tuple(adapted(x, again, SEED, 5))

    assert torch.autograd.gradcheck(run, (x, *weights), fast_mode=True)


def test_by_triton_it_is_the_same(interpreter: None) -> None:
    group = _peft(bias=True, dtype=torch.float32, quantized=True)
    leaves = [_input(3, 30, WIDTH, dtype=torch.float32), *_trained(group)]

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(4)
        return tuple(_ours(group, x, weights, dropout=0.3))

    found = outputs_and_gradients(run, leaves)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET")
        plain = outputs_and_gradients(run, leaves)

    for mine, other in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def test_dropout_acts_on_the_updates_input_alone_and_is_pefts_in_distribution() -> None:
    """An update that copies its input shows what was dropped of it, and what was grown."""
    base = nn.Linear(64, 64, bias=False).requires_grad_(False)
    copies = [(Base(base), Lora(torch.eye(64), torch.eye(64), 1.0, 0.1)) for _ in range(2)]
    x = torch.rand(1000, 64) + 1

    updates = [(y - base(x)) / x for y in adapted(x, copies)]

    dropped = [update.abs() < 1e-3 for update in updates]
    for update, gone in zip(updates, dropped, strict=True):
        assert abs(float(gone.float().mean()) - 0.1) < 5 * (0.09 / 64000) ** 0.5
        torch.testing.assert_close(
            update[~gone], torch.full_like(update[~gone], 1 / 0.9), rtol=1e-4, atol=0
        )
    both = float((dropped[0] & dropped[1]).float().mean())
    assert abs(both - 0.01) < 5 * (0.0099 / 64000) ** 0.5


def _step(parts: Sequence[Part], x: Tensor, run: Callable[..., Any]) -> list[Tensor]:
    torch.manual_seed(11)
    outputs = run(x) + run(x)
    sum(y.square().sum() for y in outputs).backward()
    weights = [w for _, lora in parts if lora for w in (lora.a, lora.b)]
    gradients = [w.grad for w in (x, *weights)]
    for weight in (x, *weights):
        weight.grad = None
    return [*outputs, *gradients]  # type: ignore[list-item]


def test_recomputed_layers_see_the_same_masks() -> None:
    """torch.utils.checkpoint, as models are recomputed; seeds come from torch's generator."""
    parts = _stand_ins((3, 3, None, 2), (0.5, 0.5, 0.0, 0.25))
    x = torch.randn(6, 13, dtype=torch.float64, requires_grad=True)

    once = _step(parts, x, lambda x: adapted(x, parts))
    again = _step(parts, x, lambda x: checkpoint(adapted, x, parts, use_reentrant=False))

    for one, two in zip(once, again, strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(once[0], once[4])  # each call has masks of its own


def test_unpacked_for_good_is_the_same_and_can_be_undone() -> None:
    group = _peft(bias=False, dtype=torch.bfloat16, quantized=True)
    bases = [Base(layer.base_layer) for layer in _layers(group)]
    streamed = [base.matrix(torch.bfloat16).clone() for base in bases]
    for base in bases:
        base.resident()
    assert all(map(torch.equal, streamed, (base.matrix(torch.bfloat16) for base in bases)))
    places = {base.matrix(torch.bfloat16).data_ptr() for base in bases}
    assert len(places) == len(bases)
    for base in bases:
        base.streamed()
    reserve(bases)
    assert len({base.matrix(torch.bfloat16).data_ptr() for base in bases}) == 1
    assert [base.shape for base in bases] == [(out, WIDTH) for out in OUTS]


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_put_in_later_count(in_place: bool) -> None:
    """A module that is moved gets new tensors, in a new parameter or in its old one."""
    first, second = (_layers(_Group(False, torch.float32, True))[0] for _ in range(2))
    base = Base(first)
    before = base.matrix(torch.float32).clone()
    if in_place:
        first.weight.data = second.weight.data
        vars(first.weight.quant_state).update(vars(second.weight.quant_state))
    else:
        first.weight = second.weight
    assert torch.equal(base.matrix(torch.float32), Base(second).matrix(torch.float32).clone())
    assert not torch.equal(base.matrix(torch.float32), before)


def test_a_trained_bias_and_an_input_in_any_order() -> None:
    parts = _stand_ins((2, None, None, 2), (0.0,) * 4)
    bias = parts[1][0].bias
    assert bias is not None
    bias.requires_grad_()
    x = torch.randn(13, 5, dtype=torch.float64).t()

    y = adapted(x, parts)
    y[1].square().sum().backward()

    torch.testing.assert_close(bias.grad, 2 * y[1].detach().sum(0))
    for got, right in zip(y, _formula(x, parts, SEED, 0), strict=True):
        torch.testing.assert_close(got, right)
