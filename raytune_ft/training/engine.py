"""Engines: how gradients are summed over ranks and applied; DeepSpeed ZeRO or plain torch.

Both compute the same mathematics: the gradient of (sum of token losses) / (labelled tokens of
the whole optimizer step, over all micro-batches and ranks), clipped to `max_norm`.
Optimizer state leaves and enters an engine by parameter name, so that a checkpoint fits any
number of ranks and either engine.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.config.schema import TrainSection
from raytune_ft.errors import CheckpointError
from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.optim import as_kept, build_optimizer, restore, set_lr, state_of

State = dict[str, torch.Tensor]


def world_size() -> int:
    """Return the number of ranks; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank; 0 without torch.distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


class Engine(ABC):
    """One optimizer step is `accumulation` calls of `forward_backward`, then one of `step`."""

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module = module
        self.device = device
        self.trained = {n: p for n, p in module.named_parameters() if p.requires_grad}

    @abstractmethod
    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        """Add a micro-batch's gradient; return its summed token loss, a detached scalar."""

    @abstractmethod
    def step(self, lr: float) -> float | None:
        """Apply the summed gradient; return its norm before clipping.

        None: float16 gradients overflowed, no weight has changed, the loss scale is lower now,
        and the gradients are gone.
        """

    @abstractmethod
    def optimizer_state(self) -> State:
        """Gather `parameter/key` tensors: of the parameter's shape, in blocks, or scalars."""

    @abstractmethod
    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        """Put trained weights and optimizer state back, exactly."""

    @abstractmethod
    def weights(self) -> State:
        """Gather trained weights in the precision that the optimizer keeps, by name."""

    def put(self, batch: TensorBatch) -> TensorBatch:
        """Move a batch to the engine's device; scalars stay here, where kernels want them."""
        return {
            key: value.to(self.device, non_blocking=True) if value.ndim else value
            for key, value in batch.items()
        }


