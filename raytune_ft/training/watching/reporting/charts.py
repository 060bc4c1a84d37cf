"""Charts: the columns of one or several runs in, the pictures of a page out.

With one run the lines of a chart are its fields; where runs are compared they are the runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from raytune_ft.training.watching.reporting.series import Columns
from raytune_ft.training.watching.reporting.svg import Chart, Line, draw

WIDE = (840, 300)
PERCENT = ("mfu", "data_wait")
"""Fields that are shares and are drawn in percent."""


def run_figures(columns: Columns) -> str:
    """Draw a run: loss over the whole width, the others side by side."""
    charts = [
        Chart(
            "learning rate", [Line("lr", columns["lr"])], from_zero=True,
        ),
        Chart("gradient norm", [Line("norm", columns["grad_norm"], noisy=True)], may_be_log=True),
        Chart("throughput", [
            Line("all", columns["tokens_per_s"], noisy=True),
            Line("trained", columns["targets_per_s"], 2, noisy=True),
        ], "tokens/s", from_zero=True),
        Chart("memory", [
            Line("peak", columns["memory_gib"]),
            Line("reserved", columns["memory_reserved_gib"], 2),
            Line("device", columns["memory_device_gib"], 4),
            Line("resident", columns["rss_gib"], 7),
        ], "GiB", from_zero=True),
        Chart("seconds per step", [
            Line("step", columns["seconds"], noisy=True),
            Line("slowest rank", columns["slowest_rank"], 1, noisy=True, faint=False),
            Line("fastest rank", columns["fastest_rank"], 2, noisy=True, faint=False),
        ], from_zero=True),
        Chart("waiting for data", [Line("wait", percent(columns, "data_wait"), 1, noisy=True)],
              "% of a step", from_zero=True),
        Chart("MFU", [Line("mfu", percent(columns, "mfu"), noisy=True)], "%", from_zero=True),
        *measure_charts(columns),
    ]  # fmt: skip
    return figures(loss_chart(columns), charts)


def loss_chart(columns: Columns) -> Chart:
    """Return loss and held-out loss per trained token."""
    return Chart("loss", [
        Line("trained", columns["loss"], noisy=True),
        Line("held out", columns["val_loss"], 1, dots=True),
    ], "per trained token")  # fmt: skip


def measure_charts(columns: Columns) -> list[Chart]:
    """Return what was measured beside the loss: on held-out rows, and by the objective."""
    names = [name for name in columns.points if name.startswith("val_") and name != "val_loss"]
    found = [
        Chart(f"held out: {name.removeprefix('val_')}", [Line(name, columns[name], 1, dots=True)])
        for name in names
        if name != "val_perplexity"
    ]
    own = [name for name in columns.points if name.startswith(("rewards_", "logps_", "odds_"))]
    lines = (Line(name, columns[name], color, noisy=True) for color, name in enumerate(own))
    return [*found, *(Chart(line.label, [line]) for line in lines)]


def percent(columns: Columns, name: str) -> list[tuple[float, float]]:
    """Return a share's points in percent."""
    return [(step, 100 * value) for step, value in columns[name]]


def figures(first: Chart, others: Sequence[Chart]) -> str:
    """Lay charts out: the first one over the whole width, in two sizes for screen and phone."""
    parts = []
    if not first.is_empty:
        parts.append(
            f"<figure class=wide><div class=broad>{draw(first, *WIDE)}</div>"
            f"<div class=narrow>{draw(first)}</div></figure>"
        )
    parts += [f"<figure>{draw(chart)}</figure>" for chart in others if not chart.is_empty]
    if not parts:
        return "<p class=note>No optimizer step was taken.</p>"
    return f"<div class=charts>{''.join(parts)}</div>"


def overlaid(runs: Mapping[str, Columns]) -> str:
    """Draw several runs over each other, a chart a field."""
    named = runs.items()

    def over(field: str, **options: bool) -> list[Line]:
        shown = {n: percent(one, field) if field in PERCENT else one[field] for n, one in named}
        return [
            Line(name, points, place % 8, dashed=place >= 8, **options)
            for place, (name, points) in enumerate(shown.items())
        ]

    def chart(
        title: str, field: str, unit: str = "", *, zero: bool = True, **options: bool
    ) -> Chart:
        return Chart(title, over(field, **options), unit, from_zero=zero, keys=False)

    norms = Chart("gradient norm", over("grad_norm", noisy=True), may_be_log=True, keys=False)
    charts = [
        chart("held-out loss", "val_loss", zero=False, dots=True),
        chart("learning rate", "lr"),
        norms,
        chart("throughput", "tokens_per_s", "tokens/s", noisy=True),
        chart("memory", "memory_gib", "GiB"),
        chart("waiting for data", "data_wait", "% of a step", noisy=True),
        chart("MFU", "mfu", "%", noisy=True),
    ]
    return figures(chart("loss", "loss", "per trained token", zero=False, noisy=True), charts)
