"""Feeds of small files for tests, and packs made comparable."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from raytune_ft.config.schema import DataSection, TrainSection
from raytune_ft.data.encode import IGNORE_INDEX
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Pack
from raytune_ft.data.places import Placed
from raytune_ft.data.report import Report, add_report, new_report
from raytune_ft.data.sources import RowSource, open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, Measurement, make_feed, measure_rows
from raytune_ft.training.batching import StepData, TensorBatch, steps

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
    """The ids of every row, uncut; those of pairs as they are cut."""
    whole = Encoder(
        feed.encoder.tokenizer, "tokenizer",
        feed.encoder.data.model_copy(update={"pack": "concat"}), feed.encoder.objective,
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


def over_ranks(
    placed: Iterable[Placed], micro: int, accumulation: int, workers: int
) -> Iterator[tuple[StepData, ...]]:
    """What every rank is given, step by step."""
    train = TrainSection(micro_batch_size=micro, accumulation=accumulation)
    copies = itertools.tee(placed, workers)
    ranks = (steps(copy, train, rank=rank, workers=workers) for rank, copy in enumerate(copies))
    return zip(*ranks, strict=True)


def packs_of(shares: tuple[StepData, ...]) -> list[tuple[bytes, ...]]:
    """A step's packs in their order, put together from what every rank was given.

    `input_ids`, `labels`, `position_ids`, `segment_ids`, int64, without padding.
    """
    rows = [[row for batch in share.micro_batches for row in _rows(batch)] for share in shares]
    return [row for turn in itertools.zip_longest(*rows) for row in turn if row is not None]


def _rows(batch: TensorBatch) -> Iterator[tuple[bytes, ...]]:
    """The packs of a batch; a rank without one has a row without labels."""
    for row, labels in enumerate(batch["labels"]):
        if bool((labels != IGNORE_INDEX).any()):
            real = batch["segment_ids"][row] >= 0
            keys = ("input_ids", "labels", "position_ids", "segment_ids")
            yield tuple(batch[key][row][real].numpy().tobytes() for key in keys)
