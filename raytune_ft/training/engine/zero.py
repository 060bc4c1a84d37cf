"""DeepSpeed ZeRO around the same module: stages 1, 2 and 3, with or without offload.

DeepSpeed divides gradients by the number of ranks; that is multiplied back, because the loss here
is already divided by the token count of the whole step. Where a step ends is said to DeepSpeed,
never counted by it. What travels when stands in docs/scaling.md.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.config.estimates.footprint import bucket_elements
from raytune_ft.config.schema import TrainSection
from raytune_ft.config.zero import sums_once
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.engine.base import Engine, State, rank, world_size
from raytune_ft.training.engine.scaling import LossScale
from raytune_ft.training.engine.shards import Flat, flats_of
from raytune_ft.training.engine.sums import BorderSums
from raytune_ft.training.optim import build_optimizer, restore, set_lr


class ZeroEngine(Engine):
    """Optimizer state, gradients (stage 2) and weights (stage 3) are spread over the ranks."""

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        train: TrainSection,
        config: dict[str, Any],
        *,
        b_lr_ratio: float | None = None,
    ) -> None:
        """Wrap `module`; `config` is `presets.resolve`'s, `b_lr_ratio` is `build_optimizer`'s."""
        super().__init__(module, device)
        import deepspeed

        quiet_deepspeed(on_gpu=device.type == "cuda")
        _ensure_process_group(device)
        # what DeepSpeed asks its launcher for is the number of its device
        os.environ["LOCAL_RANK"] = str(device.index or 0)
        count = sum(p.numel() for p in self.trained.values())
        config["zero_optimization"].setdefault("reduce_bucket_size", bucket_elements(count))
        if sums_once(train.deepspeed, count, train.accumulation):
            config["zero_optimization"]["stage"] = 1
        _check_half(config)
        # Its bfloat16 stage 1 prints memory tables, and keeps views of weights. If those had a
        # graph, it would tie all gradients to today's stream, where no capture may add them up.
        with redirect_stdout(io.StringIO()), torch.no_grad():
            self.engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(self.trained, train, b_lr_ratio),
                model_parameters=list(self.trained.values()),
                config=config,
                dist_init_required=False,
            )
        self.zero: Any = self.engine.optimizer
        self.stage: int = config["zero_optimization"]["stage"]
        self.scaler = self.zero.loss_scaler if config["fp16"]["enabled"] else None
        if self.scaler is not None:
            self.scaler.raise_error_at_min_scale = False  # the loop counts, and names the rows
        self.accumulation = train.accumulation
        self.micro_batches = 0
        names = {id(p): name for name, p in self.trained.items()}
        self.flats = list(flats_of(self.zero, names))
        self.sums: BorderSums | None = None
        if BorderSums.are_kept(self.zero):
            self.sums = BorderSums(self.engine, self.trained)

    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        share = world_size() / n_targets
        if self.sums is not None:
            if self.micro is not None and (found := self.micro.take(batch, share)) is not None:
                return found
            loss_sum, _ = self.module(**self.put(batch))
            (loss_sum * share).backward()
            return loss_sum.detach()  # type: ignore[no-any-return]
        self.micro_batches += 1
        self.engine.set_gradient_accumulation_boundary(self.micro_batches == self.accumulation)
        loss_sum, _ = self.engine(**self.put(batch))
        self.engine.backward(loss_sum * share, scale_wrt_gas=False)
        if self.micro_batches < self.accumulation:
            self.engine.step()
        return loss_sum.detach()  # type: ignore[no-any-return]

    def step(self, lr: float) -> float | None:
        self.micro_batches = 0
        if self.sums is not None:
            self.engine.set_gradient_accumulation_boundary(True)
            self.sums.finish()
        set_lr(self.zero, lr)
        skipped = self.engine.skipped_steps
        self.engine.step()
        if self.engine.skipped_steps == skipped:
            return float(self.engine.get_global_grad_norm())
        return None if self.scaler is not None else float("inf")

    @property
    def sums_apart(self) -> bool:
        return self.sums is not None

    def places(self) -> State:
        return {} if self.sums is None else self.sums.places

    def optimizer_state(self) -> State:
        state: State = {}
        for flat in self.flats:
            for key, value in sorted(self.zero.optimizer.state.get(flat.tensor, {}).items()):
                if not torch.is_tensor(value) or value.numel() == 1:
                    scalar = torch.as_tensor(value).cpu()
                    state |= {f"{n}/{key}": scalar.clone() for n in flat.places}
                elif value.shape == flat.tensor.shape:
                    state |= {f"{n}/{key}": t for n, t in self._whole(flat, value).items()}
                else:
                    raise CheckpointError(
                        f"train.optimizer keeps '{key}' in blocks, which ZeRO cannot re-shard; "
                        "use adamw or paged_adamw_32bit, or train.deepspeed: none"
                    )
        return {**state, **self._scale().state()} if rank() == 0 else {}

    def weights(self) -> State:
        found: State = {}
        for flat in self.flats:
            found |= self._whole(flat, flat.tensor.data)
        return found

    def _whole(self, flat: Flat, values: torch.Tensor) -> State:
        gathered = {name: flat.gather(values, name) for name in flat.places}
        return {n: t.view(self.shapes[n]).clone() for n, t in gathered.items() if t is not None}

    def load(self, weights: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> None:
        self._check(weights)
        with torch.no_grad():
            for flat in self.flats:
                for name in flat.places:
                    flat.scatter(weights[name], name, flat.tensor.data)
                self._load_state(flat, state)
            self._to_model(weights)
        scale = self._scale()
        scale.load(state)
        if self.scaler is not None:
            self.scaler.cur_scale = scale.factor
            self.scaler.cur_iter, self.scaler.last_overflow_iter = scale.clean_steps, -1

    def _load_state(self, flat: Flat, state: Mapping[str, torch.Tensor]) -> None:
        keys = sorted({k.rpartition("/")[2] for k in state if k.rpartition("/")[0] in flat.places})
        own: State = {}
        for key in keys:
            parts = {name: state[f"{name}/{key}"] for name in flat.places}
            first = next(iter(parts.values()))
            if first.ndim == 0:
                own[f"flat/{key}"] = first
                continue
            if any(part.shape != self.shapes[name] for name, part in parts.items()):
                raise CheckpointError(
                    f"the checkpoint keeps '{key}' in blocks, which ZeRO cannot shard; resume "
                    "with train.deepspeed: none"
                )
            shard = own[f"flat/{key}"] = torch.zeros_like(flat.tensor.data, dtype=first.dtype)
            for name, part in parts.items():
                flat.scatter(part, name, shard)
        with self._stepped(flat):
            restore(self.zero.optimizer, {"flat": flat.tensor}, own)

    @contextmanager
    def _stepped(self, flat: Flat) -> Iterator[None]:
        """Show a flat tensor to the optimizer, as stage 3 does for each step alone."""
        group = self.zero.optimizer.param_groups[flat.group]
        shown = group["params"]
        group["params"] = [flat.tensor]
        try:
            yield
        finally:
            group["params"] = shown

    def _to_model(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Give the model what the flat tensors hold now."""
        if self.stage < 3:
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])
            return
        # small ones stay whole between steps, and are gathered anew only where they are not
        self.zero._partition_all_parameters()
        for index in range(len(self.flats)):
            self.zero._reassign_or_swap_out_partitioned_parameters(index)
        if kept := self.zero.persistent_parameters:
            kept[0].all_gather(kept)

    def _scale(self) -> LossScale:
        if self.scaler is None:
            return LossScale(dynamic=False)
        clean_steps = self.scaler.cur_iter - self.scaler.last_overflow_iter - 1
        return LossScale(True, float(self.scaler.cur_scale), clean_steps)

    @contextmanager
    def whole(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        offload = self.zero.parameter_offload
        with GatheredParameters(list(self.module.parameters())):
            for hook in [*offload.forward_hooks, *offload.backward_hooks]:
                hook.remove()  # they would give the weights back behind each layer
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)


def _check_half(config: dict[str, Any]) -> None:
    """Refuse float16 where DeepSpeed's accelerator does not compute it: most CPUs."""
    from deepspeed.accelerator import get_accelerator

    if config["fp16"]["enabled"] and not get_accelerator().is_fp16_supported():
        raise RecipeError(
            "model.dtype: float16 is not computed here under train.deepspeed; set model.dtype: "
            "float32, or train.deepspeed: none"
        )


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
    # torch 2.13 renames the collectives that stage 3 calls, and says so at every call
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if not on_gpu:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
