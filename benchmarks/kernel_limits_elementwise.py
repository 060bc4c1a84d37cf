"""What norm, rotation, gate, loss and packed attention take, beside eager torch and the ideal.

Question: how far are the kernels between the matrix products from what the memory allows, and
which attention is the fastest for how many documents in a row? Shapes of InternLM-7B.

    python -m benchmarks.kernel_limits_elementwise             # under a minute on an H200
    python -m benchmarks.kernel_limits_elementwise --tiny      # a rehearsal, also without a GPU

Prints JSON lines. `ms` is forward and backward with launches, `gpu_ms` the same replayed from a
CUDA graph, `ideal_ms` the bytes that must move by the copy bandwidth measured first.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from raytune_ft.kernels import attention
from raytune_ft.kernels.cross_entropy import losses_and_gradient, write_hidden_gradient
from raytune_ft.kernels.launch import has_triton
from raytune_ft.kernels.norm import add_rms_norm, rms_norm
from raytune_ft.kernels.rope import rope
from raytune_ft.kernels.swiglu import fused_swiglu, swiglu

Tensor = torch.Tensor
Call = Callable[[], Any]
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """Sizes of a network and of micro-batches."""

    hidden: int = 4096
    mlp: int = 11008
    heads: int = 32
    key_heads: int = 8
    words: int = 103168
    length: int = 2048
    rows: tuple[int, ...] = (1, 4)
    chunks: tuple[int, ...] = (512, 1024, 2048, 4096)
    documents: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    repeats: int = 20

    @property
    def width(self) -> int:
        return self.hidden // self.heads


TINY = Shape(
    hidden=32, mlp=48, heads=4, key_heads=2, words=70, length=16, rows=(1, 2), chunks=(4, 8),
    documents=(1, 3), repeats=2,
)  # fmt: skip
PROGRAMS = ((8192, 8), (8192, 16), (8192, 32), (16384, 32), (2048, 4))
"""Words and warps that the loss might read by instead."""
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"


def say(part: str, **values: Any) -> None:
    short = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}
    print(json.dumps({"part": part, **short}), flush=True)


def milliseconds(call: Call, repeats: int) -> float:
    """Time one call of many that run back to back."""
    for _ in range(3):
        call()
    if not ON_GPU:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) * 1e3 / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / repeats


def graphed(call: Call) -> Call:
    """Return what replays a call without launching anything from Python."""
    if not ON_GPU:
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def both(function: Callable[..., Any], inputs: Sequence[Tensor]) -> Call:
    """Return a call of forward and backward."""
    leaves = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    found = function(*leaves)
    outputs = found if isinstance(found, tuple) else (found,)
    pulls = [torch.randn_like(y) for y in outputs]

    def call() -> Any:
        found = function(*leaves)
        outputs = found if isinstance(found, tuple) else (found,)
        return torch.autograd.grad(outputs, leaves, pulls)

    return call


def measure(
    part: str, way: str, call: Call, shape: Shape, ideal_ms: float | None = None, **told: Any
) -> None:
    """Print a line of times, or of why there are none: not every torch has every kernel."""
    try:
        row = {"ms": milliseconds(call, shape.repeats)}
        row["gpu_ms"] = milliseconds(graphed(call), shape.repeats)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        say(part, way=way, **told, error=str(error).splitlines()[0][:200])
        return
    if ideal_ms is not None:
        row |= {"ideal_ms": ideal_ms, "of_ideal": ideal_ms / row["gpu_ms"]}
    say(part, way=way, **told, **row)


def random(*sizes: int) -> Tensor:
    return torch.randn(sizes, device=DEVICE, dtype=torch.bfloat16)


def bandwidth(shape: Shape) -> float:
    """Return the bytes per millisecond of a copy, read and written."""
    source = torch.empty(2**30 if ON_GPU else 2**20, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    moved = 2 * source.numel() / milliseconds(lambda: target.copy_(source), shape.repeats)
    say("copy", gb_per_s=moved / 1e6, torch=torch.__version__,
        device=torch.cuda.get_device_name(0) if ON_GPU else "cpu")  # fmt: skip
    return moved


def norms(shape: Shape, rows: int, moved: float) -> None:
    tokens = rows * shape.length
    x, residual = random(rows, shape.length, shape.hidden), random(rows, shape.length, shape.hidden)
    weight = random(shape.hidden)
    module = LlamaRMSNorm(shape.hidden, eps=EPS).to(DEVICE, torch.bfloat16).requires_grad_(False)
    one = 2 * x.numel() / moved

    def eager_sum(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return module(total), total

    ways = {"ours": lambda x: rms_norm(x, weight, EPS), "eager": module}
    for way, function in ways.items():
        measure("norm", way, both(function, [x]), shape, 5 * one, tokens=tokens)
    sums = {"ours": lambda x, r: add_rms_norm(x, r, weight, EPS), "eager": eager_sum}
    for way, function in sums.items():
        measure("sum and norm", way, both(function, [x, residual]), shape, 8 * one, tokens=tokens)


def rotations(shape: Shape, rows: int, moved: float) -> None:
    for keys in (shape.heads, shape.key_heads):
        q, k = (
            random(rows, shape.length, n, shape.width).transpose(1, 2) for n in (shape.heads, keys)
        )
        angle = torch.rand(1, shape.length, shape.width, device=DEVICE)
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        ideal = 4 * 2 * (q.numel() + k.numel()) / moved
        ways = {
            "ours": lambda q, k, c=cos, s=sin: rope(q, k, c, s),
            "eager": lambda q, k, c=cos, s=sin: apply_rotary_pos_emb(q, k, c, s),
        }
        for way, function in ways.items():
            call = both(function, [q, k])
            measure("rotation", way, call, shape, ideal, tokens=rows * shape.length, key_heads=keys)


def gates(shape: Shape, rows: int, moved: float) -> None:
    gate, up = (random(rows, shape.length, shape.mlp) for _ in range(2))
    ideal = 8 * 2 * gate.numel() / moved
    ways = {"ours": swiglu, "eager": lambda g, u: nn.functional.silu(g) * u}
    for way, function in ways.items():
        call = both(function, [gate, up])
        measure("gate", way, call, shape, ideal, tokens=rows * shape.length)
    fused = both(fused_swiglu, [torch.cat((gate.detach(), up.detach()), -1)])
    measure("gate", "ours, one tensor", fused, shape, ideal, tokens=rows * shape.length)


def heads(shape: Shape, moved: float) -> None:
    """Loss and hidden gradient of a frozen head, by rows of logits at a time."""
    tokens = max(shape.rows) * shape.length
    weight = random(shape.words, shape.hidden) * 0.02
    hidden, targets = random(tokens, shape.hidden), torch.zeros(tokens, dtype=torch.long)
    targets = targets.to(DEVICE)
    gradient = torch.empty_like(hidden)
    for chunk in shape.chunks:
        logits = random(chunk, shape.words)
        ideal = 2 * 2 * logits.numel() / moved
        given = logits, targets[:chunk]
        measure("loss", "ours", partial(losses_and_gradient, *given), shape, ideal, rows=chunk)
        for block, warps in PROGRAMS if has_triton(logits) else ():
            from raytune_ft.kernels import cross_entropy_triton as loss

            call = partial(loss.losses_and_gradient, *given, None, block, warps)
            measure("loss", f"{block} words, {warps} warps", call, shape, ideal, rows=chunk)

        def whole(chunk: int = chunk, products_only: bool = False) -> None:
            for start in range(0, tokens, chunk):
                part = slice(start, start + chunk)
                logits = nn.functional.linear(hidden[part], weight)
                if not products_only:
                    losses_and_gradient(logits, targets[part])
                write_hidden_gradient(logits, weight, gradient[part])

        told = {"tokens": tokens, "rows": chunk}
        few = Shape(repeats=max(1, shape.repeats // 4))
        measure("head", "ours", whole, few, **told)
        measure("head", "products alone", lambda w=whole: w(products_only=True), few, **told)


def _ends(length: int, rows: int, documents: int) -> list[int]:
    """Return bounds of documents of lengths that differ by up to twice, row by row."""
    shares = [1 + (i * 7 % 5) / 4 for i in range(documents)]
    inner = [round(length * sum(shares[: i + 1]) / sum(shares)) for i in range(documents)]
    return [0, *(row * length + end for row in range(rows) for end in inner)]


def cudnn_by_bounds(
    q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, scale: float
) -> Tensor:
    """Attend as training could: plans are made by numbers of documents and lengths, so both stay.

    Empty documents fill up to a multiple of 32, and every one may be as long as a row.
    """
    rows, count, length, width = q.shape
    filling = -(len(bounds) - 1) % 32
    bounds, longest = nn.functional.pad(bounds, (0, filling), value=rows * length), length
    ends = (x.transpose(1, 2).reshape(rows * length, x.shape[1], width) for x in (q, k, v))
    arguments = (None, bounds, bounds, longest, longest, True, 0.0, True, False)
    found = torch.ops.aten._cudnn_attention_forward(*ends, *arguments, scale=scale)[0]
    return found.view(rows, length, count, width)


def _one_kernel(kernel: SDPBackend, scale: float) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        groups = q.shape[1] != k.shape[1]
        with sdpa_kernel(kernel):
            found = nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, **({"enable_gqa": True} if groups else {})
            )
        return found.transpose(1, 2).contiguous()

    return attend


def attentions(shape: Shape, rows: int, keys: int, *, tries_cudnn: bool = False) -> None:
    """Time every way for every number of documents in a row, or cuDNN's way by bounds alone."""
    q, k, v = (
        random(rows, shape.length, n, shape.width).transpose(1, 2)
        for n in (shape.heads, keys, keys)
    )
    scale = shape.width**-0.5
    for documents in shape.documents:
        ends = _ends(shape.length, rows, documents)
        longest = max(b - a for a, b in pairwise(ends))
        given = (torch.tensor(ends, dtype=torch.int32, device=DEVICE), longest)
        told: dict[str, Any] = {"tokens": ends[-1], "documents": documents, "key_heads": keys}
        told["mean_keys"] = round(sum((b - a) ** 2 for a, b in pairwise(ends)) / 2 / ends[-1])
        if tries_cudnn:
            ways = {"cudnn by bounds": lambda q, k, v, g=given: cudnn_by_bounds(q, k, v, *g, scale)}
        else:
            ways = _ways(shape, rows, given, scale, one=documents == 1)
        for way, function in ways.items():
            try:
                call = both(function, [q, k, v])
                error_to_attend = _difference(function, (q, k, v), given, scale)
            except (RuntimeError, TypeError, NotImplementedError) as error:
                say("attention", way=way, **told, error=str(error).splitlines()[0][:200])
                continue
            measure("attention", way, call, shape, **told, error_to_attend=error_to_attend)


