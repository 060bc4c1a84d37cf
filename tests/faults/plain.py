"""A worker without Ray on a tiny model, killed at uniformly random instants and started again.

The process that runs these trials has imported everything and computed nothing, so that a child
made by fork begins to train at once. A trial is one run: killed and taken up again, up to
`MOST_KILLS` times, then let to its end and compared with an undisturbed run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Pack, Position
from raytune_ft.data.places import Placed, iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.training import worker
from raytune_ft.training.run_folder import RunFolder, append_jsonl, read_jsonl, write_json
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.worker import Job
from tests.faults.verdict import Kill, Verdict, compare, compare_rounded

MOST_KILLS = 4
DEADLINE_S = 240.0
ALONE_S = 0.3
"""Longest that ranks live behind a killed one, until they are ended."""
ROWS = 64
VARIANTS: dict[str, dict[str, Any]] = {
    "torch": {"train": {"deepspeed": "none"}},
    "zero2": {"train": {"deepspeed": "zero2"}},
    "ranks": {"train": {"deepspeed": "zero2", "accumulation": 1}, "run": {"workers": 2}},
    "full": {"train": {"deepspeed": "none"}, "model": {"method": "full"}},
}
"""What is trained: an adapter by plain torch, by ZeRO-2, by two processes, or all weights."""
WORLD = "worlds"
"""Name of the run whose number of processes changes."""
SHARES = ["torch"] * 5 + ["zero2"] * 2 + ["ranks"] * 2 + ["full"]


def recipe_of(model: Path, rows: Path, variant: str, every: int = 2) -> Recipe:
    """Three epochs with dropout and packing, held-out rows and answers on the way."""
    changes = VARIANTS[variant]
    return Recipe.model_validate({
        "model": {"path": str(model), **changes.get("model", {})},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"sources": [{"path": str(rows)}], "max_length": 96, "window": 16,
                 "validation": 0.125},
        "train": {"epochs": 3, "accumulation": 2, "lr": 5e-3, "warmup_steps": 4,
                  **changes.get("train", {})},
        "eval": {"every": 5},
        "checkpoint": {"every": every, "keep": 2},
        "chat_eval": {"every": 6, "prompts": ["what is red?"], "max_new_tokens": 4},
        "run": {"trackers": [], **changes.get("run", {})},
    })  # fmt: skip


def train(recipe: Recipe, folder: Path, rank: int, events: Path) -> None:
    """Be one process of a run, from wherever it is to its end."""
    tokenizer = TextTokenizer.from_folder(recipe.model.path)
    encoder = Encoder.of(recipe, tokenizer)
    opened = sources.open_sources(recipe.data, recipe.train.seed)
    training, held_out = sources.split_validation(opened, recipe.data, recipe.train.seed)
    assert held_out is not None
    feed = make_feed(training, encoder, recipe.train.seed)
    aside = make_feed(held_out, encoder, recipe.train.seed)
    epochs = recipe.train.epochs

    def packs(start: Position) -> Iterator[Placed]:
        return iter_packs(feed, start, epochs=epochs)

    def validation() -> Iterator[Pack]:
        return (placed.pack for placed in iter_packs(aside, epochs=1))

    def show(event: dict[str, Any]) -> None:
        name = event.get("name", event["kind"])
        line = {"at": time.monotonic(), "what": name, "step": event.get("step")}
        append_jsonl(events, line)

    if rank == 0:
        run = RunFolder(folder)
        write_json(folder / "run.json", {"status": "running"})
        write_json(folder / "data.json", {"rows": len(training), "formats": [], "steps": 9})
        watch_saving(show)
    job = Job(
        recipe.model_dump(mode="json"), str(folder), recipe.model.path,
        expected_steps=9, sharing=64, data_fingerprint=training.fingerprint,
    )  # fmt: skip
    worker.run(job, packs, validation, show)
    if rank == 0:
        run.update(status="done")


def watch_saving(show: Any) -> None:
    """Say when a save begins and ends; what it does stays as it is."""
    real = checkpoint.save

    def save(*args: Any, **options: Any) -> Path:
        show({"kind": "saving"})
        folder = real(*args, **options)
        show({"kind": "saved"})
        return folder

    checkpoint.save = save


@dataclass
class Attempt:
    """The processes of one start of a run."""

    folder: Path
    recipe: Recipe
    number: int

    def __post_init__(self) -> None:
        self.events = self.folder.parent / f"{self.folder.name}.events"
        self.pids = [self._fork(rank) for rank in range(self.recipe.run.workers)]

    def _fork(self, rank: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        log = os.open(f"{self.folder}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        try:
            self._join(rank)
            train(self.recipe, self.folder, rank, self.events)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        os._exit(0)

    def _join(self, rank: int) -> None:
        workers = self.recipe.run.workers
        if workers > 1:
            import torch.distributed as dist

            store = f"file://{self.folder}.store_{self.number}"
            dist.init_process_group("gloo", init_method=store, rank=rank, world_size=workers)

    def wait(self, seconds: float, chance: random.Random) -> Kill | None:
        """Let it run; after so many seconds kill one of its processes and end the others.

        Returns:
            The kill, or None if it came to its end before.
        """
        begun = time.monotonic()
        while time.monotonic() < begun + seconds:
            if self._ended():
                return None
            time.sleep(0.002)
        rank = chance.randrange(len(self.pids))
        os.kill(self.pids[rank], signal.SIGKILL)
        at = time.monotonic()
        if len(self.pids) > 1:
            time.sleep(chance.uniform(0.0, ALONE_S))
        self._end()
        told = list(read_jsonl(self.events))
        steps = [line["step"] for line in read_jsonl(RunFolder(self.folder).metrics)]
        phase = told[-1]["what"] if told and told[-1]["at"] > begun else "start"
        if phase in ("step", "saved", "warning", "rows", "resumed", "checkpoint"):
            phase = "train"
        return Kill(
            at=at, after_s=at - begun, victim=f"rank {rank}", phase=phase,
            step=max(steps, default=0), every=int(self.recipe.checkpoint.every),
        )  # fmt: skip

    def _ended(self) -> bool:
        """Tell whether all processes have ended well; RuntimeError if one has not."""
        for pid in self.pids:
            found, status = os.waitpid(pid, os.WNOHANG)
            if found and status:
                self.pids.remove(pid)
                self._end()
                log = Path(f"{self.folder}.log").read_text(errors="replace")
                raise RuntimeError(f"a process of {self.folder} failed:\n{log[-2000:]}")
            if found:
                self.pids = [other for other in self.pids if other != pid]
        return not self.pids

    def _end(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def run_trial(inputs: Path, folder: Path, seed: int) -> Verdict:
    """Kill and go on until the run has ended; compare it with the undisturbed one.

    Args:
        inputs: what `prepare` made.
        folder: new folder of this run.
        seed: decides variant, intervals between saves, victims and instants.
    """
    model, rows, wholes = inputs / "model", inputs / "rows.jsonl", inputs / "plain"
    chance = random.Random(seed)
    variant = chance.choice(SHARES)
    life_s = json.loads((wholes / f"{variant}.json").read_text())["seconds"]
    kills: list[Kill] = []
    folder.mkdir(parents=True)
    for number in range(MOST_KILLS + 1):
        recipe = recipe_of(model, rows, variant, chance.choice([1, 2, 3]))
        attempt = Attempt(folder, recipe, number)
        instant = chance.uniform(0, life_s) if number < MOST_KILLS else DEADLINE_S
        kill = attempt.wait(instant, chance)
        if kill is None:
            break
        kills.append(kill)
    follow(folder, kills)
    return compare(seed, variant, folder, wholes / variant, kills)


def run_world(inputs: Path, folder: Path, seed: int) -> Verdict:
    """Kill a run and go on with two processes, one, two ... in its place.

    Dropout is off: ranks draw their own.
    """
    chance = random.Random(seed)
    whole = inputs / "plain" / WORLD
    life_s = json.loads((inputs / "plain" / f"{WORLD}.json").read_text())["seconds"]
    kills: list[Kill] = []
    folder.mkdir(parents=True)
    for number in range(MOST_KILLS + 1):
        recipe = with_ranks(inputs, 2 - (seed + number) % 2, chance.choice([1, 2, 3]))
        instant = chance.uniform(0, life_s) if number < MOST_KILLS else DEADLINE_S
        kill = Attempt(folder, recipe, number).wait(instant, chance)
        if kill is None:
            break
        kills.append(kill)
    follow(folder, kills)
    return compare_rounded(seed, WORLD, folder, whole, kills)


def with_ranks(inputs: Path, workers: int, every: int) -> Recipe:
    """Return the recipe of `run_world` for so many processes."""
    recipe = recipe_of(inputs / "model", inputs / "rows.jsonl", "zero2", every)
    train = recipe.train.model_copy(update={"accumulation": 4 // workers})
    return recipe.model_copy(update={
        "lora": recipe.lora.model_copy(update={"dropout": 0.0}),
        "train": train,
        "run": recipe.run.model_copy(update={"workers": workers}),
    })  # fmt: skip


def follow(folder: Path, kills: list[Kill]) -> None:
    """Fill in what came after each kill: the step it went on from, seconds to a new step."""
    told = list(read_jsonl(folder.parent / f"{folder.name}.events"))
    for kill in kills:
        later = [line for line in told if line["at"] > kill.at]
        kill.resumed = next((e["step"] for e in later if e["what"] == "train"), None)
        new = (e["at"] for e in later if e["what"] == "step" and e["step"] > kill.step)
        first = next(new, None)
        kill.recovery_s = None if first is None else first - kill.at


def load() -> None:
    """Import what a worker needs, so that its children need not."""
    import deepspeed
    import peft
    import transformers.models.llama.modeling_llama
    import transformers.pytorch_utils

    assert deepspeed and peft and transformers


def prepare(inputs: Path) -> None:
    """Run every variant without a kill; note the seconds that it took.

    Args:
        inputs: folder with `model` and `rows.jsonl`; gets `plain/VARIANT` and its `.json`.
    """
    recipes = {name: recipe_of(inputs / "model", inputs / "rows.jsonl", name) for name in VARIANTS}
    for name, recipe in {**recipes, WORLD: with_ranks(inputs, 1, 2)}.items():
        folder = inputs / "plain" / name
        folder.mkdir(parents=True)
        begun = time.monotonic()
        if Attempt(folder, recipe, 0).wait(DEADLINE_S, random.Random(0)) is not None:
            raise RuntimeError(f"{folder}: not ended after {DEADLINE_S} s")
        seconds = {"seconds": time.monotonic() - begun}
        (folder.parent / f"{name}.json").write_text(json.dumps(seconds))
