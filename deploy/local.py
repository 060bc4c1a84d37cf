"""A Ray cluster of several nodes on this machine, without Docker: processes of `ray start`.

`python deploy/local.py --nodes 3 --cpus 2` prints the environment for drivers and for `ray job`,
and keeps the cluster until Ctrl-C. The head has no core for training, as in `cluster.yaml`. Ports,
folders and the token that it asks for are its own, so other Rays on this machine are not touched.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

HOST = "127.0.0.1"
START_S = 120.0
END_S = 15.0
STORE_BYTES = 100_000_000


@dataclass(frozen=True)
class LocalCluster:
    """A running cluster.

    `environment` is what a driver of it needs; `nodes` are the processes of `ray start`, the head
    first; `folder` holds Ray's sessions and the token.
    """

    environment: Mapping[str, str]
    nodes: tuple[subprocess.Popen[bytes], ...]
    folder: Path


@contextmanager
def local_cluster(
    nodes: int = 3,
    *,
    cpus: int = 2,
    head_cpus: int = 0,
    gpus: int = 0,
    environment: Mapping[str, str] | None = None,
) -> Iterator[LocalCluster]:
    """Run a cluster while the block runs; behind it no process and no file of it is left.

    Args:
        nodes: with the head.
        cpus: that each node but the head says it has.
        head_cpus: that the head says it has.
        gpus: that each node but the head says it has; nothing looks whether that is so.
        environment: of every node's processes, besides this process's own.
    """
    with ExitStack() as stack:
        # short: a socket's path may have 107 characters
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rays-", dir="/tmp")))
        token = folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        gcs, dashboard = free_port(), free_port()
        drivers = {
            "RAY_ADDRESS": f"{HOST}:{gcs}",
            "RAY_API_SERVER_ADDRESS": f"http://{HOST}:{dashboard}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        # a job that is stopped may write its checkpoint
        around = {**os.environ, "RAY_JOB_STOP_WAIT_TIME_S": "60", **drivers, **(environment or {})}
        del around["RAY_ADDRESS"], around["RAY_API_SERVER_ADDRESS"]
        head = [
            "--head", f"--port={gcs}", f"--num-cpus={head_cpus}", "--num-gpus=0",
            f"--temp-dir={folder}/0", "--include-dashboard=true", f"--dashboard-host={HOST}",
            f"--dashboard-port={dashboard}", f"--ray-client-server-port={free_port()}",
        ]  # fmt: skip
        started = [stack.enter_context(_node(head, around, folder / "head.log"))]
        _wait_for(drivers["RAY_API_SERVER_ADDRESS"], token, started[0], folder / "head.log")
        for number in range(1, nodes):
            # a folder each, as on machines: they would delete each other's copies of working_dir
            worker = [
                f"--address={HOST}:{gcs}", f"--num-cpus={cpus}", f"--num-gpus={gpus}",
                f"--temp-dir={folder}/{number}",
            ]  # fmt: skip
            log = folder / f"node_{number}.log"
            started.append(stack.enter_context(_node(worker, around, log)))
        _wait_for_nodes(drivers, started, folder)
        yield LocalCluster(drivers, tuple(started), folder)


def free_port() -> int:
    """Return a port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def _node(
    arguments: list[str], environment: Mapping[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run `ray start --block` in a group of its own; end the whole group behind the block."""
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats",
        f"--node-ip-address={HOST}", f"--object-store-memory={STORE_BYTES}",
        "--dashboard-agent-listen-port=0",
        *arguments,
    ]  # fmt: skip
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603, Ray's own program
            command, stdout=out, stderr=out, env=dict(environment), start_new_session=True
        )
    try:
        yield process
    finally:
        process.terminate()  # `ray start --block` ends what it started
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(url: str, token: Path, head: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the head's job server answers."""
    asked = urllib.request.Request(  # noqa: S310, loopback http
        f"{url}/api/version", headers={"Authorization": f"Bearer {token.read_text()}"}
    )
    end = time.monotonic() + START_S
    while time.monotonic() < end and head.poll() is None:
        try:
            urllib.request.urlopen(asked, timeout=5).close()  # noqa: S310
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise RuntimeError(f"the head did not start:\n{log.read_text(errors='replace')[-2000:]}")


def _wait_for_nodes(
    drivers: Mapping[str, str], started: Sequence[subprocess.Popen[bytes]], folder: Path
) -> None:
    """Return when all nodes are there."""
    program = (
        "import time, ray\n"
        "ray.init(logging_level='ERROR', log_to_driver=False)\n"
        f"while sum(n['Alive'] for n in ray.nodes()) < {len(started)}:\n"
        "    time.sleep(0.1)\n"
    )
    waiting = subprocess.Popen(  # noqa: S603, the program above
        [sys.executable, "-c", program], env={**os.environ, **drivers}
    )
    end = time.monotonic() + START_S
    try:
        while waiting.poll() is None:
            if time.monotonic() > end or any(node.poll() is not None for node in started):
                logs = sorted(folder.glob("*.log"))
                said = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
                raise RuntimeError(f"a node did not start:\n{said}")
            time.sleep(0.1)
    finally:
        waiting.kill()
        waiting.wait()
    if waiting.returncode:
        raise RuntimeError("no driver can join the cluster")


def main() -> None:
    """Run a cluster until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--nodes", type=int, default=3, help="with the head")
    parser.add_argument("--cpus", type=int, default=2, help="of each node but the head")
    parser.add_argument("--gpus", type=int, default=0, help="of each node but the head")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with local_cluster(asked.nodes, cpus=asked.cpus, gpus=asked.gpus) as cluster:
            for key, value in cluster.environment.items():
                print(f"export {key}={value}", flush=True)
            print("# ready; Ctrl-C ends it", flush=True)
            signal.pause()
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
