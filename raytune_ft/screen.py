"""What a person sees of a run: progress on a terminal, plain lines elsewhere, a summary panel.

All of it goes to stderr; results for scripts go to stdout. The lines are kept in the run's
`lines.log` as well, where `raytune-ft logs` finds them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from raytune_ft.training.watching.data_record import loss_line
from raytune_ft.training.watching.reporting import Summary, clock, moments
from raytune_ft.training.watching.reporting.series import evenly

Event = dict[str, Any]

SLOW_DATA = 0.05
"""Share of a step from which waiting for data is worth a word."""
KEPT_WIDTH = 100
"""Columns of the tables in a file."""
MOMENTS = 4
"""Columns of answers that a terminal has room for; the report has all."""
STAGES = {
    "model folder": "model folder",
    "ray": "start Ray",
    "data": "read and tokenise rows",
    "workers": "start workers",
    "load model": "load model",
    "samples": "ask the sample prompts",
    "mmlu": "answer the MMLU questions",
    "validation": "measure held-out rows",
    "questions": "answer held-out rows",
    "train": "train",
    "checkpoint": "save checkpoint",
    "export": "write adapter",
    "report": "write report",
}


class Screen:
    """Shows the events of a run as they come; safe to call from one thread at a time.

    Args:
        log_every: steps between two lines.
        console: where people look; by default stderr.
        kept: file to which the lines are added as well.
    """

    def __init__(
        self, log_every: int, *, console: Console | None = None, kept: Path | None = None
    ) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self._kept = _file_console(kept) if kept is not None else None
        self.log_every = log_every
        self.started = time.monotonic()
        self._stage = ""
        self._live: Live | None = None
        self._closed = False
        self._bars = Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[note]}"),
            console=self.console,
        )
        self._tasks: dict[str, Any] = {}

    @contextmanager
    def live(self) -> Iterator[Screen]:
        """Draw progress bars while the block runs, on a terminal only."""
        if not self.console.is_terminal:
            yield self
            return
        with Live(self._bars, console=self.console, refresh_per_second=8) as self._live:
            yield self
        self._live = None

    def close(self) -> None:
        """Take the bars away and show nothing more, from any thread."""
        self._closed = True
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        """Show one event of a run."""
        handler = getattr(self, f"_on_{event['kind']}", None)
        if handler and not self._closed:
            handler(event)

    def stage(self, name: str, done: int = 0, total: int = 0) -> None:
        """Say that a stage began, or how far it is."""
        self({"kind": "stage", "name": name, "done": done, "total": total})

    def line(self, text: str, style: str = "") -> None:
        """Print one line above the bars."""
        shown = Text(text, style=style) if style else text
        self.console.print(shown, soft_wrap=True)
        self._keep(Text(text))

    def show(self, shown: RenderableType) -> None:
        """Print a table or the like."""
        self.console.print(shown)
        self._keep(shown)

    def note(self, text: str) -> None:
        """Keep a line whose content is drawn elsewhere."""
        self._keep(Text(text))

    def _keep(self, shown: RenderableType) -> None:
        if self._kept is not None:
            with suppress(OSError):  # a full disk is told where it matters
                self._kept.print(shown, soft_wrap=isinstance(shown, Text))

    def _on_stage(self, event: Event) -> None:
        name, total = str(event["name"]), int(event.get("total") or 0)
        label = STAGES.get(name, name)
        words = f"[{time.monotonic() - self.started:6.1f} s] {label}"
        is_told = name != self._stage and name not in ("checkpoint", "train", "validation")
        if is_told and self._live is None:
            self.line(words)
        elif is_told:
            self._keep(Text(words))
        if self._live is not None:
            done = int(event["done"] if "done" in event else event.get("step") or 0)
            self._bar(name, label, done, total, exact=bool(event.get("exact", True)))
        self._stage = name

    def _bar(
        self, name: str, label: str, done: int, total: int, *, exact: bool = True, note: str = ""
    ) -> None:
        if self._stage in self._tasks and self._stage not in (name, "train"):
            finished = self._bars.tasks[self._tasks[self._stage]]
            self._bars.update(finished.id, total=finished.total or 1, completed=finished.total or 1)
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(label, total=None, note="", count="")
        count = f"{done:,}/{'' if exact else '~'}{total:,}" if total else ""
        self._bars.update(
            self._tasks[name], completed=done, total=total or None, count=count, note=note
        )

    def _on_step(self, event: Event) -> None:
        if self._live is not None:
            self._bar(
                "train", STAGES["train"], event["step"], event["total"], exact=event["exact"],
                note=_short(event),
            )  # fmt: skip
        if event["step"] % self.log_every == 0 or event["step"] == 1 or event["share"] == 1.0:
            self.line(step_line(event))

    def _on_rows(self, event: Event) -> None:
        self.line(event["text"], style="yellow")

    def _on_fast_path(self, event: Event) -> None:
        for text in event["lines"]:
            self.line(text)

    def _on_warning(self, event: Event) -> None:
        self._on_rows(event)

    def _on_mmlu(self, event: Event) -> None:
        self.line(mmlu_line(event))

    def _on_resumed(self, event: Event) -> None:
        again = f"; {event['redone']} steps are taken again" if event.get("redone") else ""
        self.line(f"resumed from the checkpoint of step {event['step']}{again}")

    def _on_restart(self, event: Event) -> None:
        why = f" ({event['why']})" if event.get("why") else ""
        self.line(f"a worker was lost{why}; going on from the last checkpoint", style="yellow")

    def summary(self, summary: Summary, folder: str, next_commands: list[str]) -> None:
        """Print the answers side by side and the panel that ends a run."""
        shown: list[Table | Panel] = [answers_table(summary)] if summary.samples else []
        for part in (*shown, _panel(summary, folder, next_commands)):
            self.console.print(part)
            self._keep(part)


def _file_console(path: Path) -> Console | None:
    """Open a run's lines, and say when a driver began; None where they cannot be kept."""
    try:
        file = path.open("a", encoding="utf-8", errors="replace", buffering=1)
        file.write(f"--- {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z} ---\n")
    except OSError:
        return None
    return Console(
        file=file, width=KEPT_WIDTH, color_system=None, force_terminal=False, highlight=False,
        legacy_windows=False,
    )  # fmt: skip


