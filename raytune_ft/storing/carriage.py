"""Carriage: a run's workers on nodes that do not have its folder; files go through Ray's objects.

Whether a node has the driver's folder is told by a file with a number that only this driver wrote,
not by the path. A worker that lacks it works in a folder of its own node, filled from the driver's,
and what it writes is carried home by a `Mirror`, as to an object store. Models and other files that
the recipe names come by their content, once per node, where a node does not have them already.

    driver's node    run folder <- Home (an actor) <---- HomeFolder, Ties    worker's node
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ft import durable
from raytune_ft.config.cache import cache_dir
from raytune_ft.errors import CheckpointError, ModelError
from raytune_ft.model import loading
from raytune_ft.storing import fetching, steps
from raytune_ft.storing.home import FAILURES, PULSES, Home
from raytune_ft.storing.home_folder import ANSWERS_IN_S, HomeFolder, asked
from raytune_ft.storing.mirror import Mirror, Stamp, stamps
from raytune_ft.training.guarding import failures
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.worker import Job

NONCE = ".driver"
"""In the run's folder: which driver's it is."""
CALLS_AT_ONCE = 16
SMALL_S = 2.0
TIES_S = 0.5


@dataclass(frozen=True)
class Way:
    """How workers find the run; travels to every node."""

    path: str
    """Of the run's folder, on the driver's node."""
    nonce: str
    home: Any
    """The actor; None where there is but this node."""
    node: str | None = None
    """Id of the driver's node."""


def way_of(run: RunFolder) -> Way:
    """Make what workers find the run by; the actor that holds it goes with this driver."""
    nonce = uuid.uuid4().hex
    (run.path / NONCE).write_text(nonce, encoding="utf-8")
    if len(ray.nodes()) == 1 and not os.environ.get("RAY_ADDRESS"):
        return Way(str(run.path), nonce, None)
    node = ray.get_runtime_context().get_node_id()
    here = NodeAffinitySchedulingStrategy(node, soft=False)
    actor = ray.remote(num_cpus=0)(Home).options(
        scheduling_strategy=here, max_concurrency=CALLS_AT_ONCE, max_restarts=-1
    )
    return Way(str(run.path), nonce, actor.remote(str(run.path)), node)


def homes_own(run: RunFolder) -> tuple[str, ...]:
    """Return files that only the driver writes, line by line: replaced, they would lose some."""
    return FAILURES, run.lines.name


class HomeMirror(Mirror):
    """Carries a run home; of run.json what changed, since the driver writes it as well."""

    def __init__(self, run: RunFolder, folder: HomeFolder, keep: int) -> None:
        super().__init__(run, folder, "the driver's node", keep, every_s=SMALL_S, known=stamps(run))
        self.home, self._fields = folder, run.info()

    def _send_file(self, name: str, stamp: Stamp, now: float) -> None:
        if name == self.run.run_json.name:
            found = self.run.info()
            changed = {k: v for k, v in found.items() if self._fields.get(k) != v}
            asked(self.home.home.update.remote(self.home.writer, changed))
            self._fields, self._sent[name] = found, stamp
        elif name == self.run.log.name:
            self.place.send(self.run.log, "logs/rank_0.log")
            self._sent[name], self._at[name] = stamp, now
        elif name not in homes_own(self.run) and not name.startswith(f"{PULSES}/"):
            super()._send_file(name, stamp, now)
        else:
            self._sent[name] = stamp


