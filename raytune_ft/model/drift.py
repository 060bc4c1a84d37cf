"""Drift: how far a merge moved each layer, and how far quantisation had moved it before.

An adapter that was trained on quantised weights has seen W' = dequant(quant(W)). Where it is merged
into W instead, |W - W'| / |dW| tells how much of what it learned is that difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from raytune_ft.model.updates import row_blocks


@dataclass(frozen=True)
class Layer:
    """One tensor; lengths are Euclidean."""

    name: str
    weight: float
    """|W|"""
    moved: float
    """|dW|, 0 where the adapter has nothing for it."""
    lost: float | None
    """|W - W'|; None where nothing is quantised."""

    @property
    def ratio(self) -> float | None:
        """|W - W'| / |dW|; None without one of them."""
        return None if self.lost is None or not self.moved else self.lost / self.moved

    def as_json(self) -> dict[str, Any]:
        """Return the layer as it stands in merge_report.json."""
        return {
            "name": self.name, "weight": self.weight, "moved": self.moved,
            "lost": self.lost, "lost_over_moved": self.ratio,
        }  # fmt: skip


@dataclass
class Drift:
    """What was written down while tensors went by."""

    layers: list[Layer] = field(default_factory=list)

    def add(self, name: str, weight: torch.Tensor, moved: float, lost: float | None) -> None:
        """Write down a tensor of the base that was changed, or would have been."""
        self.layers.append(Layer(name, length(weight), moved, lost))

    def kinds(self) -> list[tuple[str, list[Layer]]]:
        """Return the changed layers by the last part of their names, in their order."""
        found: dict[str, list[Layer]] = {}
        for layer in self.layers:
            if layer.moved:
                kind = layer.name.removesuffix(".weight").rpartition(".")[2]
                found.setdefault(kind, []).append(layer)
        return list(found.items())

    def table(self) -> list[str]:
        """Return the screen's table: per kind of layer its mean lengths."""
        lines = [
            "|dW|: how far the adapter moves a weight W; lost: how far quantisation had moved it",
            f"{'layers':<16} {'number':>6} {'|dW|/|W|':>9} {'lost/|dW|':>10} {'at most':>8}",
        ]
        for kind, layers in self.kinds():
            moved = mean(layer.moved / layer.weight for layer in layers if layer.weight)
            ratios = [layer.ratio for layer in layers if layer.ratio is not None]
            lost = f"{mean(ratios):>10.2f} {max(ratios):>8.2f}" if ratios else f"{'-':>10} {'-':>8}"
            lines.append(f"{kind:<16} {len(layers):>6} {moved:>9.4f} {lost}")
        return lines


def length(weight: torch.Tensor, other: torch.Tensor | None = None) -> float:
    """Return |weight|, or |weight - other|, summed in float64."""
    total = 0.0
    for rows in row_blocks(weight):
        part = weight[rows].double()
        part = part if other is None else part - other[rows].double()
        total += float(part.square().sum())
    return math.sqrt(total)


def mean(values: Iterable[float]) -> float:
    """Return the mean; 0 of nothing."""
    found = list(values)
    return math.fsum(found) / len(found) if found else 0.0
