"""Sums: DeepSpeed's stage 1 with bfloat16 weights in, gradients added up to the step's border out.

DeepSpeed would keep a bfloat16 gradient beside its float32 sum, zero it, add to it, widen it and
add that, each by a launch of its own for each weight, and sum over ranks even if that is one. Here
a gradient goes into its sum as soon as it is made, and is gone. The numbers are the same: a
micro-step's bfloat16 gradient is exact in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from raytune_ft.training.engine.base import world_size


class BorderSums:
    """The float32 sums of a DeepSpeed engine's gradients, which never move."""

    def __init__(self, engine: Any, trained: Mapping[str, torch.Tensor]) -> None:
        """Collect from now on.

        Args:
            engine: DeepSpeed's, for which `are_kept` is true.
            trained: all parameters of its optimizer, by name.
        """
        self.engine = engine
        self.zero: Any = engine.optimizer
        by_parameter = {
            id(parameter): place.view_as(parameter)
            for group, places in zip(
                self.zero.bf16_groups, self.zero.fp32_groups_gradients, strict=True
            )
            for parameter, place in zip(group, places, strict=True)
        }
        self.places = {name: by_parameter[id(p)] for name, p in trained.items()}
        """Float32, of each parameter's shape."""
        for name, parameter in trained.items():
            self._listen(parameter, self.places[name])
        self.zero.get_grads_for_norm = self._whole

    @staticmethod
    def are_kept(zero: Any) -> bool:
        """Tell whether DeepSpeed's optimizer keeps whole sums and leaves gradients to itself."""
        return hasattr(zero, "fp32_groups_gradients") and not zero.immediate_grad_update

    def finish(self) -> None:
        """Sum over ranks, at the step's border; one rank has nothing to send."""
        self.zero.fp32_groups_has_gradients = [[True] * len(g) for g in self.zero.bf16_groups]
        if world_size() > 1:
            self.engine.allreduce_gradients()

    def _whole(self, for_clipping: bool = False) -> Any:
        """Give what is measured and clipped in one piece, where DeepSpeed goes by each weight."""
        flats = self.zero.fp32_groups_actual_gradients_flat
        return flats if for_clipping else (flats, {})

    @staticmethod
    def _listen(parameter: Any, place: torch.Tensor) -> None:
        def collect(made: torch.Tensor) -> None:
            if made.grad is not None:
                place.add_(made.grad)
                made.grad = None

        parameter.register_post_accumulate_grad_hook(collect)
