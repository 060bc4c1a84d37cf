"""What one rank does: the real loop, engine, guards and watchdog; the network and rows are tiny.

A scenario injures the rank that is the victim at a step.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import Position
from raytune_ft.data.report import new_report
from raytune_ft.training.batching import StepData, TensorBatch
from raytune_ft.training.engine import TorchEngine
from raytune_ft.training.guarding import failures
from raytune_ft.training.guarding.guards import Guards, guarded, starting
from raytune_ft.training.loop import Hooks, train
from raytune_ft.training.run_folder import RunFolder, append_jsonl
from raytune_ft.training.saving.checkpoint import TrainState

STEPS = 8
LOADING_S = 4.0
"""Less than a step may take."""
TELLING_S = 1.5
"""Longer than watchdogs take to write where their rank is; a real step takes longer."""


class Network(nn.Module):
    """Layers in a list, as a decoder's; one of them is injured."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.slow = 0.0
        self.last = 1.0

    def forward(self, input_ids: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = input_ids.float()
        for layer in self.layers:
            time.sleep(self.slow)
            hidden = layer(hidden)
        return hidden.square().sum() * self.last, torch.tensor(input_ids.numel())


class Rank:
    """This process as a rank of a run of eight steps."""

    def __init__(self, number: int, told: SimpleNamespace) -> None:
        self.number, self.told = number, told
        self.folder = RunFolder(told.folder)
        self.network = Network()
        self.recipe = Recipe.model_validate({
            "model": {"path": "none"},
            "data": {"sources": [{"path": "none"}], "max_length": 8},
            "train": {"epochs": 1, "accumulation": 2, "lr": 1e-2, "deepspeed": "none"},
            "chat_eval": {"every": getattr(told, "sample_every", None)},
            "checkpoint": {"every": 100},
            "run": {"collective_timeout": 5},
        })  # fmt: skip
        self.engine = TorchEngine(self.network, torch.device("cpu"), self.recipe.train)
        self.state = TrainState()
        self.stall = self.end_at = -1
        self.hooks = Hooks(
            sample=lambda _step, _when: None, validate=lambda _: None, benchmark=lambda _: None,
            record=lambda _state, _steps: None, save=lambda _: None, interrupted=lambda: False,
        )  # fmt: skip

    @property
    def injured(self) -> bool:
        return self.number == self.told.victim

    @property
    def now(self) -> bool:
        return self.state.step + 1 == self.told.at

    def data(self) -> Iterator[StepData]:
        for step in range(1, STEPS + 1):
            if step == self.stall:
                time.sleep(3600)
            if step == self.end_at:
                return
            ids = torch.full((1, 4), 0.1 * (step + self.number))
            yield StepData(
                micro_batches=[{"input_ids": ids}, {"input_ids": ids}], n_packs=2, n_targets=8,
                n_tokens=8, row_ids=[step], position=Position(int(step == STEPS), 0, step),
                epoch=0, progress=step / STEPS, report=new_report(1),
            )  # fmt: skip

    def train(self, load: Callable[[], object] = lambda: None, **guards: Any) -> None:
        asked = Guards(**{"watched": True, **guards})
        with starting(asked, self.folder, self.engine.device, LOADING_S) as watched:
            load()
            with guarded(watched, self.hooks, self.engine, self.recipe, self.folder) as hooks:
                train(self.engine, self.recipe, self.data(), self.state, STEPS, hooks, self._emit)

    def _emit(self, kind: str, **fields: object) -> None:
        if kind in ("step", "warning"):
            append_jsonl(self.folder.path / f"told_{self.number}.jsonl", {"kind": kind, **fields})

    def in_backward(self, injury: Any) -> None:
        """Do something in a step's second backward pass."""
        own = self.engine.forward_backward
        passes = iter(range(10**6))

        def injured(batch: TensorBatch, n_targets: int) -> torch.Tensor:
            if next(passes) % 2 and self.injured and self.now:
                self.network.layers[0].weight.register_hook(lambda _: injury())
            return own(batch, n_targets)

        self.engine.forward_backward = injured  # type: ignore[method-assign]


def sleeps_in_backward(rank: Rank) -> None:
    rank.in_backward(lambda: time.sleep(3600))
    rank.train()


def holds_the_interpreter(rank: Rank) -> None:
    """No thread of it can run, its watchdog included."""

    def hold() -> None:
        time.sleep(TELLING_S)
        ctypes.PyDLL(None).sleep(3600)

    rank.in_backward(hold)
    rank.train()


def is_stopped(rank: Rank) -> None:

    def stop() -> None:
        time.sleep(TELLING_S)
        os.kill(os.getpid(), signal.SIGSTOP)

    rank.in_backward(stop)
    rank.train()


def data_stalls(rank: Rank) -> None:
    rank.stall = rank.told.at if rank.injured else -1
    rank.train()


def skips_a_collective(rank: Rank) -> None:
    own = rank.engine.step

    def step(lr: float) -> float | None:
        if rank.injured and rank.now:
            rank.engine.optimizer.zero_grad()
            return 1.0
        return own(lr)

    rank.engine.step = step  # type: ignore[method-assign]
    rank.train()


def works_long_alone(rank: Rank) -> None:
    """Rank 0 answers prompts for longer than the limit, layer by layer; nobody hangs."""

    def sample(step: int, _when: str) -> None:
        if rank.number == 0 and step == rank.told.at:
            rank.network.slow = 0.25
            with torch.no_grad():
                for _ in range(11):
                    rank.network(torch.ones(1, 4))
            rank.network.slow = 0.0

    rank.hooks = replace(rank.hooks, sample=sample)
    rank.train()


def hangs_while_loading(rank: Rank) -> None:
    rank.train(lambda: time.sleep(3600 if rank.injured else 0))


def loads_slowly(rank: Rank) -> None:
    """One rank puts weights into its network and then reads a file, each for too long to wait."""

    def load() -> None:
        for _ in range(12):
            time.sleep(0.5)
            rank.network.layers[0].weight = nn.Parameter(torch.ones(4, 4))
        with Path("/dev/zero").open("rb") as file:
            for _ in range(12):
                time.sleep(0.5)
                file.read(2**23)

    if rank.injured:
        rank.train(load)
    else:
        rank.train()


def data_ends_early(rank: Rank) -> None:
    rank.end_at = rank.told.at if rank.injured else -1
    rank.train()


def loss_is_nan(rank: Rank) -> None:
    own = rank.engine.forward_backward

    def passes(batch: TensorBatch, n_targets: int) -> torch.Tensor:
        rank.network.last = float("nan") if rank.injured and rank.now else 1.0
        return own(batch, n_targets)

    rank.engine.forward_backward = passes  # type: ignore[method-assign]
    rank.train()


def gradient_is_nan(rank: Rank) -> None:
    own = rank.engine.forward_backward

    def passes(batch: TensorBatch, n_targets: int) -> torch.Tensor:
        found = own(batch, n_targets)
        if rank.injured and rank.now:
            gradient = rank.network.layers[1].weight.grad
            assert gradient is not None
            gradient[0, 0] = float("nan")
        return found

    rank.engine.forward_backward = passes  # type: ignore[method-assign]
    rank.train()


def is_asked_to_stop(rank: Rank) -> None:
    """One rank alone gets SIGTERM."""
    from raytune_ft.training.guarding.interruption import AskedToEnd

    rank.hooks = replace(
        rank.hooks,
        save=lambda state: append_jsonl(
            rank.folder.path / f"saved_{rank.number}.jsonl", {"step": state.step}
        ),
    )
    rank.in_backward(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with AskedToEnd() as asked:
        rank.train(interrupted=asked)


def main(scenario: str, number: int, told: dict[str, Any]) -> None:
    """Be a rank, in a process of its own."""
    folder = Path(told["folder"])
    log = os.open(folder / f"rank_{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), told["world"])
    dist.init_process_group("gloo", store=store, rank=number, world_size=told["world"])
    rank = Rank(number, SimpleNamespace(**told))
    failures.guard(lambda: globals()[scenario](rank), rank.folder, number)
