"""Feeds of small files for tests, and packs made comparable."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from raytune_ft.config.schema import DataSection
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Pack
from raytune_ft.data.places import Placed
from raytune_ft.data.report import Report, add_report, new_report
from raytune_ft.data.sources import RowSource, open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, Measurement, make_feed, measure_rows

COMPAT = "xtuner-0.1.9"
PACKINGS = ("best_fit", "concat", "none")
LONG_ROWS = ("cut", "split", "drop")


def open_rows(
    path: Path, tokenizer: TextTokenizer, **data: Any
) -> tuple[RowSource, Encoder, DataSection]:
    source = {"path": str(path), **data.pop("source", {})}
    section = DataSection.model_validate({"sources": [source], "max_length": 128, **data})
    return open_sources(section, 1), Encoder(tokenizer, "tokenizer", section), section


def feed_of(path: Path, tokenizer: TextTokenizer, *, seed: int = 5, **data: Any) -> Feed:
    source, encoder, section = open_rows(path, tokenizer, **data)
    compat = section.compat is not None
    return make_feed(source, encoder, seed, measured(source, encoder) if compat else None)


def measured(source: RowSource, encoder: Encoder) -> Measurement:
    return measure_rows(source, encoder, np.arange(len(source)))


def content(pack: Pack) -> tuple[bytes, ...]:
    """Compare packs by all their values."""
    arrays = (pack.input_ids, pack.labels, pack.position_ids, pack.cu_seqlens, pack.row_ids)
    return tuple(array.tobytes() for array in arrays)


def fingerprint(placed: Placed) -> tuple[object, ...]:
    """Compare packs by all their values and their places."""
    report = json.dumps(placed.report, sort_keys=True)
    return (placed.behind, placed.progress, report, *content(placed.pack))


def lone_examples(feed: Feed) -> list[np.ndarray]:
    """The ids of every row, uncut."""
    whole = Encoder(
        feed.encoder.tokenizer, "tokenizer",
        feed.encoder.data.model_copy(update={"pack": "concat"}),
    )  # fmt: skip
    found = [
        whole.encode(row, feed.source.source_of(number), "row")
        for number, row in enumerate(feed.source.rows(range(len(feed.source))))
    ]
    return [example.input_ids for example in found if example is not None]


def total(placed: Iterable[Placed]) -> Report:
    report = new_report()
    for one in placed:
        add_report(report, one.report)
    return report