class Ties:
    """Keeps the watchdogs' files of all nodes alike: pulses, who asked, stacks."""

    def __init__(self, home: Any, folder: Path) -> None:
        self.home, self.folder = home, folder
        self._known: dict[str, bytes] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="ties", daemon=True)

    def __enter__(self) -> Ties:
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=ANSWERS_IN_S)
        with contextlib.suppress(CheckpointError, OSError):
            self.look()

    def look(self) -> None:
        """Tell what is new here, and take what is new there."""
        found = self._here()
        new: dict[str, bytes | None] = {k: v for k, v in found.items() if self._known.get(k) != v}
        new |= dict.fromkeys(self._known.keys() - found.keys())
        told: dict[str, bytes] = asked(self.home.exchange.remote(new))
        for name, content in told.items():
            if found.get(name) != content:
                self.folder.mkdir(parents=True, exist_ok=True)
                half = self.folder / f"{name}.half_{os.getpid()}"
                half.write_bytes(content)
                half.replace(self.folder / name)
        for name in found.keys() - told.keys():
            (self.folder / name).unlink(missing_ok=True)
        self._known = told

    def _here(self) -> dict[str, bytes]:
        found = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if "half" not in path.name and not path.name.startswith(".signal"):
                with contextlib.suppress(OSError):
                    found[path.name] = path.read_bytes()
        return found

    def _watch(self) -> None:
        while not self._over.wait(TIES_S):
            with contextlib.suppress(CheckpointError, OSError):  # the next look may reach it
                self.look()


@dataclass(frozen=True)
class AtHand:
    """A run's folder on a worker's node."""

    run: RunFolder
    way: Way
    is_homes: bool
    """Whether it is the driver's own."""

    def train(self, job: Job, rank: int, work: Callable[[Job], object]) -> None:
        """Call `work` with a job whose paths are this node's; carry home what rank 0 writes."""
        if self.is_homes:
            if self.way.home is not None and rank == 0:
                with contextlib.suppress(CheckpointError):
                    asked(
                        self.way.home.begin.remote(carried=False)
                    )  # nobody else writes from now on
            work(job)
            return
        home = self.way.home
        with alone(self.run.path):
            fill(self.run, HomeFolder(home), but=_drivers_alone(self.run))
        told = located(job, self.run, home)
        if rank:
            work(told)
            return
        writer = HomeFolder(home, asked(home.begin.remote(carried=True)))
        with HomeMirror(self.run, writer, job.recipe["checkpoint"]["keep"]):
            work(told)


@contextmanager
def at_hand(way: Way) -> Iterator[AtHand]:
    """Yield a run's folder on this node: the driver's if it is here, else one of its own.

    Raises:
        CheckpointError: it is not here, and nobody holds it for other nodes.
    """
    if is_homes(way):
        yield AtHand(RunFolder(way.path), way, is_homes=True)
        return
    run = copy_of(way)
    for name in HomeFolder(way.home).names():
        if name == FAILURES:
            HomeFolder(way.home).fetch(name, run.path / name)
    with (
        failures.told_to(lambda entry: _tell(way.home, entry)),
        checkpoint.brought_by(lambda folder: _bring_step(run, folder, HomeFolder(way.home))),
        Ties(way.home, run.path / PULSES),
    ):
        yield AtHand(run, way, is_homes=False)


def copy_of(way: Way) -> RunFolder:
    """Return the folder that stands for the driver's on a node that lacks it.

    Raises:
        CheckpointError: nobody holds the driver's for other nodes.
    """
    if way.home is None:
        raise CheckpointError(f"{way.path}: this worker's machine does not have the run's folder")
    run = RunFolder(cache_dir() / "carried" / way.nonce / Path(way.path).name)
    run.path.mkdir(parents=True, exist_ok=True)
    return run


def is_homes(way: Way) -> bool:
    """Tell whether this node has the driver's folder."""
    try:
        return (Path(way.path) / NONCE).read_text(encoding="utf-8") == way.nonce
    except OSError:
        return False


def _tell(home: Any, entry: dict[str, Any]) -> None:
    asked(home.add_failure.remote(json.dumps(entry, ensure_ascii=False) + "\n"))


def _drivers_alone(run: RunFolder) -> Callable[[str], bool]:
    own = homes_own(run)
    return lambda name: name in own or name.startswith((f"{PULSES}/", "logs/", "run.log"))


