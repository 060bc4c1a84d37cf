"""Are the seconds that `plan` predicts those that optimizer steps of our side took on a GPU?

In: lines of `benchmarks.qlora_gpu --out FILE`. Out: for each variant its layout, the median of its
steps, and what `config.estimates.pace` says of that layout on that GPU: of a step as a whole, what
the device needs, what the host needs. No GPU is needed.
Run: python -m benchmarks.step_pace FILE [FILE ...]
"""

from __future__ import annotations

import argparse
import json
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import qlora_ours, qlora_rows
from raytune_ft.config import catalog
from raytune_ft.config.estimates.footprint import count
from raytune_ft.config.estimates.layout import Layout, weigh
from raytune_ft.config.estimates.pace import Device, device_called, sides

SIZES = Namespace(folder=Path("made"), rows="made.jsonl", length=2048, packs=16)
"""Of a benchmark that nothing shrinks."""
NOT_REPLAYED = {"train.neftune_noise_alpha": 5.0}
"""Keeps passes from CUDA graphs, which `nograph` switches off apart from any recipe."""


@dataclass(frozen=True)
class Step:
    """A variant's optimizer step: what it took, and what is predicted."""

    variant: str
    layout: Layout
    layers: int
    took: tuple[float, ...]
    """Seconds of each timed step, of all its runs."""
    predicted: float
    on_device: float
    on_host: float

    @property
    def median(self) -> float:
        """Seconds."""
        return median(self.took)

    @property
    def row(self) -> str:
        """A line of a table in Markdown."""
        spread = f"{min(self.took):.2f} to {max(self.took):.2f}"
        return (
            f"| {self.variant} | {self.layout.said(self.layers)} | {spread} | {self.median:.3f} | "
            f"{self.predicted:.3f} | {self.predicted / self.median:.3f} | {self.on_device:.2f} / "
            f"{self.on_host:.2f} |"
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("files", nargs="+", type=Path)
    lines = [
        json.loads(line)
        for file in parser.parse_args().files
        for line in file.read_text(encoding="utf-8").splitlines()
    ]
    print("| variant | layout | s, measured | median | predicted | ratio | of device / of host |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for step in steps(lines):
        print(step.row)


def steps(lines: Iterable[dict[str, Any]]) -> Iterator[Step]:
    """Yield each of our variants that was timed, runs of one put together."""
    device: Device | None = None
    found: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "machine" in line:
            device = device_called(str(line["machine"]["gpu"]))
        elif line.get("variant") in qlora_ours.CHANGES and "step_s" in line:
            found.setdefault(line["variant"], []).append(line)
    for variant, runs in found.items():
        if device is not None:
            took = tuple(seconds for run in runs for seconds in run["step_s"])
            yield _step(variant, runs[0], took, device)


def _step(variant: str, run: dict[str, Any], took: tuple[float, ...], device: Device) -> Step:
    changes = qlora_ours.CHANGES[variant] | (NOT_REPLAYED if "nograph" in variant else {})
    recipe = qlora_rows.recipe_of(SIZES, changes)
    counts = count(catalog.card(qlora_rows.CARD).config, recipe)
    layout = _layout(run, counts.layers)
    predicted = weigh(recipe, counts, device, layout).seconds
    apart = sides(layout.applied(recipe, counts.layers), counts, device, **layout.way)
    passes = layout.accumulation
    return Step(
        variant, layout, counts.layers, took, predicted,
        passes * apart.device, passes * apart.host,
    )  # fmt: skip


def _layout(run: dict[str, Any], layers: int) -> Layout:
    """Return how a run's steps were laid out, by what it said."""
    if "layout" in run:  # as run.json has it
        return Layout(**run["layout"])
    again = run["recompute"]
    recomputed = layers * again if isinstance(again, bool) else int(again)
    resident = any("weights unpacked once" in line for line in run["said"])
    return Layout(run["micro_batch"], run["passes"], recomputed, resident)


if __name__ == "__main__":
    main()
