"""`sweep.html`: a sweep on one page: parallel coordinates, importance, curves, what to do next.

It stands beside the runs' `report.html` and looks like it; what moves on it is one script of its
own, which the browser knows by its hash. Nothing is fetched. A sweep that goes on, failed or was
killed has the same page with less on it.
"""

from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

import yaml

from raytune_ft.config.schema import TuneSection
from raytune_ft.errors import CheckpointError
from raytune_ft.sweeping import lineage
from raytune_ft.sweeping.axes import axes_of
from raytune_ft.sweeping.coordinates import figure_of
from raytune_ft.sweeping.deciding import importance_part
from raytune_ft.sweeping.trials import DONE, FAILED, RUNNING, STOPPED, Ledger, Trial, ranked
from raytune_ft.sweeping.words import assignments, figure, short_field, short_value
from raytune_ft.training.run_folder import Event, RunFolder, read_jsonl
from raytune_ft.training.watching.reporting import clock, tables, write_report
from raytune_ft.training.watching.reporting.charts import figures
from raytune_ft.training.watching.reporting.listing import status_of
from raytune_ft.training.watching.reporting.series import Columns, number, smooth, thin
from raytune_ft.training.watching.reporting.style import page, text
from raytune_ft.training.watching.reporting.summary import lenient
from raytune_ft.training.watching.reporting.svg import SMOOTHED, Chart, Line

FILE = "sweep.html"
EVERY = 5.0
"""Seconds between two pages of a sweep that goes on, at least."""
SHARE = 0.02
"""Of the time, at most, that goes into pages of a sweep that goes on."""
POINTS = 24_000
"""Of all lines of a chart together."""
LOOKS = 5
"""Colours of lines, from the best trial's to the worst's."""

STYLE = """
.q0{--own:var(--c0)} .q1{--own:color-mix(in oklab,var(--c0) 62%,var(--c2))}
.q2{--own:var(--c2)} .q3{--own:var(--c4)} .q4{--own:var(--c1)} .q5{--own:var(--c7)}
.chart .thread,.curve path,.curve .dot{stroke:var(--own)}
.chart .thread{stroke-width:1.6;opacity:.75} .chart .best{stroke-width:3;opacity:1}
.chart .gone,.curve.gone{opacity:.38} .chart .lost{stroke:var(--bad);stroke-dasharray:4 3}
.curve{opacity:.85} .curve.best{opacity:1} .chart .curve.best path{stroke-width:2.8}
.chart .out,.curve.out{opacity:.06} .lighting .thread:not(.lit),.lighting .curve:not(.lit)
{opacity:.1} .chart .lit,.curve.lit{opacity:1} .chart .thread.lit,.chart .curve.lit path
{stroke-width:3}
.trials td,.trials th{white-space:nowrap} .trials td:last-child,.trials th:last-child{
white-space:normal;text-align:left;min-width:11rem;width:100%}
.go{color:var(--soft);margin:.8rem 0 .3rem}
tr.out{opacity:.3} tr.lit td{background:var(--panel)} a{color:var(--c0)}
.chart .mark{paint-order:stroke;stroke:var(--page);stroke-width:3px;stroke-linejoin:round;
pointer-events:none}
.chart .name{pointer-events:none} .coordinates .name{paint-order:stroke;stroke:var(--page);
stroke-width:3px;stroke-linejoin:round} .grasp{fill:transparent;cursor:crosshair;touch-action:none}
.brush{fill:var(--c0);opacity:.16;pointer-events:none}
#said{min-height:1.5em;font-variant-numeric:tabular-nums}
.swatch{display:inline-block;width:.7rem;height:.7rem;border-radius:2px;margin-right:.45rem;
background:var(--own)}
.share{position:relative;height:.8rem;background:var(--panel);border:1px solid var(--line);
border-radius:4px;min-width:7rem;margin-top:.35rem} .share i{position:absolute;inset:0 auto 0 0;
border-radius:3px;background:var(--c0)} .share.weak i{background:var(--c7);opacity:.6}
.share u{position:absolute;top:-.2rem;bottom:-.2rem;width:2px;background:var(--ink)}
.weights{width:100%} .weights td:nth-child(2){width:55%} .weights td{vertical-align:middle}
@media print{#said{display:none}}
"""


