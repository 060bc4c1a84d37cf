"""Linear layers with LoRA: one input in, the outputs of all layers that share it out.

`y_i = x W_i^T + bias_i + scale_i * dropout_i(x) A_i^T B_i^T`, forward and backward in one autograd
node for a whole group (query, key, value; gate, up; a single layer). Kept between the two passes:
x, `dropout(x) A^T` and a seed; frozen weights are unpacked again, masks are computed again.

Shapes: T = all leading dimensions of x together, r = rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from raytune_ft.errors import ModelError
from raytune_ft.kernels.dropout import Mask, draw_seed, product, project, project_backward
from raytune_ft.kernels.fp8 import UNIT, Fp8Weight, Rows, fits, quantize_rows
from raytune_ft.kernels.nf4 import Nf4Weight, dequantize

_scratch: dict[tuple[torch.device, torch.dtype], Tensor] = {}


class Base:
    """The frozen weight of a linear layer, and how it comes: plain, NF4, or unpacked for good."""

    def __init__(self, module: nn.Module) -> None:
        """Take a torch.nn.Linear or a bitsandbytes Linear4bit; nothing of it is copied."""
        self.module = module
        self._resident: Tensor | None = None
        self._packed: tuple[int, object, Nf4Weight] | None = None
        self.eighths: Fp8Weight | None = None
        """Set by `in_fp8`."""

    @property
    def bias(self) -> Tensor | None:
        """(out,), or None."""
        return cast("Tensor | None", self.module.bias)

    @property
    def is_nf4(self) -> bool:
        """Whether the weight is packed."""
        return getattr(self.module.weight, "quant_state", None) is not None

    @property
    def shape(self) -> torch.Size:
        """(out, in)."""
        return self.packed().shape if self.is_nf4 else cast(Tensor, self.module.weight).shape

    def packed(self) -> Nf4Weight:
        """Return the NF4 weight of a module that has one."""
        weight: Any = self.module.weight
        place, absmax = weight.data_ptr(), getattr(weight.quant_state, "absmax", None)
        # moved modules get new tensors: what was read of the old ones no longer counts
        if self._packed is None or self._packed[0] != place or self._packed[1] is not absmax:
            self._packed = place, absmax, Nf4Weight.of(self.module)
        return self._packed[2]

    def resident(self) -> None:
        """Keep the weight unpacked from now on: faster, 2 bytes a weight; never saved."""
        if self.is_nf4:
            self._resident = dequantize(self.packed())

    def streamed(self) -> None:
        """Unpack the weight at each use again."""
        self._resident = None
        if self.eighths is not None:
            self.eighths.kept.clear()

    def in_fp8(self, *, resident: bool = False) -> None:
        """Multiply in float8 from now on: about 1.6 times as fast on a GPU that can, less exact.

        Weights stay as they are stored and are read as they are now.

        Args:
            resident: keep them in float8 too, 2 bytes a weight, instead of making it at each use.

        Raises:
            ModelError: torch multiplies no weight of this shape so.
        """
        if not fits(self.shape):
            out, width = self.shape
            raise ModelError(f"a weight of {out} x {width}: float8 takes multiples of {UNIT}")
        source = self.packed() if self.is_nf4 else cast(Tensor, self.module.weight).detach()
        self.eighths = Fp8Weight.of(source, self.matrix(source.dtype))
        self._resident = None
        if resident:
            self.eighths.keep()

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, (out, in), for use at once.

        An NF4 weight stands in a buffer that all layers of a device share: the next call of any
        of them overwrites it, in the stream's order.
        """
        if self._resident is not None:
            return self._resident.to(dtype)
        if not self.is_nf4:
            return cast(Tensor, self.module.weight).detach().to(dtype)
        packed = self.packed()
        return dequantize(packed, _room(packed)).to(dtype)


@dataclass(frozen=True)
class Lora:
    """A low-rank update `scale * B A` of a linear layer."""

    a: Tensor
    """(r, in)."""
    b: Tensor
    """(out, r)."""
    scale: float
    """What the update is multiplied by."""
    dropout: float = 0.0
    """Probability in [0, 1) on the update's input; 0 while evaluating."""


Part = tuple[Base, Lora | None]


