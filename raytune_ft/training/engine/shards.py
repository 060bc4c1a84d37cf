"""Shards: where ZeRO keeps the float32 weights of a trained parameter, and how it gets whole again.

Stages 1 and 2 lay a group's parameters end to end and give each rank an equal stretch; stage 3
cuts every parameter into equal parts, one per rank. Either way a rank holds, of one parameter, one
span of its elements in one flat tensor, beside optimizer state of the same layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from raytune_ft.training.engine.base import rank, world_size


@dataclass(frozen=True)
class Place:
    """Where a parameter's elements are."""

    spans: list[tuple[int, int]]
    """[begin, end) of the parameter's elements on each rank; empty where begin >= end."""
    offset: int
    """Of this rank's span in its flat tensor."""


@dataclass(frozen=True)
class Flat:
    """One of this rank's flat tensors, and what it is made of."""

    tensor: torch.Tensor
    """(n,), float32."""
    group: int
    """Index of its group in the optimizer."""
    places: dict[str, Place]
    """By parameter name."""

    def gather(self, values: torch.Tensor, name: str) -> torch.Tensor | None:
        """Put a parameter together out of `values`, laid out like `tensor`; every rank calls it.

        Returns:
            (elements of the parameter,) on the host on rank 0; None on the others.
        """
        place = self.places[name]
        sizes = [max(0, end - begin) for begin, end in place.spans]
        own = values[place.offset : place.offset + sizes[rank()]].detach()
        if world_size() == 1:
            return own.cpu()
        if dist.get_backend() == "nccl":  # it moves device memory only; offloaded is on the host
            own = own.cuda()
        parts = _all_spans(own, sizes) if min(sizes) > 0 else _some_spans(own, sizes)
        return torch.cat([part.cpu() for part in parts]) if rank() == 0 else None

    def scatter(self, whole: torch.Tensor, name: str, out: torch.Tensor) -> None:
        """Put this rank's span of a whole parameter into `out`, laid out like `tensor`."""
        place = self.places[name]
        begin, end = place.spans[rank()]
        if begin < end:
            out[place.offset : place.offset + end - begin] = whole.flatten()[begin:end].to(out)


def _all_spans(own: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Exchange spans of about the same size in one go, padded to the longest."""
    padded = own.new_zeros(max(sizes))
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]


def _some_spans(own: torch.Tensor, sizes: list[int]) -> list[torch.Tensor]:
    """Pass each span from its owner to all ranks; most ranks have none of this parameter."""
    parts = []
    for owner, size in enumerate(sizes):
        if size:
            span = own.contiguous() if owner == rank() else own.new_empty(size)
            dist.broadcast(span, src=owner)
            parts.append(span)
    return parts


def flats_of(zero: Any, names: Mapping[int, str]) -> Iterable[Flat]:
    """Find the flat tensors of a DeepSpeed optimizer.

    Args:
        zero: of stage 1, 2 or 3.
        names: id of a parameter -> its name.
    """
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        return _by_parameter(zero, names)
    if hasattr(zero, "fp32_groups_flat_partition"):  # stage 1 with bfloat16 weights
        flats = zero.fp32_groups_flat_partition
        return _end_to_end(flats, zero.bf16_groups, names, [None] * len(flats))
    flats, groups = zero.single_partition_of_fp32_groups, zero.round_robin_bit16_groups
    return _end_to_end(flats, groups, names, zero.round_robin_bit16_offsets)


def _end_to_end(
    flats: list[torch.Tensor],
    groups: list[list[torch.Tensor]],
    names: Mapping[int, str],
    offsets: list[list[int] | None],
) -> Iterator[Flat]:
    for index, (flat, group) in enumerate(zip(flats, groups, strict=True)):
        size, places, begin = flat.numel(), {}, 0
        for position, parameter in enumerate(group):
            given = offsets[index]
            begin = begin if given is None else given[position]
            count = parameter.numel()
            spans = [
                (max(0, r * size - begin), min(count, (r + 1) * size - begin))
                for r in range(world_size())
            ]
            place = Place(spans, begin + spans[rank()][0] - rank() * size)
            places[names[id(parameter)]] = place
            begin += count
        yield Flat(flat, index, places)


def _by_parameter(zero: Any, names: Mapping[int, str]) -> Iterator[Flat]:
    for index, flat in enumerate(zero.fp32_partitioned_groups_flat):
        places = {}
        for parameter in zero.fp16_groups[index]:
            _, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            count = parameter.ds_numel
            spans = [(r * size, min(count, (r + 1) * size)) for r in range(world_size())]
            places[names[id(parameter)]] = Place(spans, offset)
        yield Flat(flat, zero.sub_group_to_group_id[index], places)
