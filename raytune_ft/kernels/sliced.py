"""Linear layers with the LoRA updates of several trials, each on rows of its own.

As `linear.adapted`, but for k trials whose rows lie end to end: a frozen weight is unpacked once
and multiplies all rows; the small products, dropout masks and gradients are each trial's own. Its
masks are those of `adapted` on its rows alone, under the same seed.

Shapes: T = rows of one trial, x (k * T, in), r = rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.kernels import linear
from raytune_ft.kernels.dropout import draw_seed, project, project_backward
from raytune_ft.kernels.fp8 import Rows, quantize_rows
from raytune_ft.kernels.linear import Base, Lora, Plan


def sliced(
    x: Tensor,
    bases: Sequence[Base],
    trials: Sequence[Sequence[Lora | None]],
    seed: Tensor | None = None,
    offset: int = 0,
) -> list[Tensor]:
    """Return what linear layers with several trials' adapters make of one input.

    Args:
        x: (..., in), in the type to compute in; its leading dimension is divided among the trials.
        bases: the layers' frozen weights.
        trials: of each trial the update of each layer; a layer has one in all trials or in none.
        seed: as `adapted` takes it, of all trials.
        offset: as `adapted` takes it.

    Returns:
        (..., out) of each layer, of x's dtype.
    """
    plans = [Plan.of(list(zip(bases, loras, strict=True)), offset) for loras in trials]
    if seed is None and any(run.p for plan in plans for run in plan.runs):
        seed = draw_seed(x.device)
    biases = [base.bias for base in bases]
    tensors: list[Tensor] = []
    for plan in plans:
        tensors += [*(lora.a for lora in plan.loras), *(lora.b for lora in plan.loras)]
    outputs: tuple[Tensor, ...] = _Sliced.apply(plans, x, seed, *biases, *tensors)  # type: ignore[no-untyped-call]
    return list(outputs)


class _Sliced(torch.autograd.Function):
    """See `sliced`; after x and seed come biases of all layers, then each trial's A and B."""

    @staticmethod
    def forward(
        ctx: Any, plans: list[Plan], x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        parts = plans[0].parts
        biases, own = tensors[: len(parts)], _by_trial(plans, tensors[len(parts) :])
        flat = linear.rows_of(x)
        inner = [
            [project(rows, linear.stacked(a, run, x.dtype), run.mask(seed)) for run in plan.runs]
            for plan, rows, (a, _) in zip(plans, flat.chunk(len(plans)), own, strict=True)
        ]
        updates = [
            dict(zip(plan.places, zip(linear.parts_of(plan, known), b, strict=True), strict=True))
            for plan, known, (_, b) in zip(plans, inner, own, strict=True)
        ]
        eighth = quantize_rows(flat) if plans[0].in_fp8 else None
        outputs = [
            _output(flat, eighth, plans, place, bias, [found.get(place) for found in updates])
            for place, bias in enumerate(biases)
        ]
        ctx.plans = plans
        ctx.save_for_backward(x, seed, *tensors[len(parts) :], *(i for one in inner for i in one))
        return tuple(out.view(*x.shape[:-1], -1) for out in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plans: list[Plan] = ctx.plans
        x, seed, *saved = ctx.saved_tensors
        count = sum(2 * len(plan.loras) for plan in plans)
        own, inner = _by_trial(plans, saved[:count]), iter(saved[count:])
        flat = linear.rows_of(x)
        outer = [linear.rows_of(gradient) for gradient in gradients]
        wanted = ctx.needs_input_grad[1]
        bases_first = plans[0].in_fp8 or any(not plan.runs for plan in plans)
        dx = linear.through_bases(plans[0], outer, None) if wanted and bases_first else None
        if wanted and dx is None:
            dx = flat.new_empty(flat.shape)
        k = len(plans)
        pieces = zip(
            plans, own, flat.chunk(k), zip(*(one.chunk(k) for one in outer), strict=True),
            dx.chunk(k) if dx is not None else [None] * k, strict=True,
        )  # fmt: skip
        adapters: list[Tensor] = []
        for plan, (a, b), rows, mine, part in pieces:
            known = [next(inner) for _ in plan.runs]
            of_a, of_b = _of_trial(plan, a, b, rows, list(mine), known, seed, part, bases_first)
            adapters += [g.to(p.dtype) for g, p in zip([*of_a, *of_b], [*a, *b], strict=True)]
        if dx is not None and not bases_first:
            dx = linear.through_bases(plans[0], outer, dx)
        biases = linear.gradients_of_biases(plans[0], outer, ctx.needs_input_grad[3:])
        return None, None if dx is None else dx.view_as(x), None, *biases, *adapters


def _of_trial(
    plan: Plan,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    rows: Tensor,
    outer: list[Tensor],
    known: list[Tensor],
    seed: Tensor | None,
    dx: Tensor | None,
    adds: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the gradients of one trial's A and B; write that of its rows (T, in) to `dx`."""
    of_a: list[Tensor] = []
    of_b: list[Tensor] = []
    for number, (run, inner) in enumerate(zip(plan.runs, known, strict=True)):
        back, gradients_of_b = linear.through_b(plan, run, outer, inner, b)
        of_b += gradients_of_b
        stack, mask = linear.stacked(a, run, rows.dtype), run.mask(seed)
        found = project_backward(rows, stack, back, mask, dx, adds=adds or number > 0)
        of_a += found.unbind()
    return of_a, of_b


def _output(
    x: Tensor,
    eighth: Rows | None,
    plans: Sequence[Plan],
    place: int,
    bias: Tensor | None,
    updates: Sequence[tuple[Tensor, Tensor] | None],
) -> Tensor:
    """Return one layer's output (k * T, out): what `linear.adapted` rounds, in the same order."""
    base = plans[0].parts[place][0]
    own = [
        (*update, lora.scale)
        for update, lora in zip(updates, (plan.parts[place][1] for plan in plans), strict=True)
        if update is not None and lora is not None
    ]
    if base.eighths is not None and eighth is not None:
        out = base.eighths.times(eighth, bias, x.dtype)
        for part, (inner, b, scale) in zip(out.chunk(len(plans)), own, strict=False):
            part.addmm_(inner, b.to(x.dtype).t(), alpha=scale)
        return out
    bias = None if bias is None else bias.to(x.dtype)
    if not own:
        return nn.functional.linear(x, base.matrix(x.dtype), bias)
    out = x.new_empty(len(x), base.shape[0])
    for part, (inner, b, scale) in zip(out.chunk(len(plans)), own, strict=True):
        if bias is None:
            torch.addmm(part, inner, b.to(x.dtype).t(), beta=0, alpha=scale, out=part)
        else:
            torch.addmm(bias, inner, b.to(x.dtype).t(), alpha=scale, out=part)
    return out.addmm_(x, base.matrix(x.dtype).t())


def _by_trial(
    plans: Sequence[Plan], tensors: Sequence[Any]
) -> list[tuple[Sequence[Any], Sequence[Any]]]:
    """Return each trial's A and B, of a list of all trials' tensors."""
    found, start = [], 0
    for plan in plans:
        end = start + 2 * len(plan.loras)
        found.append(linear.halves(tensors[start:end]))
        start = end
    return found