class TorchEngine(Engine):
    """Plain torch: gradients stay whole and are summed over ranks once, at the step."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        train: TrainSection,
        *,
        b_lr_ratio: float | None = None,
    ) -> None:
        super().__init__(module, device)
        self.optimizer = build_optimizer(self.trained, train, b_lr_ratio)
        self.max_norm = train.max_norm

    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        loss_sum, _ = self.module(**self.put(batch))
        (loss_sum / n_targets).backward()
        return loss_sum.detach()  # type: ignore[no-any-return]

    def step(self, lr: float) -> float:
        gradients = [p.grad for p in self.trained.values() if p.grad is not None]
        if world_size() > 1:
            for gradient in gradients:
                dist.all_reduce(gradient)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.max_norm)
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def optimizer_state(self) -> State:
        return state_of(self.optimizer, self.trained)

    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        check_names(weights, self.trained)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
        restore(self.optimizer, self.trained, state)

    def weights(self) -> State:
        return {name: p.detach().clone() for name, p in self.trained.items()}


class ZeroEngine(Engine):
    """DeepSpeed ZeRO stage 1 or 2 around the same module.

    DeepSpeed divides a loss by the accumulation steps and averages gradients over ranks; both
    are multiplied back, because the loss here is already divided by the step's token count.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        train: TrainSection,
        config: dict[str, Any],
        *,
        b_lr_ratio: float | None = None,
    ) -> None:
        super().__init__(module, device)
        import deepspeed

        quiet_deepspeed(on_gpu=device.type == "cuda")
        _ensure_process_group(device)
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks its launcher for it; Ray sets it
        optimizer = build_optimizer(self.trained, train, b_lr_ratio)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=list(self.trained.values()),
            config=config,
            dist_init_required=False,
        )
        self.scale = train.accumulation * world_size()

    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        loss_sum, _ = self.engine(**self.put(batch))
        self.engine.backward(loss_sum * (self.scale / n_targets))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
        return loss_sum.detach()  # type: ignore[no-any-return]

    def step(self, lr: float) -> float:
        set_lr(self.engine.optimizer, lr)
        self.engine.step()
        return float(self.engine.get_global_grad_norm())

    def optimizer_state(self) -> State:
        state: State = {}
        for group, flat in self._groups():
            for key, value in self.engine.optimizer.optimizer.state.get(flat, {}).items():
                if torch.is_tensor(value) and value.shape == flat.shape:
                    full = _gather(value)
                    state.update({f"{n}/{key}": t for n, t in _split(full, group).items()})
                elif not torch.is_tensor(value) or value.numel() == 1:
                    state.update({f"{n}/{key}": torch.as_tensor(value).clone() for n in group})
                else:
                    raise CheckpointError(
                        f"train.optimizer keeps '{key}' in blocks, which ZeRO cannot re-shard; "
                        "use adamw or paged_adamw_32bit, or train.deepspeed: none"
                    )
        return state

    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        check_names(weights, self.trained)
        zero = self.engine.optimizer
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
            for group, flat in self._groups():
                flat.data.copy_(self._shard({n: weights[n] for n in group}, group, flat))
                zero.optimizer.state[flat] = self._shard_of_state(state, group, flat)

    def _shard_of_state(
        self,
        state: Mapping[str, torch.Tensor],
        group: Mapping[str, nn.Parameter],
        flat: torch.Tensor,
    ) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key in sorted({k.rpartition("/")[2] for k in state if k.rpartition("/")[0] in group}):
            parts = {n: state[f"{n}/{key}"] for n in group}
            whole = all(parts[n].shape == p.shape for n, p in group.items())
            found[key] = (
                self._shard(parts, group, flat) if whole else as_kept(next(iter(parts.values())))
            )
        return found

    def weights(self) -> State:
        weights: State = {}
        for group, flat in self._groups():
            weights.update(_split(_gather(flat.data), group))
        return weights

    def _groups(self) -> list[tuple[dict[str, nn.Parameter], torch.Tensor]]:
        """Pair the parameters of each ZeRO group, in flat order, with this rank's fp32 shard."""
        zero = self.engine.optimizer
        names = {id(p): n for n, p in self.trained.items()}
        groups = [{names[id(p)]: p for p in group} for group in zero.bit16_groups]
        return list(zip(groups, zero.single_partition_of_fp32_groups, strict=True))

    @staticmethod
    def _shard(
        tensors: Mapping[str, torch.Tensor], group: Mapping[str, nn.Parameter], flat: torch.Tensor
    ) -> torch.Tensor:
        full = torch.cat([tensors[name].flatten().to(flat) for name in group])
        padded = torch.zeros(flat.numel() * world_size(), dtype=flat.dtype, device=flat.device)
        padded[: full.numel()] = full
        return padded[rank() * flat.numel() : (rank() + 1) * flat.numel()].clone()


def _ensure_process_group(device: torch.device) -> None:
    """Make a group of one where no launcher made one; it needs neither MPI nor a free port."""
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=0, world_size=1)


def quiet_deepspeed(*, on_gpu: bool) -> None:
    """Silence DeepSpeed's logger and keep it from compiling a C++ op for CPU ranks.

    The shared-memory all-reduce takes over a minute to compile at the first start and needs a
    compiler; gloo does the same sum.
    """
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def check_names(given: Mapping[str, torch.Tensor], trained: Mapping[str, nn.Parameter]) -> None:
    """Refuse a checkpoint whose tensors are not exactly the trained ones, by name and shape."""
    wrong = sorted(set(given) ^ set(trained)) or sorted(
        n for n, p in trained.items() if given[n].shape != p.shape
    )
    if wrong:
        raise CheckpointError(
            f"checkpoint and model differ in {len(wrong)} trained tensors, first '{wrong[0]}'; "
            "resume with the recipe that wrote it"
        )


def _gather(shard: torch.Tensor) -> torch.Tensor:
    if world_size() == 1:
        return shard.detach().clone()
    parts = [torch.empty_like(shard) for _ in range(world_size())]
    dist.all_gather(parts, shard.detach().contiguous())
    return torch.cat(parts)


def _split(full: torch.Tensor, group: Mapping[str, nn.Parameter]) -> State:
    parts: State = {}
    offset = 0
    for name, parameter in group.items():
        n = parameter.numel()
        parts[name] = full[offset : offset + n].view(parameter.shape).clone()
        offset += n
    return parts
