"""What every engine does, whatever it shards: batches in, an optimizer step out.

All compute the same mathematics: the gradient of (sum of token losses) / (labelled tokens of
the whole optimizer step, over all micro-batches and ranks), clipped to `max_norm`.
Optimizer state leaves and enters an engine by parameter name, so that a checkpoint fits any
number of ranks and any engine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.errors import CheckpointError
from raytune_ft.training.batching import TensorBatch

State = dict[str, torch.Tensor]


def world_size() -> int:
    """Return the number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


T = TypeVar("T")


class Shortcut(Protocol):
    """Passes of fixed shapes, `micro_graph.MicroStep`."""

    clock: Any
    """Times them, `guarding.stragglers.ForwardClock`; None: nobody does."""

    def take(self, batch: TensorBatch, share: float) -> torch.Tensor | None: ...

    def close(self) -> None: ...


class Engine(ABC):
    """One optimizer step is `accumulation` calls of `forward_backward`, then one of `step`."""

    micro: Shortcut | None = None
    """What takes the micro-batches that it can, in the engine's stead."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.shapes = {name: p.shape for name, p in self.trained.items()}

    @abstractmethod
    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        """Add a micro-batch's gradient; return its summed token loss, a detached scalar."""

    @abstractmethod
    def step(self, lr: float) -> float | None:
        """Apply the summed gradient; return its norm before clipping.

        None: float16 gradients overflowed, no weight has changed, the loss scale is lower now,
        and the gradients are gone. A norm that is not finite has changed no weight either.
        """

    @abstractmethod
    def optimizer_state(self) -> State:
        """Gather `parameter/key` tensors: of the parameter's shape, in blocks, or scalars.

        Every rank has to call it; rank 0 gets the tensors, on the host, the others nothing.
        """

    @abstractmethod
    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Put trained weights and optimizer state back, exactly; whole on every rank."""

    @abstractmethod
    def weights(self) -> State:
        """Gather trained weights in the precision that the optimizer keeps, by name.

        Every rank has to call it; rank 0 gets the tensors, on the host, the others nothing.
        """

    def timed_by(self, clock: T) -> T:
        """Return a clock of the module's forward passes, which times whole passes of fixed shapes.

        Where there are such passes, no rank waits for another in a backward pass either.
        """
        if self.micro is not None:
            self.micro.clock = clock
        return clock

    @property
    def sums_apart(self) -> bool:
        """Whether passes exchange nothing, and gradients are added up at `places`."""
        return False

    def places(self) -> State:
        """Return where gradients are added up, by name: from now on always the same tensors.

        Of an engine that `sums_apart`; float32, of each parameter's shape.
        """
        return {}

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Hold every weight of the module on every rank, for reading; all ranks have to enter.

        Inside, a rank can generate, measure and save alone; it does not train. Outside, under
        ZeRO-3, every rank has to run the module as often as the others do, and no rank holds
        a weight to save.
        """
        yield

    def put(self, batch: TensorBatch) -> TensorBatch:
        """Move a batch to the engine's device; scalars stay here, where kernels want them."""
        if self.device.type != "cuda":
            return {k: v.to(self.device) if v.ndim else v for k, v in batch.items()}
        # out of pages that stay where they are: else the host waits until the device gets to it
        return {
            key: value.pin_memory().to(self.device, non_blocking=True) if value.ndim else value
            for key, value in batch.items()
        }

    def _check(self, weights: Mapping[str, torch.Tensor]) -> None:
        check_names(weights, self.shapes)


def check_names(given: Mapping[str, torch.Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the trained ones, by name and shape."""
    wrong = sorted(set(given) ^ set(shapes)) or sorted(
        n for n, shape in shapes.items() if given[n].shape != shape
    )
    if wrong:
        raise CheckpointError(
            f"checkpoint and model differ in {len(wrong)} trained tensors, first '{wrong[0]}'; "
            "resume with the recipe that wrote it"
        )
