"""Meeting: Ray Train's workers in, torch's process group that they meet in out.

As Ray Train's own `TorchTrainer`, but what starts the workers imports no torch, and is of the
processes that Ray has ready: variables of its own would have Ray start a process for it, and for
each actor that it makes, one after the other. What a start waits for is `docs/performance.md`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
import ray.train
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.constants import DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from raytune_ft.storing.way import beside_driver


@dataclass
class Meeting(BackendConfig):  # type: ignore[misc]  # Ray has no types
    """How the workers of a run meet."""

    backend: str
    """Of torch.distributed: nccl or gloo."""
    timeout_s: int
    """How long a collective waits, unless told otherwise later."""

    @property
    def backend_cls(self) -> type[Backend]:
        """Return what Ray Train calls when workers start and end."""
        return ProcessGroup

    @property
    def train_func_context(self) -> Any:
        """Return what a worker's part of the training runs in."""
        return on_own_device


class ProcessGroup(Backend):  # type: ignore[misc]
    """Torch's process group of all workers; called in the controller's process."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Have all workers meet at rank 0's address."""
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(meet, backend_config, address, port)

    def on_shutdown(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Have them part, for as long as Ray Train would wait for it."""
        parting = worker_group.execute_async(part)
        with suppress(ray.exceptions.GetTimeoutError):  # their processes end anyway
            ray.get(parting, timeout=DEFAULT_TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S)


def meet(meeting: Meeting, address: str, port: int) -> None:
    """Join the process group, as `TorchTrainer` has its workers do."""
    from ray.train.torch import config as of_ray

    context = ray.train.get_context()
    os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    of_ray._set_torch_distributed_env_vars()
    of_ray._setup_torch_process_group(
        backend=meeting.backend,
        world_rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        init_method="env://",
        timeout_s=meeting.timeout_s,
    )


def part() -> None:
    """Leave the process group."""
    from ray.train.torch import config as of_ray

    of_ray._shutdown_torch(destroy_process_group=ray.train.get_context().get_world_size() > 1)


@contextmanager
def on_own_device() -> Iterator[None]:
    """Make the GPU that Ray gave this worker the one that torch takes first."""
    import torch
    from ray.train.torch import get_device

    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    yield


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer; where Ray was started by this process, its controller is plain.

    Ray Train gives the controller's process variables that this process has set for all of them
    already. Processes of a cluster that was joined have not.
    """

    def _initialize_and_run_controller(self, **parts: Any) -> Any:
        if os.environ.get("RAY_ADDRESS"):
            return super()._initialize_and_run_controller(**parts)
        actor = ray.remote(num_cpus=0)(TrainController)
        controller = actor.options(scheduling_strategy=beside_driver()).remote(**parts)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
