"""What linear layers with adapters take, beside bitsandbytes, PEFT and plain products.

Question: how far are unpacking, adapters' dropout and whole groups of layers from what the chip
allows, at 2048 and 8192 tokens? Shapes of InternLM-7B, rank 64.

    python -m benchmarks.kernel_limits             # under a minute on an H200
    python -m benchmarks.kernel_limits --sweep     # and other layouts of the two dropout kernels
    python -m benchmarks.kernel_limits --tiny      # a rehearsal, also without a GPU

Prints JSON lines. `ms` is of all 32 layers with launches, `gpu_ms` the same replayed from a CUDA
graph, `ideal_ms` the bytes that must move by the copy bandwidth measured first, or, for whole
groups, the bare products with frozen weights, forward and back to the input.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, get_peft_model
from torch import nn

from benchmarks.kernel_limits_elementwise import DEVICE, ON_GPU, graphed, milliseconds, say
from raytune_ft.kernels import dropout
from raytune_ft.kernels.dropout import Mask
from raytune_ft.kernels.linear import Base, Lora, adapted, reserve
from raytune_ft.kernels.nf4 import Nf4Weight, dequantize

Tensor = torch.Tensor
BF16 = torch.bfloat16
LAYERS = 32
FP8 = not ON_GPU or torch.cuda.get_device_capability() >= (8, 9)


@dataclass(frozen=True)
class Shape:
    """Sizes of a network and of micro-batches."""

    hidden: int = 4096
    mlp: int = 11008
    rank: int = 64
    tokens: tuple[int, ...] = (2048, 8192)
    repeats: int = 10

    def groups(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Return input width and output widths of the layers that share an input."""
        hidden, mlp = self.hidden, self.mlp
        return {
            "qkv": (hidden, (hidden,) * 3), "o": (hidden, (hidden,)),
            "gate_up": (hidden, (mlp,) * 2), "down": (mlp, (hidden,)),
        }  # fmt: skip


TINY = Shape(hidden=64, mlp=96, rank=4, tokens=(16, 32), repeats=2)


class Group(nn.Module):
    """NF4 layers on one input."""

    def __init__(self, width: int, outs: Sequence[int]) -> None:
        super().__init__()
        for index, out in enumerate(outs):
            layer = Linear4bit(
                width, out, bias=False, quant_type="nf4", compute_dtype=BF16
            ).to(BF16)  # fmt: skip
            setattr(self, f"layer{index}", layer.to(DEVICE))


def with_adapters(width: int, outs: Sequence[int], rank: int, p: float) -> list[Any]:
    """Return PEFT's layers."""
    config = LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=p, init_lora_weights=False, target_modules=r"layer\d"
    )
    group: Any = get_peft_model(Group(width, outs), config).base_model.model  # type: ignore[arg-type]
    return [getattr(group, f"layer{index}") for index in range(len(outs))]


def copy_bandwidth(tiny: bool) -> float:
    """Return bytes a millisecond, read and written."""
    source = torch.empty(1 << (16 if tiny else 29), dtype=BF16, device=DEVICE)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), 5)
    rate = 2 * source.numel() * 2 / ms
    say("copy", gb_s=rate / 1e6)
    return rate


def unpacking(shape: Shape, rate: float) -> None:
    """All linear layers once; four decoder layers' worth of weights, so that caches do not help."""
    layers = [
        getattr(Group(width, outs), f"layer{index}")
        for _ in range(4)
        for width, outs in shape.groups().values()
        for index in range(len(outs))
    ]
    weights = [Nf4Weight.of(layer) for layer in layers]
    reserve([Base(layer) for layer in layers])
    room = max(weight.shape.numel() for weight in weights)
    buffer = torch.empty(room, dtype=BF16, device=DEVICE)

    def ours() -> None:
        for weight in weights:
            dequantize(weight, buffer[: weight.shape.numel()].view(weight.shape))

    def theirs() -> None:
        for layer in layers:
            dequantize_4bit(layer.weight.data, layer.weight.quant_state)

    moved = sum(w.shape.numel() * 2 + w.packed.numel() + w.absmax.numel() for w in weights)
    times = LAYERS / 4
    for name, call in (("ours", ours), ("bitsandbytes", theirs)):
        say(
            "unpack", way=name, ms=times * milliseconds(call, shape.repeats),
            gpu_ms=times * milliseconds(graphed(call), shape.repeats) if name == "ours" else None,
            ideal_ms=times * moved / rate,
        )  # fmt: skip


def dropouts(shape: Shape, tokens: int, rate: float, sweep: bool) -> None:
    """The two kernels of adapters' dropout, and torch's own way."""
    for name, (width, outs) in shape.groups().items():
        case = Case.of(tokens, width, len(outs), shape.rank)
        read = case.x.numel() * 2 / rate * LAYERS
        for part, reads, call in (
            ("dropout_a", 1, case.forward),
            ("dropout_a_torch", 1, case.forward_by_torch),
            ("dropout_a_back", 2, case.backward),
            ("dropout_a_back_added", 3, case.backward_added),
            ("products_a_back", 2, case.backward_without_dropout),
        ):
            ms = LAYERS * milliseconds(call, shape.repeats)
            gpu_ms = LAYERS * milliseconds(graphed(call), shape.repeats)
            say(part, group=name, tokens=tokens, ms=ms, gpu_ms=gpu_ms, ideal_ms=reads * read)
        if sweep and ON_GPU and tokens == shape.tokens[-1]:
            _sweep(name, case, shape.repeats)


