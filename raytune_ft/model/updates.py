"""Updates: an adapter's tensors in, what each tensor of the base becomes out.

Formulas are PEFT's own (tuners/lora): W + s BA with s = alpha/r or alpha/sqrt(r); DoRA's
m (W + s BA) / |W + s BA|; whole modules, biases and rows of tokens take the trained values' place.
All is computed in float64, some rows at a time, and rounded once, to the type of the base.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

PEFT_PREFIX = "base_model.model."
BLOCK_BYTES = 64 << 20
"""Of the float64 copy of some rows."""
PARTS = {
    "lora_A.weight": "a", "lora_B.weight": "b", "lora_B.bias": "shift",
    "lora_embedding_A": "table_a", "lora_embedding_B": "table_b",
    "lora_magnitude_vector": "lengths", "lora_magnitude_vector.weight": "lengths",
}  # fmt: skip
"""Ends of names of what belongs to a low-rank update."""
TOKEN_ROWS = ("token_adapter.trainable_tokens_delta", "trainable_tokens_delta")
WHOLE = ("base_layer.weight", "base_layer.bias", "weight", "bias")


@dataclass(frozen=True)
class Applied:
    """A changed tensor."""

    weight: torch.Tensor
    """In the base's type."""
    moved: float
    """Euclidean length of the change, before it was rounded."""


class Update(Protocol):
    """What happens to one tensor."""

    def fits(self, shape: torch.Size) -> bool:
        """Tell whether it is for a tensor of this shape."""

    def apply(self, weight: torch.Tensor) -> Applied:
        """Return the changed tensor."""