@dataclass
class Pages:
    """Writes a sweep's page while it goes on, not too often, and reads no run twice.

    Args:
        folder: of the sweep.
        now: seconds of a steady clock.
    """

    folder: RunFolder
    now: Callable[[], float] = time.monotonic
    _next: float = 0.0
    _read: dict[Path, tuple[int, Columns]] = field(default_factory=dict)

    def update(self) -> bool:
        """Write the page if it is time; return whether it was."""
        began = self.now()
        if began < self._next:
            return False
        with suppress(OSError):  # a full disk ends a sweep in its own words, not for this page
            self.write()
        took = self.now() - began
        self._next = self.now() + max(EVERY, took / SHARE)
        return True

    def write(self) -> Path:
        """Write the page now; return its path."""
        content = _page(self.folder, self._columns)
        temporary = self.folder.path / f".{FILE}"
        temporary.write_text(content, encoding="utf-8", errors="replace")
        temporary.replace(self.folder.path / FILE)
        return self.folder.path / FILE

    def _columns(self, trial: Trial) -> Columns:
        path = trial.folder / "metrics.jsonl"
        size = path.stat().st_size if path.is_file() else 0
        if self._read.get(path, (-1, None))[0] != size:
            self._read[path] = (size, Columns(read_jsonl(path)))
        return self._read[path][1]


def write_page(folder: RunFolder) -> Path:
    """Write sweep.html from what stands in a sweep's folder; return its path.

    Raises:
        CheckpointError: its trials.jsonl is of no sweep.
    """
    return Pages(folder).write()


def write_reports(trials: Iterable[Trial]) -> None:
    """Write report.html of trials that are over, took a step and have none."""
    for trial in trials:
        folder = RunFolder(trial.folder)
        is_there = (folder.path / "report.html").is_file()
        if trial.is_over and folder.metrics.is_file() and not is_there:
            with suppress(OSError):
                write_report(folder)


def is_sweep(folder: RunFolder) -> bool:
    """Tell whether a run folder is a sweep's."""
    return (folder.path / "trials.jsonl").is_file()


@dataclass(frozen=True)
class _Sweep:
    """What the page is made of."""

    folder: RunFolder
    info: Event
    status: str
    section: TuneSection
    trials: list[Trial]
    """Best first."""
    columns: dict[int, Columns]

    @property
    def fields(self) -> list[str]:
        return list(dict.fromkeys(name for one in self.trials for name in one.values))

    @property
    def best(self) -> Trial | None:
        first = self.trials[0] if self.trials else None
        return first if first is not None and first.state == DONE else None


def _page(folder: RunFolder, columns_of: Callable[[Trial], Columns]) -> str:
    info, section = lenient(folder, "run.json"), _section(folder)
    try:
        trials = ranked(Ledger.read(folder.path).trials.values(), section.mode)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder.path / 'trials.jsonl'}: is no sweep's ledger ({error!r}); the folder is "
            "damaged"
        ) from None
    columns = {one.number: columns_of(one) for one in trials}
    trials = [_as_it_is(one, columns[one.number], section) for one in trials]
    trials = ranked(trials, section.mode)
    sweep = _Sweep(folder, info, status_of(folder, info), section, trials, columns)
    looks = _looks(trials)
    parts = [
        f"<div id=sweep{' data-running=1' if sweep.status == 'running' else ''}>",
        _head(sweep),
        tables.cards(_cards(sweep)),
        _best(sweep),
        _coordinates(sweep, looks),
        importance_part(section, trials),
        "<h2>Curves</h2>",
        figures(_curves(sweep, looks, "loss"), _measured(sweep, looks)),
        _table(sweep, looks),
        lineage.lineage_part(trials),
        _recipe(folder),
        "</div>",
    ]
    script = resources.files("raytune_ft.sweeping").joinpath("page.js").read_text("utf-8")
    return page(str(info.get("name", folder.path.name)), parts, style=STYLE, script=script)