@dataclass(frozen=True)
class Case:
    """What the adapters of a group compute with."""

    x: Tensor
    a: Tensor
    gradient: Tensor
    into: Tensor
    mask: Mask

    @classmethod
    def of(cls, tokens: int, width: int, n: int, rank: int) -> Case:
        sizes = (tokens, width), (n, rank, width), (tokens, n * rank), (tokens, width)
        x, a, gradient, into = (torch.randn(s, device=DEVICE).to(BF16) for s in sizes)
        return cls(x, a, gradient, into, Mask(dropout.draw_seed(x.device), 3, 0.1))

    def forward(self, *tiles: Any) -> Any:
        if tiles:
            from raytune_ft.kernels import dropout_triton

            return dropout_triton.project(self.x, self.a, self.mask, *tiles)
        return dropout.project(self.x, self.a, self.mask)

    def forward_by_torch(self) -> Any:
        return [nn.functional.dropout(self.x, 0.1) @ one.t() for one in self.a]

    def backward(self, *tiles: Any) -> Any:
        given = self.x, self.a, self.gradient, self.mask, self.into
        if tiles:
            from raytune_ft.kernels import dropout_triton

            return dropout_triton.project_backward(*given, *tiles, adds=False)
        return dropout.project_backward(*given, adds=False)

    def backward_added(self) -> Any:
        return dropout.project_backward(self.x, self.a, self.gradient, self.mask, self.into)

    def backward_without_dropout(self) -> Any:
        torch.mm(self.gradient, self.a.flatten(0, 1), out=self.into)
        return dropout.product(self.gradient.t(), self.x)


LAYOUTS = {
    "a": (
        (64, 64, 4, 3, 4), (64, 64, 4, 2, 4), (64, 64, 4, 3, 8), (128, 64, 4, 3, 4),
        (128, 64, 8, 3, 2), (64, 128, 4, 3, 4), (32, 128, 4, 3, 4), (64, 32, 4, 4, 8),
    ),
    "back": (
        (64, 64, 8, 3, 2), (64, 64, 8, 2, 2), (64, 64, 8, 3, 1), (64, 64, 4, 3, 3),
        (64, 64, 4, 2, 4), (64, 32, 4, 3, 4), (128, 64, 8, 2, 1), (64, 128, 8, 2, 1),
        (64, 128, 8, 3, 2), (128, 128, 8, 2, 1),
    ),
}  # fmt: skip
"""Of the two kernels: rows, columns, warps, stages, programs for each multiprocessor."""


def _sweep(name: str, case: Case, repeats: int) -> None:
    from raytune_ft.kernels.dropout_triton import Tiles

    for kernel, call in (("a", case.forward), ("back", case.backward)):
        for layout in LAYOUTS[kernel]:
            found = _try(partial(call, Tiles(*layout)), repeats)
            say("sweep", kernel=kernel, group=name, tokens=len(case.x), tiles=layout, gpu_ms=found)


def _try(call: Callable[[], Any], repeats: int) -> float | str:
    try:
        return LAYERS * milliseconds(graphed(call), repeats)
    except Exception as error:  # a layout too large for the chip: whatever Triton calls it
        return type(error).__name__


def orders(shape: Shape, tokens: int) -> None:
    """An update's small product before the large one, which then adds, or behind it."""
    for name, (width, out) in (("o", (shape.hidden,) * 2), ("up", (shape.hidden, shape.mlp))):
        sizes = (tokens, width), (out, width), (tokens, shape.rank), (shape.rank, out)
        x, weight, inner, b = (torch.randn(size, device=DEVICE).to(BF16) for size in sizes)
        weight, y = weight.t(), torch.empty(tokens, out, device=DEVICE, dtype=BF16)
        calls = {
            "large": lambda y=y, x=x, w=weight: torch.mm(x, w, out=y),
            "small_first": lambda y=y, x=x, w=weight, i=inner, b=b: torch.mm(i, b, out=y).addmm_(
                x, w
            ),
            "large_first": lambda y=y, x=x, w=weight, i=inner, b=b: torch.mm(x, w, out=y).addmm_(
                i, b
            ),
        }
        for order, call in calls.items():
            gpu_ms = LAYERS * milliseconds(graphed(call), shape.repeats)
            say("order", layer=name, tokens=tokens, order=order, gpu_ms=gpu_ms)


