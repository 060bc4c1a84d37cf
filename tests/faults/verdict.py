"""What came of a run that was killed and went on, beside an undisturbed one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from raytune_ft.training.run_folder import RunFolder, read_json, read_jsonl
from raytune_ft.training.saving import checkpoint, durable
from tests.runs import adapter_of, sha256

KEPT = ("step", "epoch", "progress", "loss", "lr", "grad_norm", "tokens", "targets", "rows",
        "val_loss")  # fmt: skip
"""Fields of a step that no clock and no machine says."""

COUNTED = ("step", "epoch", "progress", "lr", "tokens", "targets", "rows")
"""Fields of a step that do not even depend on the order of additions."""
ROUNDING = 1e-4
"""Relative, of float32: Adam magnifies the rounding of gradients near its epsilon."""


@dataclass
class Kill:
    """One process that was killed."""

    at: float
    """On the clock of `time.monotonic`."""
    after_s: float
    """Seconds behind the start of the process."""
    victim: str
    phase: str
    """What the run was doing."""
    step: int
    """Optimizer steps in the ledger by then."""
    every: int
    """Steps between two saves."""
    resumed: int | None = None
    """Step of the checkpoint that the run went on from; None if it had trained to the end."""
    recovery_s: float | None = None
    """Seconds from the kill to the first step that had not been taken before."""

    @property
    def redone(self) -> int:
        """Steps that were taken a second time."""
        return 0 if self.resumed is None else max(0, self.step - self.resumed)


@dataclass
class Verdict:
    """Of one run."""

    seed: int
    variant: str
    kills: list[Kill]
    mismatches: list[str] = field(default_factory=list)
    repeated: int = 0
    missing: int = 0
    drift: float = 0.0
    """Largest relative difference of a trained tensor; 0 where bytes are compared."""
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self) | {"redone": [kill.redone for kill in self.kills]}


def compare(seed: int, variant: str, folder: Path, whole: Path, kills: list[Kill]) -> Verdict:
    """Compare weights, optimizer, ledger, answers and rows of a run with an undisturbed one's."""
    verdict = Verdict(seed, variant, kills)
    verdict.mismatches += [
        f"{kill.redone} steps redone, saved every {allowed}"
        for kill, allowed in zip(kills, intervals(kills), strict=True)
        if kill.redone > allowed
    ]
    found, wanted = contents(folder), contents(whole)
    verdict.mismatches += [
        f"{folder}: {name} differs"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    verdict.repeated, verdict.missing = repeated_and_missing(RunFolder(folder))
    return verdict


def intervals(kills: Iterable[Kill]) -> list[int]:
    """Return for each kill how many steps there may be behind the last save.

    A process that is killed before it takes a step leaves those of the one before it.
    """
    allowed: list[int] = []
    step = 0
    for kill in kills:
        left = allowed[-1] if allowed and kill.step == step else 0
        allowed.append(max(kill.every, left))
        step = kill.step
    return allowed


def compare_rounded(
    seed: int, variant: str, folder: Path, whole: Path, kills: list[Kill]
) -> Verdict:
    """Compare a run that changed its number of ranks: the same rows, weights but for rounding."""
    verdict = Verdict(seed, variant, kills)
    found, wanted = (list(read_jsonl(RunFolder(run).metrics)) for run in (folder, whole))
    same = [[{key: step[key] for key in COUNTED} for step in steps] for steps in (found, wanted)]
    if same[0] != same[1]:
        verdict.mismatches.append(f"{folder}: ledger differs")
    far = [
        step["step"]
        for step, other in zip(found, wanted, strict=False)
        if abs(step["loss"] - other["loss"]) > ROUNDING * abs(other["loss"])
    ]
    verdict.mismatches += [f"{folder}: loss of step {step} differs" for step in far]
    verdict.drift = drift(folder, whole)
    if verdict.drift > ROUNDING:
        verdict.mismatches.append(f"{folder}: weights differ by {verdict.drift:.1e}")
    verdict.repeated, verdict.missing = repeated_and_missing(RunFolder(folder))
    return verdict


def drift(folder: Path, whole: Path) -> float:
    """Return the largest relative difference of a tensor of two adapters, by its norm."""
    ours, theirs = (adapter_of(run) for run in (folder, whole))
    assert ours.keys() == theirs.keys()
    return max(float((ours[k] - theirs[k]).norm() / theirs[k].norm()) for k in theirs)


def contents(folder: Path) -> dict[str, Any]:
    """Everything of a run that must not depend on a kill."""
    run = RunFolder(folder)
    result = run.adapter if run.adapter.is_dir() else run.model
    newest = checkpoint.latest(run.checkpoints)
    assert newest is not None, f"{folder}: no checkpoint"
    record = read_json(folder / "data.json")
    steps = list(read_jsonl(run.metrics))
    return {
        **{f"{result.name}/{file.name}": sha256(file) for file in sorted(result.iterdir())},
        "checkpoint's weights": sha256(newest / checkpoint.WEIGHTS),
        "checkpoint's optimizer": sha256(newest / checkpoint.OPTIMIZER),
        "checkpoint's state": json.loads((newest / checkpoint.STATE).read_text()),
        "ledger": [{key: step.get(key) for key in KEPT} for step in steps],
        "answers": list(read_jsonl(run.samples)),
        "rows": {key: record[key] for key in ("rows", "used", "dropped", "packs", "density")},
        "status": read_json(run.run_json)["status"],
        "left behind": left_behind(run),
    }


def left_behind(run: RunFolder) -> list[str]:
    """Name what only a stopped process can have left."""
    prefixes = (durable.WRITING, durable.FORMER, durable.DROPPED)
    places = [*run.path.iterdir(), *run.checkpoints.iterdir()]
    return sorted(path.name for path in places if path.name.startswith(prefixes))


def repeated_and_missing(run: RunFolder) -> tuple[int, int]:
    """Count rows that an epoch saw more than once, and those that it never saw."""
    steps = list(read_jsonl(run.metrics))
    wanted = set(range(read_json(run.path / "data.json")["rows"]))
    repeated = missing = 0
    for epoch in {step["epoch"] for step in steps}:
        seen = Counter(row for step in steps if step["epoch"] == epoch for row in step["rows"])
        repeated += sum(count - 1 for count in seen.values())
        missing += len(wanted - set(seen))
    return repeated, missing


def percentile(values: Iterable[float], share: float) -> float:
    """Return the value below which this share of them lies; nan without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