def fill(run: RunFolder, home: HomeFolder, but: Callable[[str], bool] = lambda _: False) -> None:
    """Make this node's folder what the driver's is: all nodes go on from the same checkpoint.

    Args:
        run: this node's.
        home: the driver's.
        but: whether a small file stays there.
    """
    names = home.names()
    there = steps.steps_in(names)
    for step in steps.steps_here(run.checkpoints):
        if step not in there:
            durable.drop(run.checkpoints / step)
    for name in filter(steps.is_small, names):
        if not but(name):
            fetching.fetch_file(home, run, name)
    whole = [step for step, is_whole in there.items() if is_whole]
    fetching.fetch_steps(home, run, whole, fetching.silent)


def _bring_step(run: RunFolder, folder: Path, home: HomeFolder) -> None:
    """Wait until a checkpoint that rank 0 wrote has come home, and fetch it."""
    deadline = time.monotonic() + ANSWERS_IN_S
    while time.monotonic() < deadline:
        if steps.steps_in(home.names(steps.CHECKPOINTS)).get(folder.name):
            with alone(run.path):
                fetching.fetch_step(home, run, folder.name, fetching.silent)
            return
        time.sleep(TIES_S)


def located(job: Job, run: RunFolder, home: Any) -> Job:
    """Return a job with the paths that this node has; fetch what it lacks.

    Raises:
        ModelError: the model could not be brought here.
    """
    recipe = job.recipe
    evaluated = recipe["chat_eval"]
    files = [str(here(path, home)) for path in evaluated.get("mmlu") or ()]
    recipe = {**recipe, "chat_eval": {**evaluated, "mmlu": files}}
    begin = job.begin
    if begin is not None:
        own = Path(begin.path)
        inside = own.is_relative_to(job.run_path)
        place = run.path / own.relative_to(job.run_path) if inside else here(begin.path, home)
        begin = replace(begin, path=str(place))
    return replace(
        job,
        recipe=recipe,
        run_path=str(run.path),
        model_folder=str(_model(job, home)),
        base=job.base or job.model_folder,
        begin=begin,
    )


def _model(job: Job, home: Any) -> Path:
    if _has(job.model_folder, home):
        return Path(job.model_folder)
    named = job.recipe["model"]["path"]
    if not Path(named).expanduser().is_dir():
        with contextlib.suppress(ModelError):  # a node may have no way to the hub
            return loading.prepare_folder(named)
    return here(job.model_folder, home)


def here(path: str, home: Any) -> Path:
    """Return where a file or folder of the driver's node is on this one, fetched once by content.

    Raises:
        ModelError: it did not arrive as it was sent.
    """
    if _has(path, home):
        return Path(path)
    listing: list[tuple[str, int, str]] = asked(home.listing.remote(path), seconds=3600)
    key = hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:24]
    store = cache_dir() / "fetched"
    target = store / key
    store.mkdir(parents=True, exist_ok=True)
    with alone(store, key):
        if not target.is_dir():
            _bring(path, listing, target, HomeFolder(home))
    is_file = [name for name, _, _ in listing] == [Path(path).name]
    return target / Path(path).name if is_file else target


def _bring(path: str, listing: list[tuple[str, int, str]], target: Path, home: HomeFolder) -> None:
    is_file = [name for name, _, _ in listing] == [Path(path).name]
    root = Path(path).parent if is_file else Path(path)
    with durable.whole_folder(target) as place:
        for name, _, sha256 in listing:
            home.fetch(str(root / name), place / name)
            with (place / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    raise ModelError(f"{root / name}: did not come whole from the driver's node")


def _has(path: str, home: Any) -> bool:
    """Tell whether this node has the same files at the same path, by their names and sizes."""
    found = Path(path)
    if not found.exists():
        return False
    ours = Home.sizes(Home.__new__(Home), path)
    return bool(ours == asked(home.sizes.remote(path)))


@contextmanager
def alone(folder: Path, key: str = "") -> Iterator[None]:
    """Let one process of this node at a time into the block."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".alone{key}").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