def products_of_b(shape: Shape, tokens: int, rate: float) -> None:
    """What a layer's B takes: its product forward, and both of the way back, which read the same.

    `apart`: first all layers' gradients of the inner numbers, then all of B: no cache helps.
    """
    for name, (_, outs) in shape.groups().items():
        sizes = [(tokens, out) for out in outs], [(out, shape.rank) for out in outs]
        outer, b = ([torch.randn(s, device=DEVICE).to(BF16) for s in some] for some in sizes)
        inner = torch.randn(tokens, shape.rank, device=DEVICE).to(BF16)
        moved = LAYERS * sum(y.numel() for y in outer) * 2 / rate
        pairs = list(zip(outer, b, strict=True))

        def forward(pairs: Any = pairs, inner: Tensor = inner) -> Any:
            return [torch.mm(inner, one.t()) for _, one in pairs]

        def together(pairs: Any = pairs, inner: Tensor = inner) -> Any:
            return [(y @ one, dropout.product(y.t(), inner)) for y, one in pairs]

        def apart(pairs: Any = pairs, inner: Tensor = inner) -> Any:
            back = [y @ one for y, one in pairs]
            return back, [dropout.product(y.t(), inner) for y, _ in pairs]

        for part, reads, call in (
            ("b", 1, forward), ("b_back", 1, together), ("b_back_apart", 2, apart),
        ):  # fmt: skip
            gpu_ms = LAYERS * milliseconds(graphed(call), shape.repeats)
            say(part, group=name, tokens=tokens, gpu_ms=gpu_ms, ideal_ms=reads * moved)


def whole_groups(shape: Shape, tokens: int) -> None:
    """Layers that share an input, forward and backward, ours and PEFT's."""
    total: dict[str, list[tuple[float, float | None]]] = {}
    for name, (width, outs) in shape.groups().items():
        x = torch.randn(1, tokens, width, device=DEVICE, dtype=BF16, requires_grad=True)
        pulls = [torch.randn(1, tokens, out, device=DEVICE, dtype=BF16) for out in outs]
        for way, (call, leaves) in _ways(x, width, outs, shape.rank).items():
            step = partial(_step, call, leaves, pulls)
            ms, gpu_ms = LAYERS * milliseconds(step, shape.repeats), None
            if not way.startswith("peft"):
                gpu_ms = LAYERS * milliseconds(graphed(step), shape.repeats)
            total.setdefault(way, []).append((ms, gpu_ms))
            say("group", group=name, tokens=tokens, way=way, ms=ms, gpu_ms=gpu_ms)
    for way, times in total.items():
        ms, gpu_ms = (sum(one or 0.0 for one in column) for column in zip(*times, strict=True))
        say("groups", tokens=tokens, way=way, ms=ms, gpu_ms=gpu_ms or None)


def _step(call: Callable[[], Any], leaves: Sequence[Tensor], pulls: Sequence[Tensor]) -> None:
    torch.autograd.grad(call(), leaves, pulls)


def _ways(
    x: Tensor, width: int, outs: Sequence[int], rank: int
) -> dict[str, tuple[Callable[[], Any], list[Tensor]]]:
    """Return what computes the outputs, and what it is differentiated by."""
    plain = [torch.randn(out, width, device=DEVICE, dtype=BF16) for out in outs]
    layers = {p: with_adapters(width, outs, rank, p) for p in (0.0, 0.1)}
    streamed, resident = ([Base(one.base_layer) for one in layers[0.0]] for _ in range(2))
    for base in resident:
        base.resident()
    reserve(streamed)
    eighths = [Base(one.base_layer) for one in layers[0.0]]
    for base in eighths if FP8 else ():
        base.in_fp8()
    weights = {p: [(one.lora_A["default"].weight, one.lora_B["default"].weight) for one in these]
               for p, these in layers.items()}  # fmt: skip
    leaves = {p: [x, *itertools.chain(*these)] for p, these in weights.items()}

    def ours(bases: Sequence[Base], p: float) -> tuple[Callable[[], list[Tensor]], list[Tensor]]:
        pairs = zip(bases, weights[0.0], strict=True)
        parts = [(base, Lora(a, b, 0.25, p)) for base, (a, b) in pairs]
        return lambda: adapted(x, parts), leaves[0.0]

    in_fp8 = {"fp8": ours(eighths, 0.0), "fp8_dropout": ours(eighths, 0.1)} if FP8 else {}
    return in_fp8 | {
        "products": (lambda: [nn.functional.linear(x, weight) for weight in plain], [x]),
        "resident": ours(resident, 0.0),
        "resident_dropout": ours(resident, 0.1),
        "streamed": ours(streamed, 0.0),
        "streamed_dropout": ours(streamed, 0.1),
        "peft": (lambda: [layer(x) for layer in layers[0.0]], leaves[0.0]),
        "peft_dropout": (lambda: [layer(x) for layer in layers[0.1]], leaves[0.1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    given = parser.parse_args()
    shape = TINY if given.tiny else Shape()
    say("device", name=torch.cuda.get_device_name() if ON_GPU else "cpu", torch=torch.__version__)
    rate = copy_bandwidth(given.tiny)
    unpacking(shape, rate)
    for tokens in shape.tokens:
        orders(shape, tokens)
        dropouts(shape, tokens, rate, given.sweep)
        products_of_b(shape, tokens, rate)
        whole_groups(shape, tokens)


if __name__ == "__main__":
    main()
