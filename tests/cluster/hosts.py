"""Hosts: one machine in, several with an address, a disk and processes of their own out.

Each host is a process that Linux gave a network, a disk, a host name and process numbers of its
own (`unshare`), and below it everything that runs there. A bridge in a network of its own joins
them; nothing of the machine's network is touched. They see the machine's disk, which they cannot
write to: /tmp, /run and /dev/shm are each host's own, and gone with it. What stands below
`Cluster.disks` is a disk per host that outlives it; what is `shared` is the network disk that some
clusters have.

A host ends with the process that holds it up, and that with the thread of the test, however it
ends: nothing can be left behind. Root, `ip` and `unshare` are needed; `missing` says what is not.

    10.77.0.1 host0   head: control service, no CPU, and the driver where a test wants it there
    10.77.0.2 host1   ...
    10.77.0.250       redis, where the control service keeps its state there
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT

TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount")
NETWORK = "10.77.0"
REDIS = 250
PORT, REDIS_PORT = 6379, 6400
OWN = ("/tmp", "/run", "/dev/shm")
HOME, DISK = "/tmp/home", "/tmp/disk"
STORE_BYTES = 100 * 2**20
"""Of the object store of a node; Ray takes no less than 75 MB."""
STARTS_IN_S, ATTEMPTS = 240.0, 4
IDLES = "while :; do sleep 3600 & wait $!; done"
"""The first process of a host: it takes the status of those that lose their parent."""
ENV = {
    "HOME": HOME, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1",
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
    "RAY_worker_niceness": "0",  # 15 starves them where others work on the machine
}  # fmt: skip


def missing(*, redis: bool = False) -> str:
    """Say what a test that needs hosts is skipped for; empty: nothing is missing."""
    if os.geteuid() != 0:
        return "hosts in namespaces need root"
    tools = [*TOOLS, *(["redis-server"] if redis else [])]
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return f"hosts in namespaces need {', '.join(absent)}" if absent else ""


@dataclass
class Host:
    """One host that is up."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]
    pid: int
    """Of its first process, as this machine counts."""

    def enter(self, *, only_network: bool = False) -> list[str]:
        """Return the words before a command that is to run there."""
        what = ["-n"] if only_network else ["-m", "-u", "-n", "-p"]
        return ["nsenter", "-t", str(self.pid), *what, "--"]

    def path(self, inside: str | Path) -> Path:
        """Return the path here of what lies on this host; it ends with the host."""
        return Path(f"/proc/{self.pid}/root{inside}")

    def end(self) -> None:
        """Cut its power: all of its processes are killed at once, its disk is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.holder.wait(30)


@dataclass
class Cluster:
    """Hosts by number, host 0 being the head, and what may happen to them."""

    shared: Sequence[Path] = ()
    """Folders that all hosts have at the same path, and may write to."""
    disks: Path | None = None
    """Folder here of the folders `host0`, `host1` ... that are DISK there; None: no such disk."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Of every command, Ray's among them, beside `ENV`."""
    on_redis: bool = False
    up: dict[int, Host] = field(default_factory=dict)
    _switch: Host | None = None
    _mending: list[threading.Thread] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Of the head's control service, as RAY_ADDRESS takes it."""
        return f"{NETWORK}.1:{PORT}"

    def boot(self, number: int) -> Host:
        """Switch a host on; Ray is not started there."""
        if self._switch is None:
            self._switch = _hold("switch", "", "true")
            self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
            self._in_switch("ip", "link", "set", "bridge", "up")
        name = "redis" if number == REDIS else f"host{number}"
        address = f"{NETWORK}.{number if number == REDIS else number + 1}"
        host = _hold(name, address, _mounts(self._kept(number)))
        port = self._port(number)
        peer = ["peer", "name", "eth0", "netns", str(host.pid)]
        self._in_switch("ip", "link", "add", port, "type", "veth", *peer)
        self._in_switch("ip", "link", "set", port, "master", "bridge", "up")
        for words in (f"addr add {address}/24 dev eth0", "link set eth0 up", "link set lo up"):
            _call([*host.enter(only_network=True), "ip", *words.split()])
        self.up[number] = host
        return host

    def start(self, number: int, cpus: float = 1.0) -> None:
        """Start Ray on a host, the head's control service on host 0; switch it on if it is off.

        Ray gives itself 30 s, which a busy machine may not: the host is then tried again.
        """
        for _ in range(ATTEMPTS):
            if number not in self.up:
                self.boot(number)
            started = self._start(self.up[number], number, cpus)
            if not started.returncode:
                return
            self.kill(number)
        raise RuntimeError(f"Ray on host{number}: {started.stdout[-3000:]}")

    def _start(self, host: Host, number: int, cpus: float) -> subprocess.CompletedProcess[str]:
        where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        if number:
            where = [f"--address={self.address}"]
        return self.run(
            number,
            [_script("ray"), "start", *where, f"--node-ip-address={host.address}",
             f"--num-cpus={cpus:g}", f"--object-store-memory={STORE_BYTES}",
             "--disable-usage-stats", f"--resources={{\"{host.name}\": 1}}"],
            env={"RAY_REDIS_ADDRESS": f"{NETWORK}.{REDIS}:{REDIS_PORT}"}
            if self.on_redis and not number else {},
        )  # fmt: skip

    def start_redis(self) -> None:
        """Start the server, on a host of its own, that outlives the head."""
        self.boot(REDIS)
        words = ["redis-server", "--port", str(REDIS_PORT), "--bind", "0.0.0.0", "--save", "",
                 "--protected-mode", "no", "--dir", "/tmp"]  # fmt: skip
        self.begin(REDIS, words, self.up[REDIS].path("/tmp/redis.log"))

    def run(
        self,
        number: int,
        words: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        seconds: float = STARTS_IN_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host to its end; both of its streams are in `stdout`."""
        told = self.up[number].path(f"/tmp/told_{time.monotonic_ns()}")
        process = self.begin(number, words, told, env=env)
        # a pipe would be held open by what Ray starts to stay
        code = process.wait(seconds)
        return subprocess.CompletedProcess(process.args, code, told.read_text(errors="replace"))

    def begin(
        self,
        number: int,
        words: Sequence[str | Path],
        output: Path,
        *,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Begin a command on a host; what it prints is added to `output`."""
        enter = [*self.up[number].enter(), "env", "-C", "/tmp"]
        with output.open("ab") as file:
            return subprocess.Popen(
                [*enter, *map(str, words)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                env={**_inherited(), **ENV, **self.env, **(env or {})},
            )  # fmt: skip

    def put(self, number: int, source: Path, target: str) -> None:
        """Copy a file or folder of this machine to a host."""
        place = self.up[number].path(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, place, dirs_exist_ok=True)
        else:
            shutil.copy2(source, place)

    def processes(self, number: int, word: str = "") -> list[int]:
        """Find a host's processes, by this machine's numbers, whose command has a word in it."""
        own, found = Path(f"/proc/{self.up[number].pid}/ns/pid").readlink(), []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if (path / "ns/pid").readlink() == own and word in command:
                    found.append(int(path.name))
        return [pid for pid in found if pid != self.up[number].pid]

    def kill(self, number: int, word: str | None = None) -> int:
        """Kill a host, or only its processes whose command has a word in it; say how many."""
        if word is None:
            self.up.pop(number).end()
            return 1
        found = self.processes(number, word)
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(found)

    def cut(self, number: int, seconds: float) -> None:
        """Pull a host's cable, and put it back after so many seconds, while the test goes on."""
        self._in_switch("ip", "link", "set", self._port(number), "down")

        def mend() -> None:
            time.sleep(seconds)
            with contextlib.suppress(RuntimeError):  # the hosts are gone
                self._in_switch("ip", "link", "set", self._port(number), "up")

        self._mending.append(threading.Thread(target=mend, daemon=True))
        self._mending[-1].start()

    def shape(self, number: int, megabits: float) -> None:
        """Let a host send no more than so many megabits per second."""
        rate = f"tc qdisc replace dev eth0 root tbf rate {megabits}mbit burst 256kb latency 50ms"
        _call([*self.up[number].enter(only_network=True), *rate.split()])

    def end(self) -> None:
        """Switch everything off."""
        for number in list(self.up):
            self.kill(number)
        if self._switch is not None:
            self._switch.end()

    def disk(self, number: int) -> Path:
        """Return the folder here that is DISK on a host."""
        assert self.disks is not None
        place = self.disks / f"host{number}"
        place.mkdir(exist_ok=True)
        return place

    def _kept(self, number: int) -> dict[Path, Path]:
        """Return what a host has of this machine's folders: where they are there, and here."""
        needed = [ROOT, Path(sys.prefix), Path(sys.base_prefix)]
        hidden = [path for path in needed if any(path.is_relative_to(own) for own in OWN)]
        own = {Path(DISK): self.disk(number)} if self.disks is not None else {}
        return {**{path: path for path in (*self.shared, *hidden)}, **own}

    def _port(self, number: int) -> str:
        return f"port{number}"

    def _in_switch(self, *words: str) -> None:
        assert self._switch is not None
        _call([*self._switch.enter(only_network=True), *words])


@contextlib.contextmanager
def hosts(
    n: int,
    *,
    cpus: float | Sequence[float] = 1.0,
    shared: Sequence[Path] = (),
    disks: Path | None = None,
    env: Mapping[str, str] | None = None,
    on_redis: bool = False,
) -> Iterator[Cluster]:
    """Have n hosts with a Ray node each while the block runs; host 0 is the head and has no CPU.

    Args:
        n: hosts, the head among them.
        cpus: of every host behind the head, or of each one.
        shared: folders that all hosts see; none: no host sees what another one wrote.
        disks: as in `Cluster`.
        env: of everything that runs there.
        on_redis: whether the head's control service keeps its state on a Redis server.
    """
    each = [cpus] * (n - 1) if isinstance(cpus, int | float) else list(cpus)
    cluster = Cluster(shared, disks, env or {}, on_redis)
    try:
        if on_redis:
            cluster.start_redis()
        for number in range(n):
            cluster.start(number, each[number - 1] if number else 0)
        yield cluster
    finally:
        cluster.end()


def _hold(name: str, address: str, disks: str) -> Host:
    """Begin a host's first process; what it holds up ends with it, and it with this thread."""
    told, tell = os.pipe()
    names = ["127.0.0.1 localhost", *(f"{NETWORK}.{k + 1} host{k}" for k in range(16))]
    words = [
        "set -e", f"hostname {name}", disks,
        f"mkdir -p {HOME}; printf '%s\\n' {' '.join(map(repr, names))} >/run/hosts",
        "mount --bind /run/hosts /etc/hosts; mount -o remount,bind,ro /",
    ]  # fmt: skip
    script = "; ".join([*(words if address else []), f"echo up >&{tell}; exec {tell}>&-", IDLES])
    holder = subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", "unshare", "--net", "--mount", "--uts", "--pid",
         "--ipc", "--fork", "--kill-child", "--mount-proc", "bash", "-c", script],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        pass_fds=[tell],
    )  # fmt: skip
    os.close(tell)
    with os.fdopen(told) as heard:
        if "up" not in heard.read(2):
            raise RuntimeError(f"{name} does not come up: {holder.communicate(timeout=10)[1]!r}")
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text()
    return Host(name, address, holder, int(children.split()[0]))


def _mounts(kept: Mapping[Path, Path]) -> str:
    """Return the shell's words that give a host its own disks, and put aside what it keeps first.

    Args:
        kept: folders there -> here.
    """
    words = ["mount -t tmpfs aside /mnt"]
    words += [
        f"mkdir /mnt/{k}; mount --bind {here} /mnt/{k}" for k, here in enumerate(kept.values())
    ]
    words += [f"mount -t tmpfs -o size=2g own {own}" for own in OWN]
    words += [f"mkdir -p {path}; mount --bind /mnt/{k} {path}" for k, path in enumerate(kept)]
    return "; ".join([*words, "umount -l /mnt"])


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _inherited() -> dict[str, str]:
    """Return what hosts take over from this process: nothing of Ray's, nothing secret."""
    return {key: os.environ[key] for key in ("PATH", "LANG", "TERM") if key in os.environ}


def _call(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
