"""Fitting: a recipe in, its Ray Train workers started, told their job, seen through to their end.

What ends a run comes back as one error of `errors`: what a worker wrote down, a signal, or workers
that were lost too often. The main thread only waits, so that signals reach it at once.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray

from raytune_ft import claim, errors, resources
from raytune_ft.cluster import noise_to
from raytune_ft.config.schema import Recipe
from raytune_ft.data.feeder import Supply
from raytune_ft.data.stream import on_node
from raytune_ft.mailbox import Mailbox
from raytune_ft.resume import shown
from raytune_ft.screen import Screen
from raytune_ft.storing import carriage
from raytune_ft.training import ahead, worker
from raytune_ft.training.guarding import failures
from raytune_ft.training.guarding.guards import Guards
from raytune_ft.training.guarding.interruption import AskedToEnd
from raytune_ft.training.guarding.watchdog import PATIENCE_S
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.saving.checkpoint import step_folders, step_of
from raytune_ft.waiting import Need, told_of_room
from raytune_ft.wish import GRACE_S, Wish

POLL_SECONDS = 0.2
ASK_SECONDS = 0.5
JOB_SECONDS = 0.1
NEVER_S = 1e9
"""Between two looks of Ray Train whether to start a run's workers again as more of them. It would
not wait for a checkpoint; a run that is elastic grows behind one."""
ALONE_SECONDS = 10.0
"""Behind the failure that ends a run, for workers that have not met it."""


class Workers:
    """The Ray Train workers of a run: they start at once, and train when they are told their job.

    While the driver prepares, their processes start, meet, and import what they will need.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        failures.begin(folder)
        self.folder = folder
        # where the driver is: without that node there is no run, without another one there is
        here = on_node(ray.get_runtime_context().get_node_id())
        self.mailbox: Any = (
            ray.remote(Mailbox).options(num_cpus=0, scheduling_strategy=here).remote()
        )
        way = carriage.way_of(folder)  # one for all: its actor holds the folder for the workers
        trainers = (_trainer(recipe, folder, way, self.mailbox, k) for k in itertools.count())
        first = next(trainers)
        each, run = first.scaling_config.resources_per_worker, recipe.run
        self.need = Need(each, run.min_workers or run.workers, run.workers)
        self.ended = Fit(Growing(itertools.chain([first], trainers), self.mailbox))

    def fit(self, job: worker.Job, supply: Supply, screen: Screen) -> None:
        """Tell them their job, and see them to the end.

        Raises:
            RaytuneError: what ended them, as a worker told it; TrainingError if it could not.
            Interrupted: a signal asked for the end; the run can be taken up again.
        """
        screen.stage("workers")
        with (
            Wish() as wish,
            watched(self.mailbox, screen, self.folder),
            told_of_room(
                ray.nodes,
                ray.available_resources,
                self.need,
                screen.line,
                self.mailbox.has_room.remote,
            ),
        ):
            self.mailbox.give.remote([ray.put((job, supply))])
            try:
                see_through(self.ended, wish, self.mailbox, self.folder, screen)
            except errors.Interrupted:
                self.folder.update(status="stopped")
                raise
            except errors.RaytuneError:
                self.folder.update(status="failed")
                raise


def _trainer(
    recipe: Recipe, folder: RunFolder, way: carriage.Way, mailbox: Any, number: int
) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    on_gpu = claim.on_gpu()
    least = recipe.run.min_workers
    cpus = resources.cpus_per_worker(recipe.run.workers, ray.cluster_resources().get("CPU", 0))
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "recipe": recipe.model_dump(mode="json"),
            "way": way,
            "mailbox": mailbox,
        },
        # for the start, in which ranks take their time; guards.guarded sets that of the steps
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=PATIENCE_S),
        scaling_config=ScalingConfig(
            num_workers=(least, recipe.run.workers) if least else recipe.run.workers,
            elastic_resize_monitor_interval_s=NEVER_S,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": cpus, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=RunConfig(
            name=f"attempt_{os.getpid()}_{number}",
            storage_path=str(folder.path / "ray"),
            failure_config=FailureConfig(max_failures=recipe.run.max_failures),
        ),
    )


@dataclass
class Growing:
    """A trainer whose workers may end behind a checkpoint, to be started again as more."""

    trainers: Iterator[Any]
    """The first one, and those that go on."""
    mailbox: Any

    def fit(self) -> None:
        """Fit them one after the other, as long as the workers ended for that."""
        for trainer in self.trainers:
            trainer.fit()
            if not ray.get(self.mailbox.growing.remote()):
                return


