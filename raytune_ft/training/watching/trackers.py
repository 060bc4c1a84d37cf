"""Trackers: a run's figures and answers, sent to TensorBoard, Weights & Biases or MLflow.

Each is fed by a thread of its own, so a slow network never holds a step up, and one that fails is
left out with one line: training goes on. What is sent of the recipe is the recipe, without what
an address may carry as a password or signature; nothing of the environment is sent.

`trackers.json` in the run folder keeps each tracker's id and the last step sent, so a run that is
taken up goes on in the same record and sends no step twice. It is no part of run.json, which the
driver writes: two writers would lose each other's fields.
"""

from __future__ import annotations

import html
import json
import os
import queue
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import util
from pathlib import Path
from typing import Any, Protocol

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.training.run_folder import RunFolder, read_json, write_json

PROJECT = "raytune_ft"
"""W&B project and MLflow experiment, unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME say another."""
FINISH_SECONDS = 60.0
"""How long the end of a run waits for what is still to be sent."""
WAITING = 10_000
"""Figures and answers that wait at most; more are left out rather than kept."""
MODULES = {"wandb": ("wandb",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}

MLFLOW_ENDS = {"done": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Beginning:
    """What a tracker is told when a run begins or goes on."""

    name: str
    config: dict[str, str | int | float | bool]
    """The recipe by dotted fields."""
    folder: Path
    step: int
    """Steps done: 0 for a new run."""
    id: str | None
    """Of the tracker's own record of this run, if there is one."""


class Tracker(Protocol):
    """One place that figures go to; called from one thread."""

    forgets: bool
    """Whether what it has of later steps is void once a run goes on from an earlier one."""
    note: str
    """What the user should know once it has started; empty if nothing."""

    def start(self, beginning: Beginning) -> str | None:
        """Open the run's record; return its id, None where it needs none."""

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Send the figures of a step; steps ascend."""

    def text(self, step: int, key: str, words: str) -> None:
        """Send a text, such as an answer."""

    def finish(self, status: str) -> None:
        """Close the record: `done`, `failed`, or `stopped`, which may go on later."""


class TensorBoard:
    """Event files in the run folder, written by tensorboardX."""

    forgets = True
    note = ""

    def start(self, beginning: Beginning) -> str | None:
        """Open event files; what earlier ones say of later steps is void."""
        from tensorboardX import SummaryWriter

        again = beginning.step + 1 if beginning.step else None
        place = str(beginning.folder / "tensorboard")
        suffix = f".{time.time_ns()}"  # its own names have seconds: an attempt may be shorter
        self._board = SummaryWriter(place, purge_step=again, flush_secs=10, filename_suffix=suffix)
        return None

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)

    def text(self, step: int, key: str, words: str) -> None:
        indented = "\n".join(f"    {line}" for line in words.splitlines())  # no markdown, no HTML
        self._board.add_text(key, indented, step)

    def finish(self, status: str) -> None:
        self._board.close()


class Wandb:
    """Weights & Biases: with a key in the environment or ~/.netrc, else kept offline."""

    forgets = False
    note = ""

    def start(self, beginning: Beginning) -> str | None:
        """Open or go on with a run; without a key its files wait in the run folder for a sync."""
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its own defects, sent home
        import wandb

        own = beginning.id or secrets.token_hex(4)
        options = {
            "console": "off", "silent": True, "disable_code": True, "disable_git": True,
            "save_code": False, "x_disable_meta": True, "init_timeout": FINISH_SECONDS,
        }  # fmt: skip
        values: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", PROJECT), "name": beginning.name,
            "id": own, "resume": "allow" if beginning.id else None,
            "dir": str(beginning.folder),
            "config": beginning.config,
            "settings": wandb.Settings(**options),
        }  # fmt: skip
        try:
            self._run = wandb.init(**values)
        except wandb.errors.UsageError:  # no key: nobody can be asked for one here
            self._run = wandb.init(**values, mode="offline")
        if self._run.offline:
            place = beginning.folder / "wandb"
            self.note = f"wandb: kept offline; wandb sync {place}/offline-run-* sends it"
        return own

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def text(self, step: int, key: str, words: str) -> None:
        import wandb

        page = wandb.Html(f"<pre>{html.escape(words)}</pre>", inject=False)
        self._run.log({key: page}, step=step)

    def finish(self, status: str) -> None:
        import wandb

        if status == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=int(status != "done"))
        wandb.teardown()  # waits for its service: a worker's process may end right after this


class Mlflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, else `mlflow.db` beside the runs."""

    forgets = False
    note = ""

    def start(self, beginning: Beginning) -> str | None:
        """Open a run of the experiment, or the one that goes on."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # what is used, sent home
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        storage = beginning.folder.parent
        here = f"sqlite:///{storage / 'mlflow.db'}"
        self._client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", here))
        if beginning.id is not None:
            self._client.update_run(beginning.id, status="RUNNING")
            self._id: str = beginning.id
            return self._id
        experiment = self._experiment(storage)
        self._id = self._client.create_run(experiment, run_name=beginning.name).info.run_id
        params = [Param(key, str(value)) for key, value in beginning.config.items()]
        for first in range(0, len(params), 100):  # the most that one request may carry
            self._client.log_batch(self._id, params=params[first : first + 100])
        return self._id

    def _experiment(self, storage: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = self._client.get_experiment_by_name(name)
        if known is not None:
            return str(known.experiment_id)
        is_here = "MLFLOW_TRACKING_URI" not in os.environ
        place = (storage / "mlflow_artifacts").as_uri() if is_here else None
        return str(self._client.create_experiment(name, artifact_location=place))

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def text(self, step: int, key: str, words: str) -> None:
        self._client.log_text(self._id, words, f"{key}/step_{step:06d}.txt")

    def finish(self, status: str) -> None:
        self._client.set_terminated(self._id, MLFLOW_ENDS.get(status, "FAILED"))


KINDS: dict[str, Callable[[], Tracker]] = {
    "tensorboard": TensorBoard, "wandb": Wandb, "mlflow": Mlflow,
}  # fmt: skip


def check_installed(trackers: Iterable[str]) -> None:
    """Refuse a tracker whose library is not here; RecipeError says how to install it."""
    for name in trackers:
        missing = [one for one in MODULES.get(name, ()) if util.find_spec(one) is None]
        if missing:
            raise RecipeError(
                f"run.trackers: {name} needs {', '.join(missing)}, not installed here; "
                f"pip install 'raytune_ft[{name}]', or leave {name} out"
            )


def config_of(recipe: Recipe) -> dict[str, str | int | float | bool]:
    """Return a recipe by dotted fields, plain values only, addresses without their secrets."""
    found: dict[str, str | int | float | bool] = {}

    def add(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for name, one in value.items():
                add(f"{key}.{name}" if key else str(name), one)
        elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
            for place, one in enumerate(value):
                add(f"{key}.{place}", one)
        elif isinstance(value, (bool, int, float)):
            found[key] = value
        elif value is not None:
            words = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            found[key] = without_secrets(words)[:500]

    add("", recipe.model_dump(mode="json"))
    return found


def without_secrets(words: str) -> str:
    """Take user names, passwords, queries and fragments off the addresses in a text."""
    return re.sub(r"(\w+://)(?:[^\s/@\"]*@)?([^\s?#\"]*)(?:[?#][^\s\"]*)?", r"\1\2", words)


class Trackers:
    """All trackers of a run, side by side."""

    def __init__(
        self,
        folder: RunFolder,
        recipe: Recipe,
        say: Say,
        kinds: Mapping[str, Callable[[], Tracker]] = KINDS,
    ) -> None:
        self._memory = Memory(folder.path / "trackers.json")
        self._beginning = Beginning(folder.path.name, config_of(recipe), folder.path, 0, None)
        self._channels = [
            Channel(name, kinds[name](), self._memory, say) for name in recipe.run.trackers
        ]

    def start(self, step: int) -> None:
        """Open all records: of a new run at step 0, else of one that goes on behind `step`."""
        for channel in self._channels:
            channel.start(self._beginning, step)

    def log(self, step: int, figures: Mapping[str, float], key: str = "steps") -> None:
        """Send figures of a step; `key` tells which of it, as each is sent once."""
        for channel in self._channels:
            channel.put(key, step, lambda one: one.log(step, figures))

    def text(self, step: int, key: str, words: str) -> None:
        """Send an answer."""
        for channel in self._channels:
            channel.put(key, step, lambda one: one.text(step, key, words))

    def finish(self, status: str) -> None:
        """Close all records, having waited for what is still to be sent, but not for ever."""
        for channel in self._channels:
            channel.close(status)
        until = time.monotonic() + FINISH_SECONDS
        for channel in self._channels:
            channel.join(until)


class Memory:
    """`trackers.json`: by tracker, its record's `id` and, by kind, the last step `sent`."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        known = read_json(path) if path.is_file() else {}
        self._known: dict[str, dict[str, Any]] = known if isinstance(known, dict) else {}

    def of(self, name: str) -> dict[str, Any]:
        """Return what is known of a tracker's record."""
        return self._known.get(name, {})

    def keep(self, name: str, **fields: Any) -> None:
        """Write down what is known of it from now on."""
        with self._lock:
            self._known[name] = {**self.of(name), **fields}
            write_json(self._path, self._known)


class Channel:
    """One tracker, fed from a queue by a thread; its first failure ends it with one line."""

    def __init__(self, name: str, tracker: Tracker, memory: Memory, say: Say) -> None:
        self._name, self._tracker, self._memory, self._say = name, tracker, memory, say
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING)
        self._thread = threading.Thread(target=self._work, name=f"{name} tracker", daemon=True)
        self._failed = self._full = False

    def start(self, beginning: Beginning, step: int) -> None:
        """Open the record, in the thread."""
        known = self._memory.of(self._name)
        told = replace(beginning, step=step, id=known.get("id"))
        self._thread.start()
        self._put(lambda: self._open(told))

    def _open(self, told: Beginning) -> None:
        self._memory.keep(self._name, id=self._tracker.start(told))
        if self._tracker.note:
            self._say(self._tracker.note)

    def put(self, key: str, step: int, send: Callable[[Tracker], None]) -> None:
        """Send in turn; written down before, so that a run taken up does not send it again."""

        def sending() -> None:
            if not self._tracker.forgets:
                sent = self._memory.of(self._name).get("sent", {})
                if step <= sent.get(key, -1):
                    return
                self._memory.keep(self._name, sent={**sent, key: step})
            send(self._tracker)

        self._put(sending)

    def close(self, status: str) -> None:
        """Close the record behind all that was put."""
        self._put(lambda: self._tracker.finish(status))
        self._put(None)

    def join(self, until: float) -> None:
        """Wait for the thread, up to a moment of the monotonic clock."""
        if self._thread.is_alive():
            self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._say(f"{self._name}: still sending after {FINISH_SECONDS:.0f} s; left behind")

    def _put(self, work: Callable[[], None] | None) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            if not self._full:
                self._full = True
                self._say(f"{self._name}: {WAITING:,} figures wait to be sent; more are left out")

    def _work(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            except Exception as error:  # any: a tracker is no reason to end a training run
                self._failed = True
                words = " ".join(str(error).split())[:200]
                self._say(
                    f"{self._name}: {type(error).__name__}: {words}; "
                    "the run goes on without it, metrics.jsonl has every step"
                )
                return