def step_line(event: Event) -> str:
    """Format one step: always the same order, always with units; `~` marks an estimate.

    What cannot be told here, as MFU without a GPU, or is as it should be, as data that is there
    when it is wanted, is left out.
    """
    about = "" if event["exact"] else "~"
    parts = [
        f"step {event['step']}/{about}{event['total']}",
        f"loss {event['loss']:.4f}",
        f"grad {event['grad_norm']:.2f}",
        f"lr {event['lr']:.2e}",
        f"{event['seconds']:.2f} s",
        f"{event['tokens_per_s']:,.0f} tok/s",
        f"mem {event['memory_gib']:.1f} GiB",
        f"eta {clock(event['eta_seconds'])}",
    ]
    if event["mfu"] is not None:
        parts.insert(6, f"mfu {event['mfu']:.1%}")
    if event["data_wait"] >= SLOW_DATA:
        parts.insert(-2, f"data {event['data_wait']:.0%}")
    if event.get("val_loss") is not None:
        parts.insert(2, f"held-out {event['val_loss']:.4f}")
    if event.get("rewards_accuracy") is not None:
        preferred = f"{event['rewards_accuracy']:.0%} by {event['rewards_margin']:.3f}"
        parts.insert(2, f"preferred {preferred}")
    return " | ".join(parts)


def mmlu_line(event: Event) -> str:
    """Format the accuracies of one file of MMLU questions."""
    parts = ", ".join(f"{name} {share:.2f}" for name, share in event["categories"].items())
    return (
        f"{event['name']}, step {event['step']}: average {event['average']:.2f} % ({parts}) "
        f"of {event['questions']:,} questions"
    )


def _short(event: Event) -> str:
    return (
        f"eta {clock(event['eta_seconds'])}  loss {event['loss']:.3f}  lr {event['lr']:.1e}  "
        f"{event['tokens_per_s']:,.0f} tok/s  {event['memory_gib']:.1f} GiB"
    )


def answers_table(summary: Summary) -> Table:
    """Lay the answers of some moments side by side, the first and last among them."""
    table = Table(title="answers", title_justify="left", show_lines=True)
    table.add_column("question", ratio=2, overflow="fold")
    columns = evenly(moments(summary), MOMENTS)
    for when in columns:
        table.add_column(when, ratio=3, overflow="fold")
    for prompt, answers in summary.samples.items():
        cells = [_shorten(answers.get(when, "")) for when in columns]
        table.add_row(prompt, *(cell.replace("[", "\\[") for cell in cells))
    return table


def _shorten(text: str, limit: int = 160) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1] + "…"


def rows_text(rows: Event) -> str:
    """Say what became of the rows of an epoch, or of its part that was visited."""
    text = f"{rows['used']:,} of {rows['rows']:,} used"
    lost = loss_line(rows)
    whole = rows.get("exact", True)
    return text + (f"; {lost}" if lost else "") + ("" if whole else " (not a whole epoch)")


def _panel(summary: Summary, folder: str, next_commands: list[str]) -> Panel:
    grid = Table.grid(padding=(0, 2))
    if summary.rows:
        grid.add_row("rows", Text(rows_text(summary.rows)))
    grid.add_row("tokens", f"{summary.tokens:,} read, {summary.targets:,} trained")
    grid.add_row(
        "loss", f"{summary.first_loss:.3f} → {summary.last_loss:.3f}, {summary.steps} steps"
    )
    if summary.val_loss is not None:
        grid.add_row("held out", _held_out(summary))
    grid.add_row("speed", _speed(summary))
    if summary.memory_gib is not None:
        grid.add_row("memory", f"{summary.memory_gib:.2f} GiB at the peak")
    if summary.redone:
        grid.add_row("redone", f"{summary.redone:,} steps after lost workers")
    grid.add_row("files", folder)
    grid.add_row("report", f"{folder}/report.html")
    grid.add_row("next", "\n".join(next_commands))
    return Panel(grid, title="done", title_align="left", border_style="green")


def _held_out(summary: Summary) -> str:
    best = summary.best or {}
    text = f"loss {summary.val_loss:.4f}"
    if not best:
        return text
    return f"{text}; best {best['metric']} {best['value']:.4g} at step {best['step']}"


def _speed(summary: Summary) -> str:
    parts = [f"{summary.tokens_per_s:,.0f} tok/s"]
    if summary.mfu is not None:
        parts.append(f"mfu {summary.mfu:.1%}")
    if summary.data_wait is not None and summary.data_wait >= SLOW_DATA:
        parts.append(f"{summary.data_wait:.0%} waiting for data")
    return ", ".join([*parts, f"{clock(summary.seconds)} of steps"])
