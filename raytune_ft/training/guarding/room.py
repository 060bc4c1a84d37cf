"""Room: what becomes of a batch that does not fit into memory.

An automatic layout (`train.layout`) gives way to the next that takes less memory. Else
`train.on_oom: stop` says what was asked for and which settings would help, and `halve` divides the
micro-batch and multiplies the accumulation. Both hold on all ranks and for the rest of the run: a
step's packs stay the same, and so do its gradients. What is in force stands in the run folder's
`room.json`, for workers that are started again.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from raytune_ft.config.estimates.layout import Choice, Layout
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import MemoryPlanError
from raytune_ft.training.batching import StepData
from raytune_ft.training.engine import Engine, TorchEngine, ZeroEngine
from raytune_ft.training.guarding.failures import Elsewhere, Retry
from raytune_ft.training.laid_out import lay_out
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
    choice: Choice | None = None
    """The automatic layout that the run began with; None: the recipe's own numbers."""
    layout: Layout | None = None
    """As it is now; None as `choice` is."""

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        folder: Path | None = None,
        tell: Callable[[str], object] = lambda _: None,
        choice: Choice | None = None,
    ) -> Room:
        """Begin with a recipe's sizes, or with those that its run came down to earlier.

        Args:
            recipe: as it was asked for.
            folder: of the run; None: nothing is kept.
            tell: says what changes.
            choice: its automatic layout, if it has one.
        """
        file = folder / FILE if folder else None
        kept = read_json(file) if file is not None and file.is_file() else None
        train = recipe.train
        room = cls(recipe, train.micro_batch_size, train.accumulation, file, tell, choice)
        if choice is not None:
            room._enter(choice.layout)
        if kept is not None and kept["asked"] == room._asked():
            room._go_to(kept["now"])
        return room

    @property
    def objective(self) -> str:
        """Of the recipe."""
        return self.recipe.train.objective

    @property
    def is_resident(self) -> bool:
        """Whether the fast path's layers keep NF4 weights unpacked."""
        return self.layout is not None and self.layout.resident

    @property
    def hosted(self) -> tuple[str, ...]:
        """What lies on the host, by the names of `setting.LADDER`."""
        return () if self.layout is None else self.layout.hosted

    @property
    def loses_more(self) -> bool:
        """Whether there is something smaller to go on with, and it may be done."""
        if self.choice is not None:
            return bool(self._smaller())
        return self.recipe.train.on_oom == "halve" and self.micro_batch_size > 1

    def fitting(self) -> Recipe:
        """Return the recipe with the sizes as they are now."""
        if self.choice is not None and self.layout is not None:
            return self.layout.applied(self.recipe, self.choice.layers)
        sizes = {"micro_batch_size": self.micro_batch_size, "accumulation": self.accumulation}
        return self.recipe.model_copy(update={"train": self.recipe.train.model_copy(update=sizes)})

    def put(self, engine: Engine) -> None:
        """Let an engine that was built in another layout go on in this one, between two steps."""
        if self.layout is not None:
            for line in lay_out(engine.module.model, self.layout):
                self.tell(line)
        if isinstance(engine, ZeroEngine):
            engine.accumulation = self.accumulation
        if engine.micro is not None:
            engine.micro.close()  # its graphs are of the layout before

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
            self.put(engine)
            data = data.remade()

    def shrink(self, problem: str) -> None:
        """Go on with less memory per pass; raise `problem` if that is not to be, or cannot be.

        An automatic layout gives way to its next smaller one, whatever `train.on_oom` says: it was
        not the recipe that asked for it. A recipe's micro-batch is divided by its smallest factor.
        """
        if problem == ELSEWHERE and self.choice is None and self.recipe.train.on_oom == "stop":
            raise Elsewhere(problem)
        if not self.loses_more:
            raise MemoryPlanError(f"{problem}; {self.advice()}")
        before = self._said("")
        if self.choice is not None:
            self._enter(self._smaller()[0])
        else:
            factor = _smallest_factor(self.micro_batch_size)
            self.micro_batch_size //= factor
            self.accumulation *= factor
        now = self._said("train.micro_batch_size ")
        if self.file is not None:
            write_json(self.file, {"asked": self._asked(), "now": self._now(), "why": problem})
        self.tell(f"{problem}; going on with {now} instead of {before}: the same steps")

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
        if self.choice is None and self.micro_batch_size > 1:
            factor = _smallest_factor(self.micro_batch_size)
            ways.append(
                f"train.micro_batch_size={self.micro_batch_size // factor} "
                f"train.accumulation={self.accumulation * factor}, the same mathematics"
            )
        if self.choice is None and model.gradient_checkpointing is False:
            ways.append("model.gradient_checkpointing=true")
        if model.method == "full":
            ways.append("model.method=lora")
        elif model.quantization != "nf4":
            ways.append("model.quantization=nf4")
        if not train.optimizer.startswith("paged"):
            ways.append("train.optimizer=paged_adamw_32bit")
        ways.append(f"data.max_length={self.recipe.data.max_length // 2}")
        return f"set {'; or '.join(ways)}"

    def _said(self, field: str) -> str:
        if self.choice is not None and self.layout is not None:
            return self.layout.said(self.choice.layers)
        between = " x accumulation " if field else " x "
        return f"{field}{self.micro_batch_size}{between}{self.accumulation}"

    def _smaller(self) -> tuple[Layout, ...]:
        """Return what takes less memory than the layout as it is now, the fastest first."""
        if self.choice is None:
            return ()
        known = [self.choice.layout, *self.choice.smaller]
        return tuple(known[known.index(self.layout) + 1 :]) if self.layout in known else ()

    def _enter(self, layout: Layout) -> None:
        self.layout = layout
        self.micro_batch_size, self.accumulation = layout.micro_batch_size, layout.accumulation

    def _asked(self) -> Any:
        """Return what the sizes are an answer to: of another wish or layout nothing is kept."""
        if self.choice is not None:
            return {**self.choice.asked, "began_with": self.choice.layout.to_json()}
        return [self.recipe.train.micro_batch_size, self.recipe.train.accumulation]

    def _now(self) -> Any:
        sizes = [self.micro_batch_size, self.accumulation]
        return sizes if self.layout is None else self.layout.to_json()

    def _go_to(self, now: Any) -> None:
        if self.choice is not None:
            self._enter(Layout(**now))
        else:
            self.micro_batch_size, self.accumulation = now


def _drop_gradients(engine: TorchEngine) -> None:
    engine.drop_gradients()
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
