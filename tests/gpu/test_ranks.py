"""Two, four and eight ranks against one, each with a GPU of its own: gradients, losses, traffic.

The same global batch goes through one GPU and, divided, through several by NCCL. On a machine with
fewer GPUs the same way is gone by gloo on a CPU, with small layers and two ranks. Random weights.

    pytest tests/gpu/test_ranks.py -s -m "gpu or exact"        prints a line per comparison
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.engine import Engine, State
from tests.gpu import test_zero as one_rank
from tests.gpu.test_zero import LIMITS, LR, SPREADS, Shape, difference

GPUS = torch.cuda.device_count()
WORLDS = tuple(n for n in (2, 4, 8) if n <= max(GPUS, 2))
ON_GPU = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
ON_CPU = [
    pytest.mark.exact,
    pytest.mark.skipif(GPUS >= 2, reason="a rehearsal: the GPUs do it here"),
]
STEPS, MICRO_STEPS = 3, 8
"""Of one rank; of more, each takes its share of the micro-batches."""
SHAPE = Shape(2048, 5632, 16, 8192, 2, 512)
"""On a GPU: wide enough for its kernels, and gathered in seconds."""
START_S, CELL_S = 240, 120
STAGE_2 = "stage_2.json"
"""Gradients summed at every micro-step, which the preset `zero2` leaves out for few weights."""
ZEROS = ("none", "zero1", "zero2", STAGE_2, "zero3")
WAYS = [
    *(pytest.param("cuda", *way, marks=[pytest.mark.gpu, ON_GPU])
      for way in itertools.product(WORLDS, ("lora", "full"), ("bfloat16", "float32"), ZEROS)),
    pytest.param("cpu", 2, "lora", "bfloat16", "zero2", marks=ON_CPU),
    pytest.param("cpu", 2, "lora", "bfloat16", STAGE_2, marks=ON_CPU),
    pytest.param("cpu", 2, "full", "float32", "zero3", marks=ON_CPU),
]  # fmt: skip


def build(device: str, zero: str, method: str, dtype: str) -> Engine:
    """Make the engine of this rank."""
    if device == "cuda":
        one_rank.SHAPES["cuda"] = SHAPE
    return one_rank.build(zero, dtype, method, device)


def trained(engine: Engine, device: str, rank: int, world: int) -> tuple[State, list[float]]:
    """Return the gradient of the first step, on rank 0, and this rank's part of the losses."""
    losses, state = [], State()
    engine.accumulation = MICRO_STEPS // world  # type: ignore[attr-defined]
    passes = itertools.chain.from_iterable(one_rank.batches(device))
    for number in range(STEPS):
        step = list(itertools.islice(passes, MICRO_STEPS))
        targets = sum(int((b["labels"][:, 1:] != -100).sum()) for b in step)
        own: list[TensorBatch] = step[rank::world]
        losses.append(sum(float(engine.forward_backward(b, targets)) for b in own) / targets)
        norm = engine.step(LR)
        assert norm is not None and norm > 0
        state = state if number else engine.optimizer_state()
    names = [name for name in engine.shapes if f"{name}/exp_avg" in state]
    return {name: state[f"{name}/exp_avg"] for name in names}, losses


