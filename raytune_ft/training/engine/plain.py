"""Plain torch: gradients stay whole and are summed over ranks once, at the step.

Half-precision weights that are trained get float32 copies, which collect the gradients and which
the optimizer steps, as under ZeRO: steps smaller than a bfloat16 weight's last bit would be lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.config.schema import TrainSection
from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.engine.base import Engine, State, rank, world_size
from raytune_ft.training.engine.scaling import LossScale
from raytune_ft.training.optim import build_optimizer, restore, set_lr, state_of

HALF = (torch.float16, torch.bfloat16)


class TorchEngine(Engine):
    """Every rank holds everything."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        train: TrainSection,
        dtype: torch.dtype = torch.float32,
        *,
        b_lr_ratio: float | None = None,
    ) -> None:
        """Wrap `module`, which computes in `dtype`; `b_lr_ratio` is `build_optimizer`'s."""
        super().__init__(module, device)
        self.masters = {name: _master(p) for name, p in self.trained.items()}
        self.optimizer = build_optimizer(self.masters, train, b_lr_ratio)
        self.max_norm = train.max_norm
        self.fixed_places: State | None = None
        self.scale = LossScale.of(dtype)

    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        share = self.scale.factor / n_targets
        if self.micro is not None and (found := self.micro.take(batch, share)) is not None:
            return found
        loss_sum, _ = self.module(**self.put(batch))
        (loss_sum * share).backward()
        return loss_sum.detach()  # type: ignore[no-any-return]

    def step(self, lr: float) -> float | None:
        for master in self.masters.values():
            if master.grad is None:  # no rank may skip a sum that the others wait for
                master.grad = torch.zeros_like(master)
            if world_size() > 1:
                dist.all_reduce(master.grad)
            if self.scale.dynamic:
                master.grad.div_(self.scale.factor)
        norm = float(nn.utils.clip_grad_norm_(self.masters.values(), self.max_norm))
        overflowed = not math.isfinite(norm)
        if not overflowed:
            self._apply(lr)
        self.drop_gradients()
        self.scale.update(overflowed=overflowed)
        return None if overflowed and self.scale.dynamic else norm

    def drop_gradients(self) -> None:
        """Let all gradients go."""
        for name, parameter in self.trained.items():
            if self.masters[name] is not parameter:
                parameter.grad = None
        self.optimizer.zero_grad(set_to_none=self.fixed_places is None)

    @property
    def sums_apart(self) -> bool:
        return all(master.dtype is torch.float32 for master in self.masters.values())

    def places(self) -> State:
        if self.fixed_places is None:
            self.fixed_places = {name: torch.zeros_like(m) for name, m in self.masters.items()}
        for name, master in self.masters.items():
            place, grad = self.fixed_places[name], master.grad
            if grad is not place:  # the first time, and behind whoever let gradients go
                place.zero_() if grad is None else place.copy_(grad)
                master.grad = place
        return self.fixed_places

    def _apply(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.trained.items():
                if self.masters[name] is not parameter:
                    parameter.copy_(self.masters[name])

    def optimizer_state(self) -> State:
        if rank() != 0:
            return {}
        return {**state_of(self.optimizer, self.masters), **self.scale.state()}

    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        self._check(weights)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                self.masters[name].copy_(weights[name])
                parameter.copy_(weights[name])
        restore(self.optimizer, self.masters, state)
        self.scale.load(state)

    def weights(self) -> State:
        if rank() != 0:
            return {}
        return {name: master.detach().cpu().clone() for name, master in self.masters.items()}


def _master(parameter: nn.Parameter) -> nn.Parameter:
    """Return what the optimizer steps: the parameter, or a float32 copy that gets its gradients."""
    if parameter.dtype not in HALF:
        return parameter
    master = nn.Parameter(parameter.detach().float())

    def collect(half: torch.Tensor) -> None:
        if half.grad is None:
            return
        if master.grad is None:
            master.grad = half.grad.float()
        else:
            master.grad.add_(half.grad)
        half.grad = None

    parameter.register_post_accumulate_grad_hook(collect)  # type: ignore[no-untyped-call]
    return master