def adapted(
    x: Tensor, parts: Sequence[Part], seed: Tensor | None = None, offset: int = 0
) -> list[Tensor]:
    """Return what linear layers with adapters make of one input.

    Args:
        x: (..., in), in the type to compute in.
        parts: the layers; base weights are frozen, adapters and biases may be trained.
        seed: (1,) int64 on x's device, of the dropout; None draws one from torch's generator of
            that device. Who draws it outside must keep it unchanged until the backward pass.
        offset: of this group among those of one seed: layer i uses the stream `offset + i`.

    Returns:
        (..., out) of each layer, of x's dtype.

    Numbers: products in x's type, sums in float32; adapters of another type are rounded to x's at
    each use, and their gradients are summed in float32.
    """
    plan = Plan.of(parts, offset)
    if seed is None and any(run.p for run in plan.runs):
        seed = draw_seed(x.device)
    biases = [base.bias for base, _ in parts]
    tensors = [*(lora.a for lora in plan.loras), *(lora.b for lora in plan.loras)]
    outputs: tuple[Tensor, ...] = _Adapted.apply(plan, x, seed, *biases, *tensors)  # type: ignore[no-untyped-call]
    return list(outputs)


def reserve(bases: Sequence[Base]) -> None:
    """Make the shared buffers as large as these weights need: before a graph is captured."""
    for base in bases:
        if base.is_nf4:
            _room(base.packed())


def shared_buffers() -> list[Tensor]:
    """Return the shared buffers as they are now; who captures a graph that uses them keeps them."""
    return list(_scratch.values())


@dataclass(frozen=True)
class Run:
    """Neighbouring adapters of one rank and dropout, which go as one."""

    loras: range
    """Which of the plan's."""
    rank: int
    p: float
    stream: int
    """Of the first one's mask."""

    def mask(self, seed: Tensor | None) -> Mask | None:
        """Return what drops some of their input; None where nothing does."""
        return Mask(seed, self.stream, self.p) if self.p and seed is not None else None


@dataclass(frozen=True)
class Plan:
    """Layers on one input, and which of their adapters go as one."""

    parts: tuple[Part, ...]
    loras: tuple[Lora, ...]
    places: tuple[int, ...]
    """Of the layers that have them."""
    runs: tuple[Run, ...]

    @property
    def in_fp8(self) -> bool:
        """Whether some of the layers multiply in float8."""
        return any(base.eighths is not None for base, _ in self.parts)

    @classmethod
    def of(cls, parts: Sequence[Part], offset: int) -> Plan:
        """Plan a group whose first dropout has the stream `offset`."""
        found = [(place, lora) for place, (_, lora) in enumerate(parts) if lora is not None]
        runs: list[Run] = []
        for index, (place, lora) in enumerate(found):
            last = runs[-1] if runs else None
            new = Run(range(index, index + 1), len(lora.a), lora.dropout, offset + place)
            if last is not None and (
                (last.rank, last.p, last.stream + len(last.loras)) == (new.rank, new.p, new.stream)
            ):
                both = range(last.loras.start, new.loras.stop)
                runs[-1] = Run(both, last.rank, last.p, last.stream)
            else:
                runs.append(new)
        places, loras = zip(*found, strict=True) if found else ((), ())
        return cls(tuple(parts), loras, places, tuple(runs))


