"""Ray on this machine or a cluster: one quiet way to start or join it, for every stage."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from raytune_ft import host
from raytune_ft.errors import TrainingError

QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Set in this process and inherited by every Ray worker on this machine."""
ALLOCATION = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
"""torch reads it when it first takes GPU memory. Packs of differing lengths otherwise leave gaps,
until after hours a batch does not fit that did at first."""

REASON_LENGTH = 400
"""Characters of what Ray says, which may be a page."""


@contextmanager
def noise_to(log: Path) -> Iterator[TextIO]:
    """Send everything that is printed meanwhile to `log`; yield the real stderr.

    Ray's and DeepSpeed's C++ parts write to the file descriptors, past Python's streams, so the
    descriptors themselves are redirected.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    terminal = os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace", buffering=1)
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    try:
        yield terminal
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(saved, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)
        terminal.close()


def session_folder() -> Path:
    """Return where a Ray that is started here keeps logs, and what does not fit into memory."""
    return Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"


@contextmanager
def ray_session(*, dashboard: bool = False) -> Iterator[None]:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine, loopback only.

    A session that was already there is left running.

    Raises:
        TrainingError: Ray does not start, or there is none at RAY_ADDRESS.
    """
    allocation = _prepare_environment()
    import ray

    if ray.is_initialized():
        yield
        return
    try:
        _init(dashboard, allocation)
    except TrainingError:
        raise
    except Exception as error:  # Ray raises plain ones
        address = os.environ.get("RAY_ADDRESS")
        reason = " ".join(str(error).split())[:REASON_LENGTH]
        if address:
            raise TrainingError(
                f"RAY_ADDRESS: the cluster at {address} cannot be joined ({reason}); start this on "
                "one of its nodes with its versions, or leave RAY_ADDRESS out"
            ) from error
        raise TrainingError(
            f"Ray did not start ({reason}); try again when this machine is less busy"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


class RayBeside(threading.Thread):
    """A `ray_session` that starts while others import and read.

    The thread that starts Ray keeps it and shuts it down: the kernel kills the processes of a
    private Ray when the thread that made them ends, not when the process does.
    """

    def __init__(self) -> None:
        super().__init__(name="ray", daemon=True)
        self._tried, self._over = threading.Event(), threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Start Ray, keep it until `end`, shut it down."""
        try:
            with ray_session():
                self._tried.set()
                self._over.wait()
        except BaseException as error:  # the one who waits raises it
            self._error = error
        finally:
            self._tried.set()

    def wait(self) -> None:
        """Return when Ray is there; TrainingError if it does not start."""
        self._tried.wait()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """Have Ray shut down, behind its start if that is not over."""
        self._over.set()
        self.join()


@contextmanager
def ray_beside() -> Iterator[RayBeside]:
    """Start Ray while the block runs on; behind the block nothing of it is left.

    To be entered before `ray` is imported elsewhere: what it reads at import is set here.
    """
    _prepare_environment()
    importlib.import_module("ray")  # here, so that no two threads import it at once
    beside = RayBeside()
    beside.start()
    try:
        yield beside
    finally:
        beside.end()


def _prepare_environment() -> dict[str, str]:
    """Set what Ray and its workers read; return what workers elsewhere are to be told as well."""
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    (key, ours), *_ = ALLOCATION.items()
    is_ours = os.environ.get(key, ours) == ours and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    allocation = ALLOCATION if is_ours else {}
    os.environ.update(allocation)
    warnings.filterwarnings("ignore", category=FutureWarning, module="ray.*")
    return allocation


def _init(dashboard: bool, allocation: dict[str, str]) -> None:
    import ray

    if address := os.environ.get("RAY_ADDRESS"):
        if "://" in address:
            raise TrainingError(
                f"RAY_ADDRESS: '{address}' cannot be trained on from outside; give that address to "
                "`ray job submit --address`, or HOST:PORT of the head on one of the cluster's nodes"
            )
        ray.init(
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": allocation},  # nothing of this process's environment
        )
        return
    ray.init(
        address="local",
        num_cpus=host.cores(),  # Ray sees a container's quota, but not which cores it is bound to
        include_dashboard=dashboard,
        dashboard_host="127.0.0.1",
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