def environment(device: str, rank: int) -> dict[str, str]:
    """Return what the process of a rank is told: the one GPU that it sees."""
    if device == "cpu":
        return {"DS_ACCELERATOR": "cpu"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    own = visible.split(",")[rank] if visible else str(rank)
    return {"CUDA_VISIBLE_DEVICES": own, "NCCL_NVLS_ENABLE": "0", "DS_ACCELERATOR": "cuda"}


def serve(rank: int, world: int, store: str, device: str, pipe: Connection) -> None:
    """Entry of a rank: train what comes through the pipe."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=world)
    pipe.send((None, None))
    while True:
        zero, method, dtype = pipe.recv()
        try:
            engine = build(device, zero, method, dtype)
            found = trained(engine, device, rank, world)
            found = {n: g.cpu().numpy() for n, g in found[0].items()}, found[1]  # type: ignore[assignment]
            pipe.send((found, None))
            del engine
        except Exception:
            pipe.send((None, traceback.format_exc()))


class Ranks:
    """Processes that start once for each number of them; one number at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.world, self.starts = folder, 0, 0
        self.processes: list[Any] = []
        self.pipes: list[Any] = []

    def run(
        self, device: str, world: int, zero: str, method: str, dtype: str
    ) -> tuple[State, list[float]]:
        """Return the gradient and the losses of a cell, summed over ranks."""
        if self.world != world:
            self.close()
            self._start(device, world)
        named = str(self.folder / zero) if zero == STAGE_2 else zero
        for pipe in self.pipes:
            pipe.send((named, method, dtype))
        answers = self._answers(CELL_S)
        losses = [sum(parts) for parts in zip(*(a[1] for a in answers), strict=True)]
        return {name: torch.from_numpy(g) for name, g in answers[0][0].items()}, losses

    def _start(self, device: str, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.world, self.starts = world, self.starts + 1
        store = (
            f"file://{self.folder}/store_{self.starts}"  # never one that ranks before have filled
        )
        for rank in range(world):
            ours, theirs = context.Pipe()
            arguments = (rank, world, store, device, theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            with pytest.MonkeyPatch.context() as patch:  # before torch is imported there
                for key, value in environment(device, rank).items():
                    patch.setenv(key, value)
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self._answers(START_S)

    def _answers(self, seconds: float) -> list[Any]:
        answers: dict[int, Any] = {}
        ends = time.monotonic() + seconds
        while len(answers) < self.world:
            left = [p for i, p in enumerate(self.pipes) if i not in answers]
            ready = wait(left, max(0.0, ends - time.monotonic()))
            assert ready, f"ranks {set(range(self.world)) - set(answers)} hang"
            for pipe in ready:
                number = self.pipes.index(pipe)
                answers[number], error = pipe.recv()  # type: ignore[union-attr]
                if error is not None:
                    self.close()  # the others may wait for it
                    pytest.fail(f"rank {number}:\n{error}")
        return [answers[number] for number in range(self.world)]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.processes, self.pipes, self.world = [], [], 0


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    running = Ranks(tmp_path_factory.mktemp("ranks"))
    stage_2 = {"zero_optimization": {"stage": 2, "overlap_comm": GPUS >= 2}}
    (running.folder / STAGE_2).write_text(json.dumps(stage_2))
    yield running
    running.close()


@pytest.fixture(scope="module")
def alone() -> Any:
    """Give what one rank of plain torch does: (device, method, dtype) -> gradient, losses."""
    known: dict[tuple[str, str, str], tuple[State, list[float]]] = {}

    def of(device: str, method: str, dtype: str) -> tuple[State, list[float]]:
        key = (device, method, dtype)
        if key not in known:
            known[key] = trained(build(device, "none", method, dtype), device, 0, 1)
        return known[key]

    return of


@pytest.mark.parametrize(("device", "world", "method", "dtype", "zero"), WAYS)
def test_ranks_have_the_gradient_of_one(
    device: str, world: int, method: str, dtype: str, zero: str, ranks: Ranks, alone: Any
) -> None:
    """bfloat16 may be as far from float32 on one rank as bfloat16 on one rank is itself."""
    exact, _ = alone(device, method, "float32")
    expected, losses = alone(device, method, dtype)
    gradient, found = ranks.run(device, world, zero, method, dtype)
    error, own = difference(gradient, exact), difference(expected, exact)
    drift = max(abs(a - b) / b for a, b in zip(found, losses, strict=True))
    print(
        f"\n{world} ranks {device} {method} {dtype} {zero}: gradient {error:.1e} off float32 of "
        f"one rank, one rank itself {own:.1e}; losses {found[0]:.5f} to "
        f"{found[-1]:.5f}, {drift:.1e} apart"
    )
    limit = LIMITS[dtype] if dtype == "float32" else SPREADS.get(zero, 1.05) * own
    assert error <= limit
    assert drift <= LIMITS[dtype]
