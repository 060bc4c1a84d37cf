"""Memory that was planned beside what was measured, part by part, for the report."""

from __future__ import annotations

from collections.abc import Mapping

from raytune_ft.training.run_folder import Event
from raytune_ft.training.watching.reporting.series import Columns, number
from raytune_ft.training.watching.reporting.style import text

GIB = 2**30
MEASURED = {
    "allocated by torch, peak": "memory_gib",
    "reserved by torch, peak": "memory_reserved_gib",
    "in use on the device": "memory_device_gib",
    "resident in the process": "rss_gib",
}
"""What the report calls a field of metrics.jsonl."""


def memory_table(info: Event, columns: Columns) -> str:
    """Show the plan that the run began with and the highest of each measurement."""
    measured = {
        words: max(columns.values(name)) for words, name in MEASURED.items() if columns[name]
    }
    if not columns["memory_reserved_gib"] and "allocated by torch, peak" in measured:
        measured = {"resident in the process, peak": measured["allocated by torch, peak"]}
    if not measured:
        return ""
    planned = _planned(info)
    longest = max(1e-9, *planned.values(), *measured.values())
    body = _rows("planned", planned, longest, 7) + _rows("measured", measured, longest, 0)
    return f"<h2>Memory per worker</h2><table class=pairs>{body}</table>"


def _planned(info: Event) -> dict[str, float]:
    """Return the plan's parts in GiB, as run.json has them; empty where there was none."""
    plan = info.get("plan")
    parts = plan.get("parts") if isinstance(plan, dict) else None
    if not isinstance(parts, dict):
        return {}
    sizes = {str(name): number(size) for name, size in parts.items()}
    known = {name: size / GIB for name, size in sizes.items() if size is not None}
    return {**known, "all parts": sum(known.values())} if known else {}


def _rows(kind: str, sizes: Mapping[str, float], longest: float, color: int) -> str:
    return "".join(
        f"<tr><th>{kind}: {text(name)}</th><td class=size>{size:.2f} GiB</td><td class=wide-only>"
        f"<span class='bar b{color}' style='width:{100 * size / longest:.1f}%'></span></td></tr>"
        for name, size in sizes.items()
    )
