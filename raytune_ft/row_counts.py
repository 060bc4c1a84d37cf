"""Counting: rows in, what an epoch of them is made of, before a run and in one process.

Up to EXACT_ROWS rows every one is read. Of more, a seeded sample is, and what is concluded from it
is marked as an estimate, so that a plan of a million rows answers in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raytune_ft.config.schema import Recipe
from raytune_ft.data import report as reports
from raytune_ft.data.counting import count_packs
from raytune_ft.data.examples import Encoder
from raytune_ft.data.report import Report
from raytune_ft.data.rows import formats
from raytune_ft.data.sources import RowSource
from raytune_ft.data.windows import Feed, Measurement, make_feed, measure_rows
from raytune_ft.errors import DataError

EXACT_ROWS = 20_000
STRETCHES, STRETCH_ROWS = 32, 128
"""A sample is as many stretches of rows that lie together, spread over all rows."""
_SAMPLE = 15
"""Keeps this choice of rows independent of a recipe's other ones."""


@dataclass(frozen=True)
class Counted:
    """What an epoch of a recipe's rows is made of."""

    report: Report
    """Of all rows; estimated from `read` of them unless `exact`."""
    read: int
    exact: bool
    packs: int | None = None
    """Of the first epoch."""
    steps: int | None = None
    """Of the whole run."""
    density: float | None = None
    """Tokens over the room in the packs, 0 to 1."""


@dataclass(frozen=True)
class Tokenised:
    """What count_tokens found."""

    counted: Counted
    measured: Measurement
    """The sizes of the rows that were read."""
    feed: Feed
    """Windows of these rows."""


def sample(rows: RowSource, seed: int) -> RowSource:
    """Return the rows to be read: all, or stretches of them, one from each part of equal size."""
    if len(rows) <= EXACT_ROWS:
        return rows
    random = np.random.default_rng((seed, _SAMPLE))
    bounds = np.linspace(0, len(rows), STRETCHES + 1).astype(np.int64)
    starts = random.integers(bounds[:-1], bounds[1:] - STRETCH_ROWS, endpoint=True)
    return rows.subset((starts[:, None] + np.arange(STRETCH_ROWS)).ravel())


def count_tokens(rows: RowSource, encoder: Encoder, recipe: Recipe) -> Tokenised:
    """Tokenise the rows, or a sample of them, and compute packs and steps.

    Raises:
        DataError: a row is unusable and `data.on_error` is `stop`, or no row can be trained on.
    """
    chosen = sample(rows, recipe.train.seed)
    measured = measure_rows(chosen, encoder, np.arange(len(chosen)))
    if not measured.report["used"]:
        raise DataError(reports.nothing_left(measured.report))
    feed = make_feed(chosen, encoder, recipe.train.seed, measured)
    read_packs = count_packs(feed, measured, 0)
    packs = max(1, round(read_packs * len(rows) / len(chosen)))
    steps = recipe.train.epochs * -(-packs // recipe.global_batch_size)
    counted = Counted(
        scaled(measured.report, len(rows)),
        len(chosen),
        len(chosen) == len(rows),
        packs,
        min(steps, recipe.train.max_steps or steps),
        density_of(feed, measured, read_packs),
    )
    return Tokenised(counted, measured, feed)


def count_rows(rows: RowSource, recipe: Recipe) -> Counted:
    """Turn rows, or a sample of them, into conversations alone, where there is no tokenizer.

    Raises:
        DataError: a row is unusable and `data.on_error` is `stop`.
    """
    chosen, data = sample(rows, recipe.train.seed), recipe.data
    report = reports.new_report(len(chosen))
    for number, row in enumerate(chosen.try_rows(np.arange(len(chosen)))):
        where = chosen.where(number)
        try:
            if isinstance(row, DataError):
                raise row
            if formats.to_conversation(row, chosen.source_of(number), data, where) is None:
                reports.drop(report, reports.EMPTY, where)
            else:
                report["used"] += 1
        except DataError as error:
            if data.on_error == "stop":
                raise
            reports.drop(report, reports.UNUSABLE, str(error))
    return Counted(scaled(report, len(rows)), len(chosen), len(chosen) == len(rows))


def density_of(feed: Feed, measured: Measurement, packs: int) -> float:
    """Return tokens over the room in the packs of the rows that were read, 0 to 1."""
    tokens = measured.report["tokens"] - (feed.plan.lost_tokens if feed.plan else 0)
    return tokens / (packs * feed.encoder.data.max_length) if packs else 0.0


def scaled(report: Report, rows: int) -> Report:
    """Conclude from a report of some rows to one of `rows` rows; places stay."""
    factor = rows / report["rows"] if report["rows"] else 1.0
    if factor == 1.0:
        return report
    values = {
        key: round(value * factor) if isinstance(value, int) else value
        for key, value in report.items()
    }
    dropped = {reason: round(count * factor) for reason, count in report["dropped"].items()}
    return Report(**{**values, "rows": rows, "dropped": dropped})  # type: ignore[typeddict-item]
