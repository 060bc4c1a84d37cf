"""Room: what becomes of a batch that does not fit into memory.

`train.on_oom: stop` says what was asked for and which settings would help. `halve` divides the
micro-batch and multiplies the accumulation, on all ranks and for the rest of the run: a step's
packs stay the same, and so do its gradients. The new numbers stand in the run folder's `room.json`,
for workers that are started again.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import MemoryPlanError
from raytune_ft.training.batching import StepData
from raytune_ft.training.engine import Engine, TorchEngine
from raytune_ft.training.guarding.failures import Elsewhere, Retry
from raytune_ft.training.run_folder import read_json, write_json

FILE = "room.json"
ELSEWHERE = "on another rank"
T = TypeVar("T")


@dataclass
class Room:
    """A run's micro-batch and accumulation as they are now; `batching.Sizes`."""

    recipe: Recipe
    """As it was asked for."""
    micro_batch_size: int
    accumulation: int
    file: Path | None = None
    """Where they are kept; None: nowhere."""
    tell: Callable[[str], object] = lambda _: None

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        folder: Path | None = None,
        tell: Callable[[str], object] = lambda _: None,
    ) -> Room:
        """Begin with a recipe's sizes, or with those that its run came down to earlier."""
        micro, accumulation = asked = [recipe.train.micro_batch_size, recipe.train.accumulation]
        file = folder / FILE if folder else None
        if file is not None and file.is_file() and (kept := read_json(file))["asked"] == asked:
            micro, accumulation = kept["now"]
        return cls(recipe, micro, accumulation, file, tell)

    @property
    def objective(self) -> str:
        """Of the recipe."""
        return self.recipe.train.objective

    def fitting(self) -> Recipe:
        """Return the recipe with the sizes as they are now."""
        sizes = {"micro_batch_size": self.micro_batch_size, "accumulation": self.accumulation}
        return self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update=sizes)})

    def take(self, step: Callable[[StepData], T], engine: Engine, data: StepData, number: int) -> T:
        """Take a step, in smaller micro-batches where its own do not fit, if the recipe says so.

        Raises:
            MemoryPlanError: says what was asked for and what to change.
            Retry: in smaller micro-batches the workers have to be started again.
        """
        while True:
            try:
                return step(data)
            except torch.OutOfMemoryError as error:
                problem = self.described(error, f"step {number}", data.row_ids)
            # behind the handler: the error's frames hold what it found too large
            self.shrink(problem)
            if not isinstance(engine, TorchEngine) or data.remade is None:
                raise Retry(problem)
            _drop_gradients(engine)
            data = data.remade()

    def shrink(self, problem: str) -> None:
        """Divide the micro-batch by its smallest factor; raise `problem` if that is not to be."""
        if problem == ELSEWHERE and self.recipe.train.on_oom == "stop":
            raise Elsewhere(problem)
        if self.recipe.train.on_oom == "stop" or self.micro_batch_size == 1:
            raise MemoryPlanError(f"{problem}; {self.advice()}")
        factor = _smallest_factor(self.micro_batch_size)
        before = self.micro_batch_size, self.accumulation
        self.micro_batch_size //= factor
        self.accumulation *= factor
        if self.file is not None:
            asked = [self.recipe.train.micro_batch_size, self.recipe.train.accumulation]
            now = [self.micro_batch_size, self.accumulation]
            write_json(self.file, {"asked": asked, "now": now, "why": problem})
        self.tell(
            f"{problem}; going on with train.micro_batch_size {self.micro_batch_size} x "
            f"accumulation {self.accumulation} instead of {before[0]} x {before[1]}: the same steps"
        )

    def described(self, error: torch.OutOfMemoryError, when: str, rows: list[int]) -> str:
        """Say which batch asked for how much of what there is."""
        text = str(error)
        if text == ELSEWHERE:
            return ELSEWHERE
        batch = f"{self.micro_batch_size} x {self.recipe.data.max_length} tokens"
        of_rows = f" (rows {', '.join(map(str, rows[:5]))})" if rows else ""
        return f"{when}: a batch of {batch}{of_rows} does not fit into memory{_bytes_in(text)}"

    def advice(self) -> str:
        """Name the settings that would make it fit, the least costly first."""
        model, train = self.recipe.model, self.recipe.train
        ways = []
        if self.micro_batch_size > 1:
            factor = _smallest_factor(self.micro_batch_size)
            ways.append(
                f"train.micro_batch_size={self.micro_batch_size // factor} "
                f"train.accumulation={self.accumulation * factor}, the same mathematics"
            )
        if model.gradient_checkpointing is False:
            ways.append("model.gradient_checkpointing=true")
        if model.method == "full":
            ways.append("model.method=lora")
        elif model.quantization != "nf4":
            ways.append("model.quantization=nf4")
        if not train.optimizer.startswith("paged"):
            ways.append("train.optimizer=paged_adamw_32bit")
        ways.append(f"data.max_length={self.recipe.data.max_length // 2}")
        return f"set {'; or '.join(ways)}"


def _drop_gradients(engine: TorchEngine) -> None:
    for parameter in engine.trained.values():
        parameter.grad = None
    engine.optimizer.zero_grad(set_to_none=True)
    gc.collect()
    if engine.device.type == "cuda":
        torch.cuda.empty_cache()


def _smallest_factor(number: int) -> int:
    return next(n for n in range(2, number + 1) if number % n == 0)


def _bytes_in(text: str) -> str:
    """Read from torch's message what was asked for, in use and there; nothing if it says less."""
    asked = re.search(r"allocate ([\d.]+ [KMG]iB)", text)
    whole = re.search(r"total capacity of ([\d.]+ [KMG]iB)", text)
    free = re.search(r"of which ([\d.]+ [KMG]iB) is free", text)
    used = re.search(r"this process has ([\d.]+ [KMG]iB) memory in use", text, re.IGNORECASE)
    parts = [f"asked for {asked[1]}"] if asked else []
    if used:
        parts.append(f"{used[1]} in use")
    if allowed := re.search(r"([\d.]+ [KMG]iB) allowed", text):
        parts.append(f"{allowed[1]} allowed")
    elif free and whole:
        parts.append(f"{free[1]} free of {whole[1]}")
    return f": {', '.join(parts)}" if parts else ""