def _section(folder: RunFolder) -> TuneSection:
    """Read the recipe's `tune`; the default one where the recipe is damaged."""
    try:
        content = yaml.safe_load(folder.recipe.read_text(encoding="utf-8"))
        return TuneSection.model_validate(content["tune"])
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return TuneSection()


def _as_it_is(trial: Trial, columns: Columns, section: TuneSection) -> Trial:
    """Add what a running trial has written since its ledger's last line."""
    if trial.is_over or not columns.steps:
        return trial
    steps = [points[-1][0] for points in columns.points.values()]
    metric = columns.last(section.metric)
    return replace(
        trial, metric=trial.metric if metric is None else metric,
        step=int(max(steps, default=trial.step)), seconds=sum(columns.values("seconds")),
    )  # fmt: skip


def _looks(trials: Sequence[Trial]) -> dict[int, str]:
    """Return the classes of each trial's line: colour by place, best, stopped, failed."""
    known = [one for one in trials if number(one.metric) is not None and not _is_lost(one)]
    found = {}
    for place, one in enumerate(known):
        color = "q0" if place == 0 else f"q{min(LOOKS - 1, place * LOOKS // len(known))}"
        best = " best" if place == 0 and one.state == DONE else ""
        found[one.number] = color + best + (" gone" if one.state == STOPPED else "")
    for one in trials:
        if one.number not in found:
            found[one.number] = "q5 lost" if _is_lost(one) else "q5"
    return found


def _is_lost(trial: Trial) -> bool:
    return trial.state.startswith(FAILED)


def _head(sweep: _Sweep) -> str:
    info = sweep.info
    name = text(info.get("name", sweep.folder.path.name))
    known = (info.get(key) for key in ("created", "source", "model_folder"))
    about = " · ".join(text(one) for one in known if one)
    status = text(sweep.status)
    return (
        f"<h1>{name} <span class='tag {status}'>{status}</span></h1>"
        f"<p class=sub>a sweep · {about} · raytune_ft {text(info.get('version', ''))}</p>"
    )


def _cards(sweep: _Sweep) -> dict[str, str]:
    counts = Counter("failed" if _is_lost(one) else one.state for one in sweep.trials)
    seconds = sum(one.seconds for one in sweep.trials)
    steps = sum(int(max((p[-1][0] for p in columns.points.values()), default=0))
                for columns in sweep.columns.values())  # fmt: skip
    metric = text(sweep.section.metric)
    found = {
        "trials done": f"{counts[DONE]} of {len(sweep.trials)}",
        "running": str(counts[RUNNING] or ""),
        "stopped early": str(counts[STOPPED] or ""),
        "failed": str(counts["failed"] or ""),
        "optimizer steps of all": f"{steps:,}" if steps else "",
        "time of all trials": clock(seconds) if seconds else "",
        "since it began": _since(sweep),
    }
    if sweep.best is not None:
        found[f"best {metric}, trial {sweep.best.number}"] = text(figure(sweep.best.metric))
    return {name: words for name, words in found.items() if words}


def _since(sweep: _Sweep) -> str:
    """Return how long a running sweep has gone on; nothing of one that is over."""
    if sweep.status != "running":
        return ""
    try:
        began = datetime.fromisoformat(str(sweep.info.get("created")))
        return clock(max(0.0, (datetime.now(timezone.utc) - began).total_seconds()))
    except (TypeError, ValueError):
        return ""


_KEPT = (("recipe", "best.yaml"), ("weights", "best"), ("values by steps", lineage.FILE))


def _best(sweep: _Sweep) -> str:
    best, place = sweep.best, sweep.folder.path
    if best is None:
        return "<h2>Best trial</h2><p class=sub>No trial is done yet.</p>"
    found = {f"trial {best.number}": assignments(best.values)}
    found[sweep.section.metric] = f"{figure(best.metric)} at step {best.step}"
    found |= {what: str(place / name) for what, name in _KEPT if (place / name).exists()}
    said = f"<h2>Best trial</h2>{tables.pairs(found)}"
    if not (place / "best.yaml").is_file():
        return said
    name = shlex.quote(f"{sweep.info.get('name', place.name)}_best")
    commands = [
        f"raytune-ft chat {shlex.quote(str(best.folder))}",
        f"raytune-ft train --config {shlex.quote(str(place / 'best.yaml'))} run.name={name}",
    ]
    return f"{said}<p class=go>Go on:</p><pre>{text(chr(10).join(commands))}</pre>"