class _Adapted(torch.autograd.Function):
    """See `adapted`; after x and seed come biases of all layers, then all A, then all B."""

    @staticmethod
    def forward(
        ctx: Any, plan: Plan, x: Tensor, seed: Tensor | None, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        biases, (a, b) = tensors[: len(plan.parts)], halves(tensors[len(plan.parts) :])
        flat = rows_of(x)
        inner = [project(flat, stacked(a, run, x.dtype), run.mask(seed)) for run in plan.runs]
        eighth = quantize_rows(flat) if plan.in_fp8 else None
        updates = dict(zip(plan.places, zip(parts_of(plan, inner), b, strict=True), strict=True))
        outputs = [
            _output(flat, eighth, part, bias, updates.get(place))
            for place, (part, bias) in enumerate(zip(plan.parts, biases, strict=True))
        ]
        ctx.plan = plan
        ctx.save_for_backward(x, seed, *a, *b, *inner)
        return tuple(out.view(*x.shape[:-1], -1) for out in outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        x, seed, *saved = ctx.saved_tensors
        n = len(plan.loras)
        (a, b), inner = halves(saved[: 2 * n]), saved[2 * n :]
        flat, outer = rows_of(x), [rows_of(gradient) for gradient in gradients]
        wanted, bases_first = ctx.needs_input_grad[1], plan.in_fp8 or not plan.runs
        dx = through_bases(plan, outer, None) if wanted and bases_first else None
        if wanted and dx is None:
            dx = flat.new_empty(flat.shape)
        of_a: list[Tensor] = []
        of_b: list[Tensor] = []
        for number, (run, known) in enumerate(zip(plan.runs, inner, strict=True)):
            back, gradients_of_b = through_b(plan, run, outer, known, b)
            of_b += gradients_of_b
            stack = stacked(a, run, x.dtype)
            adds = bases_first or number > 0
            of_a += project_backward(flat, stack, back, run.mask(seed), dx, adds=adds).unbind()
        if dx is not None and not bases_first:
            # the large products read the small ones' sum while they compute
            dx = through_bases(plan, outer, dx)
        adapters = [g.to(p.dtype) for g, p in zip([*of_a, *of_b], [*a, *b], strict=True)]
        biases = gradients_of_biases(plan, outer, ctx.needs_input_grad[3:])
        return None, None if dx is None else dx.view_as(x), None, *biases, *adapters


def _output(
    x: Tensor,
    eighth: Rows | None,
    part: Part,
    bias: Tensor | None,
    update: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Return one layer's output: (T, out).

    Args:
        x: (T, in).
        eighth: the same, for layers in float8.
        part: the layer.
        bias: (out,) or None.
        update: `dropout(x) A^T` (T, r) and B, where the layer has an adapter.
    """
    base, lora = part
    if base.eighths is not None and eighth is not None:
        out = base.eighths.times(eighth, bias, x.dtype)
        if lora is not None and update is not None:
            out.addmm_(update[0], update[1].to(x.dtype).t(), alpha=lora.scale)
        return out
    bias = None if bias is None else bias.to(x.dtype)
    if lora is None or update is None:
        return nn.functional.linear(x, base.matrix(x.dtype), bias)
    # the small product first: the large one reads it while it computes
    inner, b = update[0], update[1].to(x.dtype).t()
    if bias is None:
        out = x.new_empty(len(x), b.shape[1])
        torch.addmm(out, inner, b, beta=0, alpha=lora.scale, out=out)
    else:
        out = torch.addmm(bias, inner, b, alpha=lora.scale)
    return out.addmm_(x, base.matrix(x.dtype).t())


def through_bases(plan: Plan, outer: list[Tensor], total: Tensor | None) -> Tensor:
    """Return the gradient of the input through the frozen weights, (T, in), added to `total`."""
    for (base, _), gradient in zip(plan.parts, outer, strict=True):
        if base.eighths is not None:
            part = base.eighths.back(gradient)
            total = part if total is None else total.add_(part)
        elif total is None:
            total = gradient @ base.matrix(gradient.dtype)
        else:
            total.addmm_(gradient, base.matrix(gradient.dtype))
    return cast(Tensor, total)


def through_b(
    plan: Plan, run: Run, outer: list[Tensor], inner: Tensor, b: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """Return the gradient of what `project` gave for a run of adapters, and those of its B.

    Args:
        plan: of the group.
        run: the adapters.
        outer: gradients of all outputs, (T, out) each.
        inner: what `project` gave, (T, adapters * r).
        b: all B of the group, (out, r) each.
    """
    back, of_b, count = torch.empty_like(inner), [], len(run.loras)
    pieces = zip(run.loras, back.chunk(count, dim=1), inner.chunk(count, dim=1), strict=True)
    for index, part, known in pieces:
        gradient, scale = outer[plan.places[index]], plan.loras[index].scale
        torch.addmm(part, gradient, b[index].to(gradient.dtype), beta=0, alpha=scale, out=part)
        # at once: of 2,048 tokens the gradient is still in the cache
        of_b.append(product(gradient.t(), known).mul_(scale))
    return back, of_b


def gradients_of_biases(
    plan: Plan, outer: list[Tensor], wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradient of each layer's bias that is trained."""
    return [
        gradient.sum(0, dtype=base.bias.dtype) if want and base.bias is not None else None
        for (base, _), gradient, want in zip(plan.parts, outer, wanted, strict=False)
    ]


def parts_of(plan: Plan, inner: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield `dropout(x) A^T` of each adapter, (T, r), out of what runs of them gave."""
    for run, together in zip(plan.runs, inner, strict=True):
        yield from together.chunk(len(run.loras), dim=1)


def stacked(a: Sequence[Tensor], run: Run, dtype: torch.dtype) -> Tensor:
    """Return the A of a run of adapters as one, (adapters, r, in)."""
    if len(run.loras) == 1:
        return a[run.loras.start].to(dtype).unsqueeze(0)
    return torch.stack([a[index].to(dtype) for index in run.loras])


def halves(tensors: Sequence[Any]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Return all A and all B of a group's tensors."""
    middle = len(tensors) // 2
    return tensors[:middle], tensors[middle:]


def rows_of(x: Tensor) -> Tensor:
    """Return (T, features) with neighbouring columns, as kernels want it."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _room(weight: Nf4Weight) -> Tensor:
    """Return the shared buffer's part for a weight: (out, in), uninitialised."""
    key = (weight.packed.device, weight.dtype)
    needed, buffer = weight.shape.numel(), _scratch.get(key)
    if buffer is None or buffer.numel() < needed:
        buffer = _scratch[key] = torch.empty(needed, dtype=weight.dtype, device=key[0])
    return buffer[:needed].view(weight.shape)
