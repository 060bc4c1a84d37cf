"""`loss.png`: loss, held-out loss and learning rate over optimizer steps, for slides and notes."""

from __future__ import annotations

import os
from pathlib import Path

from raytune_ft.config.cache import cache_dir
from raytune_ft.training.watching.reporting.series import Columns, thin

PIXELS = 800


def draw_loss(columns: Columns, path: Path) -> None:
    """Draw with matplotlib, without a display; nothing where no step was taken."""
    if not columns["loss"]:
        return
    os.environ.setdefault("MPLCONFIGDIR", str(cache_dir() / "matplotlib"))
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    losses = thin(columns["loss"], PIXELS)
    axes.plot(*zip(*losses, strict=True), color="#2f6fed", linewidth=2, label="loss")
    if columns["val_loss"]:
        held_out = zip(*columns["val_loss"], strict=True)
        axes.plot(*held_out, "o--", color="#e4572e", label="held-out loss")
    axes.set(xlabel="optimizer step", ylabel="loss per trained token", ylim=(0, None))
    axes.grid(alpha=0.25)
    rates = axes.twinx()
    if columns["lr"]:
        lr = zip(*thin(columns["lr"], PIXELS), strict=True)
        rates.plot(*lr, color="#999999", linewidth=1, label="lr")
    rates.set(ylabel="learning rate", ylim=(0, None))
    handles = [*axes.get_legend_handles_labels()[0], *rates.get_legend_handles_labels()[0]]
    axes.legend(handles, [str(h.get_label()) for h in handles], loc="upper right")
    figure.savefig(path)