def _coordinates(sweep: _Sweep, looks: Mapping[int, str]) -> str:
    if not any(number(one.metric) is not None for one in sweep.trials):
        return ""
    hint = "A line is a trial: point at it. Drag along an axis to choose; click it to let go."
    picture = figure_of(axes_of(sweep.section, sweep.trials), sweep.trials, looks)
    return (
        f"<h2>Values and {text(sweep.section.metric)}</h2>{picture}<p class=sub id=said>{hint}</p>"
    )


def _curves(sweep: _Sweep, looks: Mapping[int, str], name: str) -> Chart:
    """Return a field of all trials over their steps, the best one on top."""
    shown = [one for one in reversed(sweep.trials) if sweep.columns[one.number][name]]
    room = max(20, POINTS // (4 * max(1, len(shown))))
    lines, groups = [], {}
    for one in shown:
        points = sweep.columns[one.number][name]
        if len(points) >= SMOOTHED:
            points = smooth(points, max(5, len(points) // 40))
        groups[one.name] = f'class="curve {looks[one.number]}" data-n={one.number}'
        lines.append(Line(one.name, thin(points, room)))
    title = {"loss": "loss", "val_loss": "held-out loss"}.get(name, name)
    unit = "per trained token" if name.endswith("loss") else ""
    return Chart(title, lines, unit, may_be_log=True, keys=False, groups=groups)


def _measured(sweep: _Sweep, looks: Mapping[int, str]) -> list[Chart]:
    metric = sweep.section.metric
    names = ["val_loss", *([metric] if metric not in ("loss", "val_loss") else []), "lr"]
    return [_curves(sweep, looks, name) for name in names]


def _table(sweep: _Sweep, looks: Mapping[int, str]) -> str:
    fields, metric = sweep.fields, sweep.section.metric
    titles = ["trial", *(short_field(name, fields) for name in fields), metric, "steps", "time"]
    head = "".join(f"<th>{text(title)}</th>" for title in [*titles, "state"])
    best = sweep.best
    rows = []
    for one in sweep.trials:
        values = [short_value(one.values.get(name, "")) for name in fields]
        seconds = clock(one.seconds) if one.seconds else ""
        cells = [*values, figure(one.metric), f"{one.step:,}", seconds, one.state]
        said = f"trial {one.number} · {assignments(one.values)} · {metric} {figure(one.metric)} · "
        bold = " class=best" if one is best else ""
        rows.append(
            f'<tr{bold} data-n={one.number} data-said="{text(said + one.state)}">'
            f"<td><i class='swatch {looks[one.number]}'></i>{_link(sweep, one)}</td>"
            + "".join(f"<td>{text(cell)}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        f"<h2>Trials, best first</h2><div class=scroll><table class='num trials'><tr>{head}</tr>"
        f"{''.join(rows)}</table></div>"
    )


def _link(sweep: _Sweep, trial: Trial) -> str:
    """Link to a trial's report, or to its folder; nothing to link where neither is."""
    place = f"trials/{trial.name}/"
    if not (sweep.folder.path / place).is_dir():
        return str(trial.number)
    report = (sweep.folder.path / place / "report.html").is_file()
    return f'<a href="{place}{"report.html" if report else ""}">{trial.number}</a>'


def _recipe(folder: RunFolder) -> str:
    if not folder.recipe.is_file():
        return ""
    try:
        content = yaml.safe_load(folder.recipe.read_text(encoding="utf-8", errors="replace"))
        shown = yaml.safe_dump(
            {"tune": content["tune"]}, sort_keys=False, allow_unicode=True, default_flow_style=None
        )
    except (ValueError, TypeError, KeyError, yaml.YAMLError):
        return ""
    note = "<p class=sub>recipe.yaml in the sweep's folder has every field.</p>"
    return f"<h2>Recipe</h2>{note}<pre>{text(shown)}</pre>"
