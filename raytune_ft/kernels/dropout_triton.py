"""The Triton form of `dropout.project` and its way back: x is read once, no mask is stored.

A call of Philox serves the eight neighbouring columns that one thread loads at once, so tiles of x
are (rows, columns / 8, 8) until they are multiplied.
"""

# Triton's programs have neither types nor small names for what is compiled in
# mypy: disable-error-code="untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: N803

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from raytune_ft.kernels.dropout import ROUNDS, SPAN, Mask
from raytune_ft.kernels.launch import ceil_div, steps_each


@dataclass(frozen=True)
class Tiles:
    """How a kernel is laid out on a GPU."""

    rows: int = 64
    columns: int = 64
    """Of x in a tile; columns: a multiple of 32."""
    warps: int = 4
    stages: int = 3
    """Tiles under way at once."""
    each: int = 4
    """Programs that a multiprocessor should have."""

    @property
    def beside(self) -> int:
        """Into how many stretches of columns warps part a product; the others part its rows."""
        return max(1, min(self.columns // 32, self.warps // min(self.warps, self.rows // 16)))


FORWARD = Tiles()
HOPPER = {
    1: Tiles(each=3),
    2: Tiles(columns=128, warps=8, stages=2, each=1),
    3: Tiles(warps=8, each=2),
}
"""By adapters of one launch of `project_backward`: the fewest instructions for a number of x that
keep their sums in registers, by the machine code (docs/performance.md)."""
ELSEWHERE = {
    1: Tiles(stages=2, each=3),
    2: Tiles(columns=32, stages=2, each=2),
    3: Tiles(columns=32, stages=2, each=2),
}
"""The same where products take their numbers from registers: GPUs before Hopper, and consumers'."""
WIDE = Tiles(warps=8, stages=2, each=2)
"""For ranks above `MOST_RANK`."""
MOST = 3
"""Adapters of one launch of `project_backward`, whose sums stay in registers ..."""
MOST_RANK = 64
"""... up to this rank; above, each adapter has its own launch."""

PLAIN = ("stream", "threshold", "rows")
"""Arguments of which kernels have no special forms: these numbers vary."""


def project(x: Tensor, a: Tensor, mask: Mask, tiles: Tiles = FORWARD) -> Tensor:
    """As `dropout.project` with a mask; x (rows, in) with neighbouring columns, a contiguous."""
    rows, columns = x.shape
    n, rank, _ = a.shape
    grid_m, steps = ceil_div(rows, tiles.rows), ceil_div(columns, tiles.columns)
    each = steps_each(x.device, grid_m * n, steps, each=tiles.each)
    parts = ceil_div(steps, each)
    dtype = torch.float32 if parts > 1 else x.dtype
    out = torch.empty((parts, rows, n * rank), dtype=dtype, device=x.device)
    _project[(n, grid_m, parts)](
        x, a, out, mask.seed, mask.stream, mask.threshold, mask.growth,
        rows, columns, rank, x.stride(0), STEPS=each, RANK=_padded(rank), **_constants(tiles),
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0, dtype=torch.float32).to(x.dtype)


def project_backward(
    x: Tensor,
    a: Tensor,
    gradient: Tensor,
    mask: Mask,
    x_gradient: Tensor | None,
    tiles: Tiles | None = None,
    *,
    adds: bool = True,
) -> Tensor:
    """As `dropout.project_backward` with a mask."""
    rank = a.shape[1]
    at_once = MOST if rank <= MOST_RANK else 1
    if len(a) <= at_once:
        return _backward(x, a, gradient, mask, x_gradient, tiles, adds)
    pieces = zip(a.split(at_once), gradient.split(at_once * rank, dim=1), strict=True)
    parts = []
    for index, (part, back) in enumerate(pieces):
        mine = replace(mask, stream=mask.stream + at_once * index)
        parts.append(_backward(x, part, back, mine, x_gradient, tiles, adds or index > 0))
    return torch.cat(parts)


def _backward(
    x: Tensor,
    a: Tensor,
    gradient: Tensor,
    mask: Mask,
    x_gradient: Tensor | None,
    tiles: Tiles | None,
    adds: bool,
) -> Tensor:
    rows, columns = x.shape
    n, rank, _ = a.shape
    tiles = tiles or _backward_tiles(x.device, n, rank)
    grid_k, steps = ceil_div(columns, tiles.columns), ceil_div(rows, tiles.rows)
    each = steps_each(x.device, grid_k, steps, each=tiles.each)
    parts = ceil_div(steps, each)
    out = torch.empty((parts, *a.shape), dtype=torch.float32, device=x.device)
    into = x if x_gradient is None else x_gradient
    _project_backward[(grid_k, parts)](
        x, a, gradient, into, out, mask.seed, mask.stream, mask.threshold, mask.growth,
        rows, columns, rank, x.stride(0), gradient.stride(0), into.stride(0),
        STEPS=each, ADAPTERS=n, WANTED=x_gradient is not None, ADDS=adds, RANK=_padded(rank),
        BESIDE=tiles.beside, **_constants(tiles),
    )  # fmt: skip
    return out[0] if parts == 1 else out.sum(0)


def _backward_tiles(device: torch.device, adapters: int, rank: int) -> Tiles:
    if rank > MOST_RANK:
        return WIDE
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9
    return (HOPPER if is_hopper else ELSEWHERE)[adapters]


def _constants(tiles: Tiles) -> dict[str, int]:
    return {
        "TILE_M": tiles.rows, "TILE_K": tiles.columns, "ROUNDS": ROUNDS, "SPAN": SPAN,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip


def _padded(rank: int) -> int:
    """Return the width that tensor cores take for a rank."""
    return max(16, 1 << (rank - 1).bit_length())


@triton.jit
def _kept(seed, stream, threshold, row, group, ROUNDS: tl.constexpr):
    """Return the mask of rows (m, 1) by groups of eight columns (1, g): (m, g, 8).

    Triton's own Philox takes two multiplications for the two halves of a product, and spreads the
    counter over all places before the first of them; a quarter of a kernel's instructions.
    """
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1, c2 = group.to(tl.uint32), row.to(tl.uint32), stream.to(tl.uint32)
    c3 = tl.cast(0, tl.uint32)
    for _ in tl.static_range(ROUNDS):
        left, right = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (right >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (left >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = right.to(tl.uint32), left.to(tl.uint32)
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    place = tl.arange(0, 8)[None, None, :]
    low = tl.where(place < 2, c0[:, :, None], c1[:, :, None])
    high = tl.where(place < 6, c2[:, :, None], c3[:, :, None])
    word = tl.where(place < 4, low, high)
    # compared as upper halves: what stands below one decides nothing
    return tl.where(place % 2 == 0, word << 16, word) >= threshold.to(tl.uint32) << 16


@triton.jit(do_not_specialize=PLAIN)
def _project(
    x, a, out, seed, stream, threshold, growth,
    rows, columns, rank, x_stride, STEPS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, RANK: tl.constexpr,
    ROUNDS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    adapter, part = tl.program_id(0), tl.program_id(2)
    row = tl.program_id(1) * TILE_M + tl.arange(0, TILE_M)
    group = tl.arange(0, TILE_K // SPAN)
    column = tl.arange(0, TILE_K)
    r = tl.arange(0, RANK)
    key = tl.load(seed)
    x += row.to(tl.int64)[:, None] * x_stride
    a += adapter * rank * columns + r[None, :] * columns
    total = tl.zeros((TILE_M, RANK), dtype=tl.float32)
    for step in range(STEPS):
        start = (part * STEPS + step) * TILE_K
        at = start + column
        here = (row < rows)[:, None] & (at < columns)[None, :]
        tile = tl.load(x + at[None, :], mask=here, other=0.0)
        mine = _kept(
            key, stream + adapter, threshold,
            row[:, None], (start // SPAN + group)[None, :], ROUNDS,
        )  # fmt: skip
        dropped = _dropped(tile, mine)
        there = (at < columns)[:, None] & (r < rank)[None, :]
        weight = tl.load(a + at[:, None], mask=there, other=0.0)
        total = tl.dot(dropped, weight, total, input_precision="ieee")
    width = tl.num_programs(0) * rank
    out += part.to(tl.int64) * rows * width + adapter * rank
    place = row.to(tl.int64)[:, None] * width + r[None, :]
    inside = (row < rows)[:, None] & (r < rank)[None, :]
    tl.store(out + place, (total * growth).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=PLAIN)
def _project_backward(
    x, a, gradient, x_gradient, out, seed, stream, threshold, growth,
    rows, columns, rank, x_stride, gradient_stride, x_gradient_stride,
    STEPS: tl.constexpr, ADAPTERS: tl.constexpr, WANTED: tl.constexpr, ADDS: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, RANK: tl.constexpr,
    ROUNDS: tl.constexpr, SPAN: tl.constexpr, BESIDE: tl.constexpr,
):  # fmt: skip
    start, part = tl.program_id(0) * TILE_K, tl.program_id(1)
    r = tl.arange(0, RANK)
    high: tl.constexpr = TILE_M // 16
    low: tl.constexpr = TILE_K // 32 // BESIDE
    row_of, chunk = _places(TILE_M * TILE_K // 32, high, BESIDE, low)
    column = start + chunk[:, None] * 32 + tl.arange(0, 32)[None, :]
    group = start // SPAN + chunk[:, None] * 4 + tl.arange(0, 4)[None, :]
    key = tl.load(seed)
    size = rank * columns
    mixed = start + _mixed(tl.arange(0, TILE_K))
    a += r[:, None] * columns + mixed[None, :]
    known_a = (r < rank)[:, None] & (mixed < columns)[None, :]
    a0 = tl.load(a, mask=known_a, other=0.0)
    a1 = tl.load(a + size, mask=known_a, other=0.0) if ADAPTERS > 1 else a0
    a2 = tl.load(a + 2 * size, mask=known_a, other=0.0) if ADAPTERS > 2 else a0
    total0 = tl.zeros((RANK, TILE_K), dtype=tl.float32)
    total1, total2 = total0, total0
    for step in range(STEPS):
        first = (part * STEPS + step) * TILE_M
        row = (first + row_of)[:, None]
        here = (row < rows) & (column < columns)
        across = row.to(tl.int64)
        tile = tl.load(x + across * x_stride + column, mask=here, other=0.0)
        natural = first + tl.arange(0, TILE_M)
        back = gradient + natural.to(tl.int64)[:, None] * gradient_stride + r[None, :]
        there = (natural < rows)[:, None] & (r < rank)[None, :]
        known = key, threshold, row, group
        total0, total1, total2, through = _all_back(
            tile, (a0, a1, a2), (total0, total1, total2), back, rank, there, stream, known,
            ADAPTERS, ROUNDS, WANTED, high, BESIDE, low,
        )  # fmt: skip
        if WANTED:
            to = x_gradient + across * x_gradient_stride + column
            new = through.reshape(tile.shape) * growth
            if ADDS:
                new += tl.load(to, mask=here, other=0.0).to(tl.float32)
            tl.store(to, new.to(x_gradient.dtype.element_ty), mask=here)
    natural = start + tl.arange(0, TILE_K)
    inside = (r < rank)[:, None] & (natural < columns)[None, :]
    out += part.to(tl.int64) * ADAPTERS * size + r[:, None] * columns + natural[None, :]
    tl.store(out, total0 * growth, mask=inside)
    if ADAPTERS > 1:
        tl.store(out + size, total1 * growth, mask=inside)
    if ADAPTERS > 2:
        tl.store(out + 2 * size, total2 * growth, mask=inside)


@triton.jit
def _all_back(
    tile, a, totals, back, rank, there, stream, known,
    ADAPTERS: tl.constexpr, ROUNDS: tl.constexpr, WANTED: tl.constexpr,
    HIGH: tl.constexpr, BESIDE: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Add all adapters' shares of a tile to their sums; return these and that of x."""
    total0, total1, total2 = totals
    through = tl.zeros((HIGH * 16 * BESIDE * LOW, 4, 8), dtype=tl.float32)
    total0, through = _back(
        tile, a[0], total0, through, back, there, stream, known, ROUNDS, WANTED, HIGH, BESIDE, LOW
    )
    if ADAPTERS > 1:
        total1, through = _back(
            tile, a[1], total1, through, back + rank, there, stream + 1, known,
            ROUNDS, WANTED, HIGH, BESIDE, LOW,
        )  # fmt: skip
    if ADAPTERS > 2:
        total2, through = _back(
            tile, a[2], total2, through, back + 2 * rank, there, stream + 2, known,
            ROUNDS, WANTED, HIGH, BESIDE, LOW,
        )  # fmt: skip
    return total0, total1, total2, through


@triton.jit
def _places(COUNT: tl.constexpr, HIGH: tl.constexpr, BESIDE: tl.constexpr, LOW: tl.constexpr):
    """Return rows and stretches of 32 columns of a tile's places (p,); their order: `_back`.

    Threads load what they hold of a product's result, so that both see the same bits: made for
    each apart, the bits are a fifth of all instructions.
    """
    place = tl.arange(0, COUNT)
    row = place // 8 % HIGH * 16 + place // (8 * HIGH * BESIDE * LOW) * 8 + place % 8
    return row, place // (8 * HIGH) % BESIDE * LOW + place // (8 * HIGH * BESIDE) % LOW


@triton.jit
def _back(
    tile, a, total, through, back, there, stream, known,
    ROUNDS: tl.constexpr, WANTED: tl.constexpr,
    HIGH: tl.constexpr, BESIDE: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Add one adapter's share of a tile to its sum (rank, k), and that of x to (p, 4, 8).

    Places p count, from the slowest: the halves of 16 rows, `LOW` and `BESIDE` stretches of 32
    columns, `HIGH` times 16 rows, 8 rows.
    """
    gradient = tl.load(back, mask=there, other=0.0)
    mine = _kept(known[0], stream, known[1], known[2], known[3], ROUNDS)
    dropped = tl.where(mine, tile.reshape(mine.shape), 0.0).to(tile.dtype)
    dropped = dropped.reshape(2, LOW, BESIDE, HIGH, 8, 32).permute(3, 0, 4, 2, 1, 5)
    dropped = dropped.reshape(HIGH * 16, BESIDE * LOW * 32)
    total = tl.dot(tl.trans(gradient), dropped, total, input_precision="ieee")
    if WANTED:
        whole = tl.dot(gradient, a, input_precision="ieee")
        apart = whole.reshape(HIGH, 2, 8, BESIDE, LOW, 4, 4, 2).permute(1, 4, 3, 0, 2, 6, 5, 7)
        through = tl.where(mine, through + apart.reshape(mine.shape), through)
    return total, through


@triton.jit
def _dropped(tile, mine):
    """Return a tile (m, k) with zeros where its mask (m, k / 8, 8) has no bit."""
    return tl.where(mine, tile.reshape(mine.shape), 0.0).to(tile.dtype).reshape(tile.shape)


@triton.jit
def _mixed(place):
    """Return which column of 32 a place of a product gets.

    A thread of a tensor core holds pairs of columns 8 apart; so its pairs are neighbours in memory
    and it holds whole groups of eight, of which it needs all bits.
    """
    return (place // 32) * 32 + (place % 8 // 2) * 8 + (place % 32 // 8) * 2 + place % 2
