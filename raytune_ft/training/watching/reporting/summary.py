"""Summary: the figures of a run, read back from whatever its folder has.

A run that failed, was killed or goes on still has fewer files and shorter ones; each figure says
what is there, or that nothing is.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median
from typing import Any

from raytune_ft.errors import CheckpointError
from raytune_ft.training.run_folder import Event, RunFolder, read_json, read_jsonl
from raytune_ft.training.watching.reporting.series import Columns, Points, number

Answers = dict[str, dict[str, str]]
"""prompt -> {"before" | "step N" | "after": answer}, in order."""
RECENT = 50
"""Steps whose median is the speed of a run: its first ones warm up."""


@dataclass(frozen=True)
class Summary:
    """The figures of a run so far."""

    steps: int
    tokens: int
    targets: int
    first_loss: float
    last_loss: float
    seconds: float
    """Of optimizer steps, data included."""
    rows: Event
    samples: Answers
    """Answers drawn greedily."""
    drawn: Answers = field(default_factory=dict)
    """Answers drawn at a temperature."""
    val_loss: float | None = None
    """The last one."""
    best: Event | None = None
    """{"metric", "step", "value"} of the best measurement."""
    speed: float | None = None
    """Tokens per second of the usual step."""
    mfu: float | None = None
    """Share of the devices' FLOP/s, of the usual step."""
    data_wait: float | None = None
    """Share of the steps' time that was spent waiting for data."""
    memory_gib: float | None = None
    """Peak."""
    redone: int = 0
    """Steps that were taken again after a lost worker."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all optimizer steps."""
        return self.tokens / self.seconds if self.seconds else 0.0


def summarize(folder: RunFolder, columns: Columns | None = None) -> Summary:
    """Read the figures back from the run folder's files.

    Args:
        folder: of the run; files that are missing or damaged count as empty.
        columns: of its metrics.jsonl, if they were read already.
    """
    found = columns or Columns(read_jsonl(folder.metrics))
    losses = found.values("loss")
    seconds = sum(found.values("seconds"))
    info = lenient(folder, "run.json")
    return Summary(
        steps=found.steps,
        tokens=round(sum(found.values("tokens"))),
        targets=round(sum(found.values("targets"))),
        first_loss=losses[0] if losses else float("nan"),
        last_loss=losses[-1] if losses else float("nan"),
        seconds=seconds,
        rows=lenient(folder, "data.json"),
        samples=answers(folder, "greedy"),
        drawn=answers(folder, "sampled"),
        val_loss=found.last("val_loss"),
        best=best_of(info, found["val_loss"]),
        speed=usual(found["tokens_per_s"]),
        mfu=usual(found["mfu"]),
        data_wait=min(1.0, sum(found.values("data_seconds")) / seconds) if seconds else None,
        memory_gib=max(found.values("memory_gib"), default=None),
        redone=sum(int(number(line.get("redone")) or 0) for line in read_jsonl(folder.resumes)),
    )


def lenient(folder: RunFolder, name: str) -> Event:
    """Read a JSON object of a run folder; an empty one where it is missing or damaged."""
    try:
        content = read_json(folder.path / name)
    except CheckpointError:
        return {}
    return content if isinstance(content, dict) else {}


def answers(folder: RunFolder, kind: str) -> Answers:
    """Read the answers to the recipe's prompts, greedy or sampled, by prompt and moment."""
    found: Answers = {}
    for sample in read_jsonl(folder.samples):
        if isinstance(sample, dict) and sample.get("kind", "greedy") == kind:
            when = sample.get("when")
            moment = f"step {sample.get('step')}" if when == "step" else str(when)
            of_prompt = found.setdefault(str(sample.get("prompt")), {})
            of_prompt[moment] = str(sample.get("answer"))
    return found


def moments(summary: Summary) -> list[str]:
    """Name the moments at which the prompts were answered, in order."""
    return list(dict.fromkeys(when for answers in summary.samples.values() for when in answers))


def best_of(info: Event, held_out: Points) -> Event | None:
    """Return the best measurement: as the run recorded it, else the lowest held-out loss so far."""
    recorded = info.get("best")
    if isinstance(recorded, dict) and number(recorded.get("value")) is not None:
        return recorded
    if not held_out:
        return None
    step, value = min(held_out, key=lambda point: point[1])
    return {"metric": "val_loss", "step": int(step), "value": value}


def usual(points: Points) -> float | None:
    """Return the median of a run's last steps."""
    recent = [value for _, value in points[-RECENT:]]
    return median(recent) if recent else None


def as_words(value: Any) -> str:
    """Write a value of a record on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {as_words(one)}" for key, one in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(as_words, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)