class Fit(threading.Thread):
    """`trainer.fit()` beside the main thread, which signals wake; Ray Train would handle them."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True)
        self.trainer = trainer
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Keep what it raises."""
        try:
            self.trainer.fit()
        except BaseException as error:  # a Ray that is shut down ends it by SystemExit
            self.error = error


def see_through(ended: Fit, wish: Wish, mailbox: Any, folder: RunFolder, screen: Screen) -> None:
    """Wait for the workers; raise what ends the run, though some of them may not know it yet."""
    told, known = False, 0.0
    while ended.is_alive():
        ended.join(POLL_SECONDS)
        if wish.signal is not None and not told:
            told = True
            mailbox.stop.remote()
            screen.line("stopping behind this step's checkpoint; once more stops at once")
        if failures.fatal(folder) is not None:
            known = known or time.monotonic()
            if time.monotonic() - known > ALONE_SECONDS:
                break  # the others wait for a worker that is done
        if wish.is_late:
            break
    on = f"go on with raytune-ft train --resume {shown(folder)}"
    fatal = failures.fatal(folder)
    if isinstance(fatal, errors.Interrupted):
        raise errors.Interrupted(f"{fatal}; {on}")
    if fatal is not None:
        raise fatal
    if wish.is_late:
        steps = step_folders(folder.checkpoints)
        last = f"its checkpoint of step {step_of(steps[-1])} stands" if steps else "it has none yet"
        raise errors.Interrupted(f"stopped in a step longer than {GRACE_S:g} s; {last}; {on}")
    if isinstance(ended.error, ray.train.TrainingFailedError):
        said = failures.last(folder)
        raise errors.TrainingError(
            f"the workers ended and may not be started again (run.max_failures), the last time: "
            f"{said['words'] if said else failures.last_line(ended.error)}; see "
            f"{shown(folder)}/run.log; {on}"
        ) from None
    if ended.error is not None:
        raise ended.error


def train_loop_per_worker(config: dict[str, Any]) -> None:
    """Entry on each Ray Train worker: bind the streams and hand over to training.worker."""
    mailbox = config["mailbox"]
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()

    def work() -> None:
        ahead.come_ready(Recipe.model_validate(config["recipe"]))
        job, supply = _told(mailbox)
        packs, validation = supply.of_rank(rank, ranks)

        def train(here: worker.Job) -> None:
            worker.run(here, packs, validation, mailbox.put.remote, guards)

        place.train(job, rank, train)

    if rank == 0:
        mailbox.begin.remote(ranks)
    with (
        carriage.at_hand(config["way"]) as place,
        noise_to(place.run.log),
        AskedToEnd() as killed,
        asked_by(mailbox, ranks) as asked,
    ):
        guards = Guards(
            interrupted=lambda: killed() or asked(),
            wanting=lambda: asked.to_grow,
            watched=True,
        )
        try:
            failures.guard(work, place.run, rank)
        except failures.Grow:
            ray.get(mailbox.grow.remote(ranks))
    ray.train.report({"done": True})


def _told(mailbox: Any) -> tuple[worker.Job, Supply]:
    """Wait until the driver knows the job; it may fetch a model or measure rows before."""
    while not (told := ray.get(mailbox.told.remote())):
        time.sleep(JOB_SECONDS)
    job, supply = ray.get(told[0])
    return job, supply


@dataclass
class Asked:
    """What the driver asks of a worker, as far as it has got there."""

    to_stop: bool = False
    to_grow: bool = False
    """Behind a checkpoint, since more workers could go on from it."""

    def __call__(self) -> bool:
        """Tell whether to stop."""
        return self.to_stop


@contextmanager
def asked_by(mailbox: Any, ranks: int = 1) -> Iterator[Asked]:
    """Ask the driver of so many workers, beside the training, what it asks for; yield that."""
    asked, done = Asked(), threading.Event()

    def ask() -> None:
        with suppress(ray.exceptions.RayError):  # the driver is gone, and with it this process
            while not done.wait(ASK_SECONDS):
                with suppress(ray.exceptions.ActorUnavailableError):  # a link is cut for a while
                    asked.to_stop, asked.to_grow = ray.get(mailbox.wishes.remote(ranks))

    threading.Thread(target=ask, daemon=True).start()
    try:
        yield asked
    finally:
        done.set()


@contextmanager
def watched(mailbox: Any, screen: Screen, folder: RunFolder) -> Iterator[None]:
    """Show what arrives in the mailbox while the block runs."""
    done = threading.Event()

    def show() -> None:
        loads = 0
        while True:
            ended = done.wait(POLL_SECONDS)
            for event in ray.get(mailbox.take.remote()):
                loads += event.get("name") == "load model"
                if loads > 1 and event.get("name") == "load model":
                    said = failures.last(folder)
                    screen({"kind": "restart", "why": said["words"] if said else ""})
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