def _ways(
    shape: Shape, rows: int, given: tuple[Tensor, int], scale: float, *, one: bool
) -> dict[str, Callable[..., Tensor]]:
    added = attention.mask_of(rows, shape.length, given[0], torch.bfloat16)
    allowed = added == 0
    ways: dict[str, Callable[..., Tensor]] = {
        "attend": lambda q, k, v: attention.attend(q, k, v, *given, scale=scale),
        "flash by bounds": lambda q, k, v: attention._by_bounds(q, k, v, *given, scale, None),
        "added mask": lambda q, k, v: attention.reference_attend(q, k, v, added, scale=scale),
        "boolean mask": lambda q, k, v: attention.reference_attend(q, k, v, allowed, scale=scale),
    }
    if one:
        for name in ("CUDNN", "FLASH", "EFFICIENT"):
            ways[f"sdpa {name}"] = _one_kernel(getattr(SDPBackend, f"{name}_ATTENTION"), scale)
    return ways


def _difference(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    given: tuple[Tensor, int],
    scale: float,
) -> float:
    """Return the largest difference of outputs and gradients from `attend`'s, relative."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    found = []
    for way in (function, lambda q, k, v: attention.attend(q, k, v, *given, scale=scale)):
        output = way(*leaves)
        found.append([output, *torch.autograd.grad(output, leaves, torch.ones_like(output))])
    pairs = zip(*found, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-9)) for a, b in pairs)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="rehearse at a tiny shape")
    parser.add_argument(
        "parts", nargs="*", help="elementwise, heads, attention, cudnn; all by default"
    )
    given = parser.parse_args(arguments)
    shape = TINY if given.tiny else Shape()
    parts = given.parts or ["elementwise", "heads", "attention", "cudnn"]
    began = time.perf_counter()
    moved = bandwidth(shape)
    for rows in shape.rows if "elementwise" in parts else ():
        norms(shape, rows, moved)
        rotations(shape, rows, moved)
        gates(shape, rows, moved)
    if "heads" in parts:
        heads(shape, moved)
    if "attention" in parts:
        for rows in shape.rows:
            attentions(shape, rows, shape.heads)
        attentions(shape, max(shape.rows), shape.key_heads)
    if "cudnn" in parts:  # last: what has never been tried may end the process
        for keys in (shape.heads, shape.key_heads):
            attentions(shape, max(shape.rows), keys, tries_cudnn=True)
    say("end", seconds=time.perf_counter() - began, finite=math.isfinite(moved))


if __name__ == "__main__":
    main()
