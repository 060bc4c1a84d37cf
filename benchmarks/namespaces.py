"""Hosts of one machine: network namespaces with addresses of their own, on links as slow as asked.

All of it lies in namespaces, a switch in one of its own, so nothing of the machine's network is
touched and removing them removes everything. Names carry this process's id; those whose process is
gone are removed by the next one. Linux, root, `ip` and `tc` are needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "scaling"
DEVICE = "eth0"
"""The one interface of a host."""
QUEUE, BURST = "200mb", "128kb"
"""What waits for a slow link instead of being lost, and what goes at once behind a pause."""


def missing() -> str | None:
    """Say what namespaces need that is not here, in one line; None if nothing is missing."""
    lacking = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if lacking:
        return f"shaped links need {' and '.join(lacking)} of iproute2; install it"
    if os.geteuid() != 0:
        return "shaped links need network namespaces, which root may make; run it as root"
    name = f"{PREFIX}-{os.getpid()}-try"
    try:
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "add", "probe", "type", "veth", "peer", "name", "probe_")
        _run("tc", "-n", name, "qdisc", "add", "dev", "probe", "root", *_bucket(100))
    except RuntimeError as error:
        return f"network namespaces with token buckets cannot be made here: {error}"
    finally:
        _remove(name)
    return None


class Hosts:
    """Namespaces 0 to n - 1; 10.77.0.1 is the first one's address."""

    def __init__(self, n: int) -> None:
        self.names = [f"{PREFIX}-{os.getpid()}-{i}" for i in range(n)]
        self.switch = f"{PREFIX}-{os.getpid()}-switch"

    def make(self) -> None:
        """Make hosts and the switch between them."""
        _run("ip", "netns", "add", self.switch)
        _run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        for number, name in enumerate(self.names):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "add", DEVICE, "type", "veth",
                 "peer", "name", f"port{number}", "netns", self.switch)  # fmt: skip
            _run("ip", "-n", self.switch, "link", "set", f"port{number}", "master", "bridge", "up")
            _run("ip", "-n", name, "address", "add", f"{self.address(number)}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", DEVICE, "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")

    def address(self, number: int) -> str:
        """Return a host's address."""
        return f"10.77.0.{number + 1}"

    def shape(self, mbit: float | None) -> None:
        """Let every host send at most so much; None lets it send as fast as it can."""
        for name in self.names:
            with suppress(RuntimeError):  # there was none
                _run("tc", "-n", name, "qdisc", "delete", "dev", DEVICE, "root")
            if mbit is not None:
                _run("tc", "-n", name, "qdisc", "add", "dev", DEVICE, "root", *_bucket(mbit))

    def command(self, number: int, *command: str) -> list[str]:
        """Return the command that runs another one on a host."""
        return ["ip", "netns", "exec", self.names[number], *command]

    def remove(self) -> None:
        """Remove all of it."""
        for name in (*self.names, self.switch):
            _remove(name)


@contextmanager
def hosts(n: int) -> Iterator[Hosts]:
    """Make `n` hosts; behind the block nothing is left of them."""
    _sweep()
    made = Hosts(n)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def left_over() -> list[str]:
    """Return namespaces of processes that are gone."""
    listed = [line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.split()]
    found = []
    for name in listed:
        prefix, _, rest = name.partition("-")
        pid = rest.partition("-")[0]
        if prefix == PREFIX and pid.isdigit() and not Path(f"/proc/{pid}").exists():
            found.append(name)
    return found


def _bucket(mbit: float) -> tuple[str, ...]:
    return "tbf", "rate", f"{mbit:g}mbit", "burst", BURST, "limit", QUEUE


def _sweep() -> None:
    for name in left_over():
        _remove(name)


def _remove(name: str) -> None:
    with suppress(RuntimeError):
        _run("ip", "netns", "delete", name)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(_shown(command))}: {done.stderr.strip()}")
    return done.stdout


def _shown(command: Sequence[str]) -> Sequence[str]:
    return command[:6]
