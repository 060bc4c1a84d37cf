"""Recording: the events of a run in; lines in its folder, figures in its trackers, a screen out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import Interrupted
from raytune_ft.training.engine import rank
from raytune_ft.training.loop import Emit
from raytune_ft.training.run_folder import Event, RunFolder, append_jsonl
from raytune_ft.training.watching.trackers import Trackers

LEFT_OUT = {"step", "total", "exact", "share", "eta_seconds", "overflows"}
GROUPS = {
    "tokens_per_s": "speed", "targets_per_s": "speed", "seconds": "speed", "data_seconds": "speed",
    "data_wait": "speed", "mfu": "speed", "memory_gib": "memory", "memory_reserved_gib": "memory",
    "memory_device_gib": "memory", "rss_gib": "memory",
}  # fmt: skip
"""Where a tracker shows a field; the others stand under `train`, and held-out ones under `val`."""


@contextmanager
def recorded(folder: RunFolder, recipe: Recipe, show: Callable[[Event], None]) -> Iterator[Emit]:
    """Yield what records and shows a run's events on rank 0, and nothing on the other ranks."""
    if rank() != 0:
        yield _silent
        return
    writer = RunWriter(folder, recipe, show)
    status = "failed"
    try:
        yield writer
        status = "done"
    except Interrupted:
        status = "stopped"
        raise
    finally:
        writer.trackers.finish(status)


def _silent(kind: str, /, **fields: object) -> None:
    """Events of ranks other than 0 go nowhere."""


class RunWriter:
    """Sinks of a run's events: JSONL, trackers, and a function that shows them to a person."""

    def __init__(self, folder: RunFolder, recipe: Recipe, show: Callable[[Event], None]) -> None:
        self.folder, self.show = folder, show
        self.trackers = Trackers(folder, recipe, lambda line: self("warning", text=line))
        self._prompts: dict[str, int] = {}

    def __call__(self, kind: str, /, **fields: Any) -> None:
        """Record and show one event; `docs/watching.md` says what goes where."""
        record = getattr(self, f"_on_{kind}", None)
        if record is not None:
            record(fields)
        self.show({**fields, "kind": kind})

    def _on_stage(self, fields: Event) -> None:
        if fields["name"] == "train":  # by now it is known whether the run goes on, and from where
            self.trackers.start(fields["step"])

    def _on_fast_path(self, fields: Event) -> None:
        self.folder.update(fast_path=fields["lines"])

    def _on_step(self, fields: Event) -> None:
        append_jsonl(self.folder.metrics, fields)
        self.trackers.log(fields["step"], grouped(fields))

    def _on_sample(self, fields: Event) -> None:
        append_jsonl(self.folder.samples, fields)
        number = self._prompts.setdefault(fields["prompt"], len(self._prompts) + 1)
        words = f"{fields['when']}\n\n{fields['prompt']}\n\n{fields['answer']}"
        self.trackers.text(fields["step"], f"answers/{number}_{fields['kind']}", words)

    def _on_evaluation(self, fields: Event) -> None:
        append_jsonl(self.folder.evaluations, fields)

    def _on_mmlu(self, fields: Event) -> None:
        append_jsonl(self.folder.mmlu, fields)
        key = f"mmlu/{fields['name']}"
        self.trackers.log(fields["step"], {key: fields["average"]}, key)

    def _on_resumed(self, fields: Event) -> None:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        append_jsonl(self.folder.resumes, {**fields, "time": now})


def grouped(fields: Mapping[str, object]) -> dict[str, float]:
    """Return the finite numbers of a step by `group/name`: train, speed, memory, val, ranks."""
    found: dict[str, float] = {}
    for name, value in fields.items():
        if name == "rank_seconds" and isinstance(value, list) and len(value) > 1:
            found["ranks/slowest_seconds"] = max(value)
            found["ranks/fastest_seconds"] = min(value)
        if name in LEFT_OUT or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if math.isfinite(value):
            is_held_out = name.startswith("val_")
            group = "val" if is_held_out else GROUPS.get(name, "train")
            found[f"{group}/{name.removeprefix('val_')}"] = float(value)
    return found