@dataclass(frozen=True)
class LowRank:
    """W + s L R, and with `lengths` DoRA's lengths for it."""

    left: torch.Tensor
    """(rows, r): B of a linear layer, A^T of an embedding."""
    right: torch.Tensor
    """(r, columns)"""
    scale: float
    lengths: torch.Tensor | None = None
    """(rows,) of a linear layer, (columns,) of an embedding."""
    by_column: bool = False

    def fits(self, shape: torch.Size) -> bool:
        lengths = shape[-1 if self.by_column else 0]
        return (
            shape == (self.left.shape[0], self.right.shape[1])
            and self.left.shape[1] == self.right.shape[0]
            and (self.lengths is None or self.lengths.numel() == lengths)
        )

    def apply(self, weight: torch.Tensor) -> Applied:
        factor = self._factor(weight)
        out, moved = torch.empty_like(weight), 0.0
        for rows in row_blocks(weight):
            after = self._sum(weight, rows)
            if factor is not None:
                after *= factor if self.by_column else factor[rows, None]
            out[rows] = after.to(out.dtype)
            moved += float((after - weight[rows].double()).square().sum())
        return Applied(out, math.sqrt(moved))

    def _sum(self, weight: torch.Tensor, rows: slice) -> torch.Tensor:
        left, right = self.left[rows].double(), self.right.double()
        return torch.addmm(weight[rows].double(), left, right, alpha=self.scale)

    def _factor(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Return m / |W + s BA|, (rows,) or (columns,)."""
        if self.lengths is None:
            return None
        squares = (self._sum(weight, rows).square() for rows in row_blocks(weight))
        if self.by_column:
            found = torch.stack([part.sum(0) for part in squares]).sum(0)
        else:
            found = torch.cat([part.sum(1) for part in squares])
        return self.lengths.double().flatten() / found.sqrt()


@dataclass(frozen=True)
class Replaced:
    """A tensor that was trained in full."""

    value: torch.Tensor

    def fits(self, shape: torch.Size) -> bool:
        # a table may have grown
        return self.value.shape[1:] == shape[1:] and len(self.value) >= shape[0]

    def apply(self, weight: torch.Tensor) -> Applied:
        moved = 0.0
        for rows in row_blocks(weight):
            moved += float((self.value[rows].double() - weight[rows].double()).square().sum())
        return Applied(self.value.to(weight.dtype), math.sqrt(moved))


@dataclass(frozen=True)
class Shifted:
    """A bias to which the adapter's own, scaled, is added (PEFT's `lora_bias`)."""

    by: torch.Tensor
    scale: float

    def fits(self, shape: torch.Size) -> bool:
        return shape == self.by.shape

    def apply(self, weight: torch.Tensor) -> Applied:
        change = self.by.double() * self.scale
        return Applied((weight.double() + change).to(weight.dtype), float(change.norm()))


@dataclass(frozen=True)
class TokenRows:
    """Rows of tokens that were trained beside the adapter."""

    indices: list[int]
    values: torch.Tensor
    """(len(indices), columns)"""

    def fits(self, shape: torch.Size) -> bool:
        return self.values.shape[1:] == shape[1:]

    def apply(self, weight: torch.Tensor) -> Applied:
        out = weight.clone()
        out[self.indices] = self.values.to(out.dtype)
        change = self.values.double() - weight[self.indices].double()
        return Applied(out, float(change.norm()))


def row_blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Yield rows whose float64 copy stays small."""
    width = weight[0].numel() if len(weight) else 1
    step = max(1, BLOCK_BYTES // (8 * max(1, width)))
    for start in range(0, len(weight), step):
        yield slice(start, min(start + step, len(weight)))


def updates_of(config: Any, weights: Mapping[str, torch.Tensor]) -> dict[str, Update] | None:
    """Return the base's tensors by name -> what becomes of each.

    Args:
        config: PEFT's LoraConfig.
        weights: the adapter's tensors under PEFT's names, of the native network.

    Returns:
        None if the adapter has what no formula here knows: layers that are neither linear nor
        embeddings, transposed ones, tables that PEFT keeps tied.
    """
    if config.fan_in_fan_out or getattr(config, "ensure_weight_tying", False):
        return None
    layers: dict[str, dict[str, torch.Tensor]] = {}
    updates: dict[str, Update] = {}
    for name, tensor in weights.items():
        place = name.removeprefix(PEFT_PREFIX)
        if found := _split(place, PARTS):
            layers.setdefault(found[0], {})[PARTS[found[1]]] = tensor
        elif found := _split(place, TOKEN_ROWS):
            indices = _indices(config, found[0])
            if len(indices) != len(tensor):
                return None
            updates[f"{found[0]}.weight"] = TokenRows(indices, tensor)
        elif "lora_" not in place and (found := _split(place, WHOLE)):
            updates[f"{found[0]}.{found[1].rpartition('.')[2]}"] = Replaced(tensor)
        else:
            return None
    for module, parts in layers.items():
        if not ({"a", "b"} <= parts.keys() or {"table_a", "table_b"} <= parts.keys()):
            return None
        updates |= _low_rank(config, module, parts)
    return None if any(_is_unknown(update) for update in updates.values()) else updates


def _is_unknown(update: Update) -> bool:
    return isinstance(update, LowRank) and update.left.dim() != 2


def _low_rank(config: Any, module: str, parts: Mapping[str, torch.Tensor]) -> dict[str, Update]:
    by_column = "table_a" in parts
    left, right = (
        (parts["table_a"].T, parts["table_b"].T) if by_column else (parts["b"], parts["a"])
    )
    scale = _scale(config, module, int(right.shape[0]))
    found: dict[str, Update] = {
        f"{module}.weight": LowRank(left, right, scale, parts.get("lengths"), by_column)
    }
    if "shift" in parts:
        found[f"{module}.bias"] = Shifted(parts["shift"], scale)
    return found


def _scale(config: Any, module: str, rank: int) -> float:
    from peft.utils.other import get_pattern_key

    pattern = config.alpha_pattern or {}
    alpha = pattern.get(get_pattern_key(pattern.keys(), module), config.lora_alpha)
    return float(alpha / (math.sqrt(rank) if config.use_rslora else rank))


def _indices(config: Any, module: str) -> list[int]:
    chosen = config.trainable_token_indices
    if isinstance(chosen, dict):
        fitting = (ids for key, ids in chosen.items() if f".{module}".endswith(f".{key}"))
        return list(next(fitting, ()))
    return list(chosen or ())


def _split(place: str, ends: Collection[str]) -> tuple[str, str] | None:
    """Return (module, end) of a name, by the longest end that it has."""
    found = max((end for end in ends if place.endswith(f".{end}")), key=len, default=None)
    return None if found is None else (place.removesuffix(f".{found}"), found)
