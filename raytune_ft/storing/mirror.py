"""Mirror: a run folder here in; the same run in a folder elsewhere out, beside the training.

A thread looks at the run folder and sends what is new: each committed checkpoint whole, its
manifest last; what stands beside checkpoints before that manifest, so that a run that is taken up
elsewhere has every line up to its checkpoint, and every now and then. Nothing waits for it. What
cannot be sent is tried again, more and more slowly, and is an error only at the very end.

    here    checkpoints/step_000010/    elsewhere    weights, optimizer, state
            metrics.jsonl, run.json     ---------->  metrics.jsonl, run.json, adapter/ ...
                                                     step_000010/manifest.json
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType

from raytune_ft.errors import CheckpointError
from raytune_ft.storing import steps
from raytune_ft.storing.places import Folder
from raytune_ft.training.run_folder import MANIFEST, RunFolder
from raytune_ft.training.saving import checkpoint

LOOK_S = 0.5
"""Between two looks at the run folder."""
SMALL_S = 30.0
"""Between two times that files beside the checkpoints are sent."""
BYTES_PER_S = 1 << 20
"""Of a file that grows and is sent again and again, at most so much."""
RETRY_S = (1.0, 60.0)
"""From the first failure to the next try, doubled each time, and at most."""
PATIENCE_S = 120.0
"""At the end of a run, for what is not sent yet."""

Stamp = tuple[int, int]
NOT_HERE: Stamp = (-1, -1)
Say = Callable[[str], None]


class Mirror:
    """Sends a run while the block runs, and the rest of it behind the block.

    Args:
        run: the run folder.
        place: where it is sent to.
        shown: that place, as messages name it.
        keep: `checkpoint.keep`.
        every_s: seconds between two times that small files are sent.
        known: stamps of files that are there already, as `stamps` returned them.
        patience_s: seconds at the end.
    """

    def __init__(
        self,
        run: RunFolder,
        place: Folder,
        shown: str,
        keep: int,
        *,
        every_s: float = SMALL_S,
        known: Mapping[str, Stamp] | None = None,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self.run, self.place, self.shown, self.keep = run, place, shown, keep
        self.every_s, self.patience_s = every_s, patience_s
        self.say: Say = lambda _line: None
        """Gets lines about what does not go well."""
        self._sent: dict[str, Stamp] = dict(known or {})
        self._at: dict[str, float] = {}
        self._there: dict[str, Stamp] = {}
        """Checkpoints that are there, and the manifest here that each has."""
        self._has_looked = False
        self._small_at = float("-inf")
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="mirror", daemon=True)

    def __enter__(self) -> Mirror:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        try:
            self.settle()
        except CheckpointError as problem:
            if error is None:
                raise
            self.say(str(problem))

    def settle(self) -> None:
        """Send all that is not there yet.

        Raises:
            CheckpointError: it could not be sent; says where the run stands meanwhile.
        """
        if not self.run.run_json.is_file():
            return  # it never began
        deadline, wait = time.monotonic() + self.patience_s, RETRY_S[0]
        while True:
            try:
                self.send(everything=True)
            except (CheckpointError, OSError) as error:
                if time.monotonic() + wait > deadline:
                    raise CheckpointError(
                        f"{self.shown}: the run could not be sent there to its end ({error}); it "
                        f"stands in {self.run.path}: the same command again, here, sends it"
                    ) from None
                time.sleep(wait)
                wait = min(2 * wait, RETRY_S[1])
            else:
                return

    def send(self, *, everything: bool = False) -> None:
        """Send what is new; with `everything` small files that are not due yet as well."""
        with self._lock:
            self._send_new(everything=everything)

    def _send_new(self, *, everything: bool) -> None:
        self.add(everything=everything)
        self.prune()

    def add(self, *, everything: bool = False) -> None:
        """Do the same but for what is to be deleted there."""
        for folder in reversed(self._unsent()):
            self._send_step(folder)
        if everything or time.monotonic() - self._small_at >= self.every_s:
            self._send_small(everything=everything)

    def _watch(self) -> None:
        wait, told = LOOK_S, False
        while not self._over.wait(wait):
            if not self.run.run_json.is_file():
                continue
            try:
                self.send()
            except (CheckpointError, OSError) as error:
                wait = RETRY_S[0] if wait == LOOK_S else min(2 * wait, RETRY_S[1])
                if not told:
                    self.say(f"{error}; training goes on, and what was not sent is tried again")
                told = True
            else:
                wait, told = LOOK_S, False

    def _unsent(self) -> list[Path]:
        """Return the whole checkpoints here that are not there, oldest first."""
        folders = checkpoint.step_folders(self.run.checkpoints)
        whole = [f for f in folders if checkpoint.damage(f, contents=False) is None]
        if not self._has_looked:
            self._there, self._has_looked = self._same(whole), True
        return [f for f in whole if self._there.get(f.name) != _stamp(f / MANIFEST)]

    def _same(self, whole: list[Path]) -> dict[str, Stamp]:
        """Return which steps are there; those that are others under the same name are dropped."""
        there = steps.steps_in(self.place.names(steps.CHECKPOINTS))
        for step in [step for step, is_whole in there.items() if not is_whole]:
            steps.drop(self.place, step)  # of a driver that was killed as it sent
        here = {folder.name: folder for folder in whole}
        found = {step: NOT_HERE for step, is_whole in there.items() if is_whole}
        for step in found.keys() & here.keys():
            if self.place.read(f"{steps.name_of(step)}/{MANIFEST}") == _manifest(here[step]):
                found[step] = _stamp(here[step] / MANIFEST)
        return found

    def _send_step(self, folder: Path) -> None:
        name, stamp = steps.name_of(folder.name), _stamp(folder / MANIFEST)
        if folder.name in self._there:  # another one under the same name
            steps.drop(self.place, folder.name)
            del self._there[folder.name]
        try:
            for file in sorted(folder.iterdir()):
                if file.name != MANIFEST:
                    self.place.send(file, f"{name}/{file.name}")
            self._send_small(everything=True)
            self.place.send(folder / MANIFEST, f"{name}/{MANIFEST}")
        except FileNotFoundError:  # `checkpoint.keep` removed it here meanwhile
            steps.drop(self.place, folder.name)
            return
        self._there[folder.name] = stamp

    def _send_small(self, *, everything: bool) -> None:
        self._small_at = now = time.monotonic()
        found = stamps(self.run)
        # run.json goes last: a run that it calls done has its result there
        for name in sorted(found, key=lambda name: (name == self.run.run_json.name, name)):
            slow = found[name][0] / BYTES_PER_S
            if self._sent.get(name) == found[name]:
                continue
            if everything or now - self._at.get(name, float("-inf")) >= slow:
                self._send_file(name, found[name], now)
        for name in self._sent.keys() - found.keys():
            self.place.delete(name)
            del self._sent[name]

    def _send_file(self, name: str, stamp: Stamp, now: float) -> None:
        try:
            self.place.send(self.run.path / name, name)
        except FileNotFoundError:  # it was removed meanwhile
            return
        self._sent[name], self._at[name] = stamp, now

    @property
    def there(self) -> set[str]:
        """The checkpoints that are known to be there."""
        return set(self._there)

    def prune(self, among: Iterable[str] | None = None) -> None:
        """Delete there what `checkpoint.keep` removes here.

        Args:
            among: checkpoints, as if there were no others; None: all that are there.
        """
        order = sorted(self._there if among is None else among, key=steps.number_of)
        if self.keep <= 0:
            return
        if len(order) <= self.keep:
            return
        best = _best_step(self.run)
        for step in order[: -self.keep]:
            if steps.number_of(step) != best:
                steps.drop(self.place, step)
                self._there.pop(step, None)


def stamps(run: RunFolder) -> dict[str, Stamp]:
    """Return size and time of change of a run's files beside its checkpoints."""
    found = {name: _stamp(run.path / name) for name in _small_names(run.path)}
    return {name: stamp for name, stamp in found.items() if stamp != NOT_HERE}


def _small_names(root: Path) -> Iterator[str]:
    for entry in root.iterdir():
        if not steps.is_small(entry.name):
            continue
        for path in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            name = path.relative_to(root).as_posix()
            if path.is_file() and steps.is_small(name):
                yield name


def _stamp(file: Path) -> Stamp:
    try:
        state = file.stat()
    except OSError:
        return NOT_HERE
    return state.st_size, state.st_mtime_ns


def _manifest(folder: Path) -> bytes:
    try:
        return (folder / MANIFEST).read_bytes()
    except OSError:
        return b""


def _best_step(run: RunFolder) -> int:
    """Return which checkpoint stays whatever its age, as the newest one tells."""
    for folder in reversed(checkpoint.step_folders(run.checkpoints)):
        try:
            return checkpoint.read_state(folder).best_step
        except (OSError, ValueError, CheckpointError):
            continue
    return 0
