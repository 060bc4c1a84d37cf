"""`python -m raytune_ft.train --config NAME_OR_FILE [key=value ...]`: the whole way of one run.

Read top to bottom: recipe -> rows -> a feeder, which has windows of packs made -> Ray Train
workers, each running `training.worker.run` on its share of one sequence -> report and summary.
"""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from rich.console import Console

from raytune_ft import errors, survey
from raytune_ft.cluster import noise_to, ray_session
from raytune_ft.config.schema import Recipe
from raytune_ft.data.feeder import Supply, feeding
from raytune_ft.preparation import Prepared, new_folder, prepare, removed_unless_started
from raytune_ft.resume import open_run, resumable
from raytune_ft.screen import Screen
from raytune_ft.training import report, worker
from raytune_ft.training.run_folder import Event, RunFolder, append_jsonl, read_jsonl

POLL_SECONDS = 0.2
FAILURES = "failures.jsonl"
CPUS_PER_WORKER = 0.5
"""Less than a core, so that several workers find room on a small machine."""
DATA_TASKS = 2
"""Windows of rows made at once; a core tokenises for several GPUs."""


def train(recipe: Recipe, *, source: str, resume: str | None = None) -> int:
    """Train a recipe; return the exit code.

    Args:
        recipe: with `resume`, the recipe of that run.
        source: what the user called the recipe, for the run's name and record.
        resume: folder of a run to go on with, from its last checkpoint.
    """
    survey.check_names(recipe)
    survey.check_deepspeed(recipe)
    folder = open_run(resume) if resume else new_folder(recipe, source)
    if folder is None:
        return 0
    with (
        removed_unless_started(folder),
        resumable(folder, shown(folder)),
        noise_to(folder.path / "run.log") as terminal,
    ):
        screen = Screen(
            recipe.train.log_every,
            console=Console(file=terminal, highlight=False),
        )
        with screen.live():
            screen.stage("ray")
            with ray_session():
                prepared = prepare(recipe, folder, source, screen)
                with feeding(
                    prepared.kinds,
                    readers=recipe.run.workers,
                    at_once=max(DATA_TASKS, recipe.run.workers),
                    shared_folder=folder.path.parent,
                    begin=() if resume else ("train",),
                ) as supply:
                    fit(prepared, supply, folder, screen)
                    folder.update(windows_made=supply.state("train")["made"])
            screen.stage("report")
            report.write_report(folder)
        folder.update(status="done")
        screen.summary(report.summarize(folder), shown(folder), next_commands(folder))
    return 0


def fit(prepared: Prepared, supply: Supply, folder: RunFolder, screen: Screen) -> None:
    """Run the workers to the end; TrainingError, or the error of the worker, otherwise."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    recipe = Recipe.model_validate(prepared.job.recipe)
    (folder.path / FAILURES).unlink(missing_ok=True)  # of an earlier attempt, now resumed
    on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
    mailbox = ray.remote(num_cpus=0)(Mailbox).remote()
    trainer = TorchTrainer(
        train_loop_per_worker,
        train_loop_config={"job": prepared.job, "supply": supply, "mailbox": mailbox},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=600),
        scaling_config=ScalingConfig(
            num_workers=recipe.run.workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": CPUS_PER_WORKER, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"attempt_{os.getpid()}",
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(max_failures=recipe.run.max_failures),
        ),
    )
    screen.stage("workers")
    with watched(mailbox, screen):
        try:
            trainer.fit()
        except ray.train.TrainingFailedError as error:
            folder.update(status="failed")
            raise errors.TrainingError(
                f"a worker was lost {recipe.run.max_failures + 1} times, the last time: "
                f"{last_line(error)}; see {shown(folder)}/run.log"
            ) from None
    raise_failure(folder)


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Entry on each Ray Train worker: bind the streams and hand over to training.worker."""
    job: worker.Job = config["job"]
    supply: Supply = config["supply"]
    rank = ray.train.get_context().get_world_rank()
    packs, validation = supply.of_rank(rank)
    folder = RunFolder(job.run_path)
    with noise_to(folder.log):
        guard(lambda: worker.run(job, packs, validation, config["mailbox"].put.remote), folder)
    ray.train.report({"done": True})


def guard(work: Callable[[], object], folder: RunFolder) -> None:
    """Let lost workers be restarted, but end the run at once on an error that would come again.

    A RaytuneError says what the user must change, and any error seen twice in a row with the
    same words is no accident: both are written down for the driver instead of raised, because
    Ray Train restarts whatever raises.
    """
    try:
        work()
    except Exception as error:
        final = isinstance(error, errors.RaytuneError)
        words = str(error) if final else f"{type(error).__name__}: {last_line(error)}"
        seen = [e["words"] for e in read_jsonl(folder.path / FAILURES)]
        kind = type(error).__name__ if final else "TrainingError"
        if ray.train.get_context().get_world_rank() == 0 or final:
            fatal = final or words in seen
            append_jsonl(folder.path / FAILURES, {"words": words, "type": kind, "fatal": fatal})
        traceback.print_exc()
        if not (final or words in seen):
            raise


def raise_failure(folder: RunFolder) -> None:
    """Raise what a worker wrote down as the end of the run, if anything."""
    for failure in read_jsonl(folder.path / FAILURES):
        if failure["fatal"]:
            folder.update(status="failed")
            kind = getattr(errors, failure["type"], errors.TrainingError)
            raise kind(failure["words"])


class Mailbox:
    """Carries events from rank 0 to the driver's screen."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def put(self, event: Event) -> None:
        """Add one event."""
        self.events.append(event)

    def take(self) -> list[Event]:
        """Hand over all events since the last call."""
        events, self.events = self.events, []
        return events


@contextmanager
def watched(mailbox: Any, screen: Screen) -> Iterator[None]:
    """Show what arrives in the mailbox while the block runs."""
    done = threading.Event()

    def show() -> None:
        loads = 0
        while True:
            ended = done.wait(POLL_SECONDS)
            for event in ray.get(mailbox.take.remote()):
                loads += event.get("name") == "load model"
                if loads > 1 and event.get("name") == "load model":
                    screen({"kind": "restart"})
                screen(event)
            if ended:
                return

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(timeout=10)


def shown(folder: RunFolder) -> str:
    """Write a path as a person would type it here."""
    path = os.path.relpath(folder.path)
    return str(folder.path) if path.startswith("..") else path


def next_commands(folder: RunFolder) -> list[str]:
    """Suggest what people do after a run."""
    run = shown(folder)
    return [
        f"raytune-ft chat {run}",
        f"raytune-ft merge {run}",
        f"raytune-ft serve {run}",
        f"raytune-ft export {run} --out my-adapter",
    ]


def last_line(error: BaseException) -> str:
    """Return the last line of an error's text, where nested tracebacks end with the cause."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


if __name__ == "__main__":
    from raytune_ft.cli import run_verb

    run_verb("train")
