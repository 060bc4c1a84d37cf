"""An embedded engine over the tiny model, and one real endpoint in Ray Serve for a session."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from raytune_ft.chat import ChatModel, open_chat
from raytune_ft.serving.engine import EmbeddedEngine
from tests.conftest import ROOT
from tests.serving.browser import open_page, scripted  # noqa: F401  (fixtures)


class Endless(ChatModel):
    """A model that never ends an answer by itself, so that tests do not depend on luck."""

    stop_ids = frozenset()  # type: ignore[assignment]


@pytest.fixture(scope="session")
def endless(tiny_model: Path) -> ChatModel:
    return Endless(**{**vars(open_chat(str(tiny_model), device="cpu")), "name": "tiny"})


@pytest.fixture
def engine(endless: ChatModel) -> Iterator[EmbeddedEngine]:
    engine = EmbeddedEngine(endless, max_waiting=2)
    yield engine
    engine.close()


@dataclass(frozen=True)
class Live:
    """A running endpoint."""

    url: str
    model: str
    process: subprocess.Popen[str]
    output: Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def with_us() -> str:
    """Return a PYTHONPATH that finds this checkout first, and then what it found before."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def start_endpoint(
    model: Path,
    log: Path,
    options: dict[str, Any] | None = None,
    *,
    seconds: float = 150.0,
    **environment: str,
) -> Live:
    """Run `serve` as a user does, in its own process, and wait so long until it answers."""
    port = free_port()
    code = (
        "import sys; from raytune_ft.serving.app import serve\n"
        f"sys.exit(serve({str(model)!r}, port={port}, options={options or {}!r}))"
    )
    inherited = {**os.environ, "PYTHONPATH": with_us(), **environment}
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=file, stderr=file, text=True, env=inherited
        )
    live = Live(f"http://127.0.0.1:{port}", model.name, process, log)
    deadline = time.monotonic() + seconds
    while "Ctrl-C stops it." not in log.read_text():
        if process.poll() is not None or time.monotonic() > deadline:
            stop_endpoint(live)
            pytest.fail(f"the endpoint did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.2)
    assert httpx.get(f"{live.url}/healthz").json() == {"status": "ok"}
    return live


def stop_endpoint(live: Live) -> int:
    """Send SIGTERM and return the exit code."""
    if live.process.poll() is None:
        live.process.send_signal(signal.SIGTERM)
    try:
        return live.process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        live.process.kill()
        raise


@pytest.fixture(scope="session")
def live(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One endpoint for all tests of the session; starting it takes 20 s."""
    live = start_endpoint(tiny_model, tmp_path_factory.mktemp("live") / "serve.log")
    yield live
    assert stop_endpoint(live) == 0, live.output.read_text()[-3000:]
