"""A Ray cluster of one node, started as docs/serving.md says, and `serve deploy` on it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raytune_ft.serving.front import CALLBACK, IMPORT_PATH
from tests.conftest import ROOT
from tests.serving.conftest import free_port

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Cluster:
    """A running cluster."""

    folder: Path
    environment: dict[str, str]
    dashboard: str
    port: int
    pid: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def deploy(self, **args: Any) -> None:
        """Deploy serve/chat.yaml with these arguments, and wait until all replicas run."""
        config = yaml.safe_load((ROOT / "serve" / "chat.yaml").read_text())
        config["http_options"]["port"] = self.port
        config["applications"][0]["args"] |= {"access_log": "/dev/null", "gpus": 0, **args}
        file = self.folder / "chat.yaml"
        file.write_text(yaml.safe_dump(config))
        self.serve("deploy", str(file))
        until = time.monotonic() + 240
        while (text := self.serve("status")).count("status: RUNNING") != 1 or (
            "UPDATING" in text or "DEPLOYING" in text
        ):
            assert time.monotonic() < until, text
            time.sleep(0.5)

    def serve(self, verb: str, *more: str) -> str:
        """Run Ray's own `serve`."""
        done = subprocess.run(
            [str(BIN / "serve"), verb, *more, "--address", self.dashboard],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env=self.environment,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout


@contextmanager
def cluster(folder: Path, **environment: str) -> Iterator[Cluster]:
    """Run a head node until the block ends; with Ray's token, and its dashboard on loopback."""
    dashboard, port = free_port(), free_port()
    variables = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0" * 32,
        "RAY_USAGE_STATS_ENABLED": "0",
        CALLBACK: IMPORT_PATH,
        **environment,
    }
    command = [
        str(BIN / "ray"), "start", "--head", "--block", "--num-cpus", "4",
        "--dashboard-host", "127.0.0.1", "--dashboard-port", str(dashboard),
        "--port", str(free_port()), "--temp-dir", str(folder / "ray"),
    ]  # fmt: skip
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, stdout=log, stderr=log, env=variables, start_new_session=True
        )
    try:
        _wait_for(dashboard, folder / "head.log")
        yield Cluster(folder, variables, f"http://127.0.0.1:{dashboard}", port, head.pid)
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()


def _wait_for(port: int, log: Path) -> None:
    """Return when something listens there."""
    until = time.monotonic() + 90
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])
