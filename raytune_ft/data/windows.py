"""Windows: rows counted and windows of packs made, by number and without Ray.

What a data task does (`data.stream` runs many of them), what `inspect` shows and what tests call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypedDict

import numpy as np
import numpy.typing as npt

from raytune_ft.config.schema import DataSection, Recipe, Source
from raytune_ft.data.concat_packing import ConcatPlan
from raytune_ft.data.encode import Example, encode_conversation
from raytune_ft.data.files.readers import DataRow
from raytune_ft.data.packing import Pack, Plan, Position, cut_example, join_examples
from raytune_ft.data.rows.formats import to_conversation
from raytune_ft.data.rows.moss import are_fields, encode_fields
from raytune_ft.data.segments import Conversation
from raytune_ft.data.sources import Numbers, RowSource
from raytune_ft.data.templating.templates import Template, get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError

PLACES_KEPT = 5
"""Rows named per reason; the rest is only counted."""


@dataclass(frozen=True)
class Encoder:
    """Everything between a row and its example; picklable."""

    tokenizer: TextTokenizer
    template: str
    data: DataSection

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: TextTokenizer) -> Encoder:
        """Take what is needed from a recipe."""
        return cls(tokenizer, recipe.model.template, recipe.data)

    @cached_property
    def bound_template(self) -> Template:
        """The template, bound to the tokenizer."""
        return get_template(self.template, self.tokenizer)

    def encode(self, row: DataRow, source: Source, where: str) -> Example | None:
        """Encode one row, cut at `max_length`; None if it has no answer to learn from.

        Raises:
            DataError: the row cannot be used; begins with `where`.
        """
        conversation = to_conversation(row, source, self.data, where)
        if conversation is None:
            return None
        try:
            return self._encoded(conversation)
        except DataError as error:
            raise DataError(
                f"{where}: {error}; correct the row, or leave it out with data.on_bad_row: skip"
            ) from None

    def _encoded(self, conversation: Conversation) -> Example:
        data, written = self.data, conversation.written
        compat = data.compat is not None
        if written is not None and are_fields(written):
            return encode_fields(
                written, self.tokenizer, data.max_length, conversation.loss, compat=compat
            )
        return encode_conversation(
            conversation, self.bound_template, self.tokenizer, data.max_length, compat=compat
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave out the template, which is quickly bound again."""
        return {key: self.__dict__[key] for key in ("tokenizer", "template", "data")}


class Report(TypedDict):
    """What became of the rows; plain values, as in a run folder's data.json."""

    rows: int
    used: int
    tokens: int
    targets: int
    cut: int
    """Rows that are used up to `max_length`."""
    dropped: dict[str, int]
    """Reason -> rows."""
    places: dict[str, list[str]]
    """Reason (or `cut`) -> the first few rows, with what is wrong with them."""


UNUSABLE, EMPTY = "unusable", "empty"
TOO_LONG, UNTRAINED = "over max_length", "without a trained token"


def new_report(rows: int = 0) -> Report:
    """Make a report of `rows` rows of which nothing is known yet."""
    return Report(rows=rows, used=0, tokens=0, targets=0, cut=0, dropped={}, places={})


def nothing_left(report: Report) -> str:
    """Say why there is no row to train on, naming the first of each reason."""
    reasons = (
        f"{count} {reason} ({report['places'].get(reason, ['?'])[0]})"
        for reason, count in report["dropped"].items()
    )
    return f"data.sources: none of {report['rows']} rows can be trained on: {', '.join(reasons)}"


def add_report(report: Report, later: Report) -> None:
    """Add the report of rows that come after these."""
    keys: tuple[Literal["rows", "used", "tokens", "targets", "cut"], ...]
    keys = ("rows", "used", "tokens", "targets", "cut")
    for key in keys:
        report[key] += later[key]
    for reason, count in later["dropped"].items():
        report["dropped"][reason] = report["dropped"].get(reason, 0) + count
    for reason, places in later["places"].items():
        known = report["places"].setdefault(reason, [])
        known.extend(places[: PLACES_KEPT - len(known)])


def _drop(report: Report, reason: str, place: str) -> None:
    report["dropped"][reason] = report["dropped"].get(reason, 0) + 1
    _name(report, reason, place)


def _name(report: Report, reason: str, place: str) -> None:
    if len(report["places"].setdefault(reason, [])) < PLACES_KEPT:
        report["places"][reason].append(place)


@dataclass(frozen=True)
class Measurement:
    """Rows counted, before any training.

    `lengths` int32 (n_rows,): tokens after the cut, 0 for a row that is left out; `targets` int32
    (n_rows,): labelled tokens; `sets` int32 (n_rows,): the number of the row's data set.
    """

    lengths: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    sets: npt.NDArray[np.int32]
    report: Report


def make_plan(measured: Measurement, data: DataSection, seed: int) -> Plan:
    """Decide which rows share a pack: isolated rows, or the packs of `data.compat`."""
    if data.compat is None:
        return Plan(measured.lengths, data, seed)
    return ConcatPlan(measured.lengths, data, seed, measured.sets)


def measure_rows(source: RowSource, encoder: Encoder, rows: Sequence[int] | Numbers) -> Measurement:
    """Encode rows and keep only their sizes.

    Raises:
        DataError: a row is unusable and `on_bad_row` is `error`, or it is over `max_length` and
            `over_length` is `error`.
    """
    lengths = np.zeros(len(rows), dtype=np.int32)
    targets = np.zeros(len(rows), dtype=np.int32)
    report = new_report(len(rows))
    for place, (number, row) in enumerate(zip(rows, source.try_rows(rows), strict=True)):
        where = source.where(int(number))
        example = _measured(row, source.source_of(int(number)), where, encoder, report)
        if example is not None:
            lengths[place] = len(example.input_ids)
            targets[place] = example.n_targets
    report["used"] = int((lengths > 0).sum())
    report["tokens"], report["targets"] = int(lengths.sum()), int(targets.sum())
    return Measurement(lengths, targets, source.sets_of(rows), report)


def _measured(
    row: DataRow | DataError, source: Source, where: str, encoder: Encoder, report: Report
) -> Example | None:
    """Encode one row by the recipe's rules; None if it is left out, with a note in the report."""
    data = encoder.data
    try:
        if isinstance(row, DataError):
            raise row
        example = encoder.encode(row, source, where)
    except DataError as error:
        if data.on_bad_row == "error":
            raise
        _drop(report, UNUSABLE, str(error))
        return None
    if example is None:
        _drop(report, EMPTY, where)
        return None
    if example.uncut_length > data.max_length:
        if data.over_length == "error":
            raise DataError(
                f"{where}: {example.uncut_length} tokens, data.max_length is {data.max_length}; "
                "raise it, or set data.over_length to cut or drop"
            )
        if data.over_length == "drop":
            _drop(report, TOO_LONG, where)
            return None
    # the reference keeps rows of which only the question is left, and learns nothing from them
    if not example.n_targets and (data.compat is None or not len(example.input_ids)):
        _drop(report, UNTRAINED, where)
        return None
    if example.uncut_length > data.max_length:
        report["cut"] += 1
        _name(report, "cut", where)
    return example


def window_packs(
    source: RowSource, encoder: Encoder, plan: Plan, epoch: int, window: int
) -> list[Pack]:
    """Make all packs of one window.

    Raises:
        DataError: a row is not as it was when the plan was made.
    """
    packs = plan.window_pieces(epoch, window)
    rows = np.unique(np.concatenate(packs)[:, 0])
    examples = {
        int(number): _planned(row, int(number), source, encoder, plan)
        for number, row in zip(rows, source.try_rows(rows), strict=True)
    }
    return [
        join_examples(
            [cut_example(examples[row], start, stop) for row, start, stop in pieces.tolist()],
            pieces[:, 0],
            isolated=plan.isolated,
        )
        for pieces in packs
    ]


def _planned(
    row: DataRow | DataError, number: int, source: RowSource, encoder: Encoder, plan: Plan
) -> Example:
    where = source.where(number)
    try:
        if isinstance(row, DataError):
            raise row
        example = encoder.encode(row, source.source_of(number), where)
    except DataError:
        example = None  # it could be used when it was counted
    if example is None or len(example.input_ids) != plan.lengths[number]:
        raise DataError(f"{where}: changed since the rows were counted; start the run again")
    return example


def iter_packs(
    source: RowSource,
    encoder: Encoder,
    plan: Plan,
    start: Position | None = None,
    *,
    epochs: int | None = None,
) -> Iterator[tuple[Position, Pack]]:
    """Yield packs in the canonical order, one window after the other, in this process.

    Args:
        source: the rows that the plan was made for.
        encoder: makes examples of rows.
        plan: decides packs and their order.
        start: the first pack to yield; None is the beginning.
        epochs: stop after this many, counted from epoch 0; None goes on for ever.

    Yields:
        (position behind the pack, pack).
    """
    start = start or Position()
    for epoch, window in window_numbers(plan, start, epochs):
        packs = window_packs(source, encoder, plan, epoch, window)
        yield from placed(plan, packs, epoch, window, start)


def window_numbers(plan: Plan, start: Position, epochs: int | None) -> Iterator[tuple[int, int]]:
    """Yield (epoch, window) from `start` on."""
    epoch, window = start.epoch, start.window
    if not plan.n_windows:
        return
    while epochs is None or epoch < epochs:
        if window < plan.n_windows:
            yield epoch, window
            window += 1
        else:
            epoch, window = epoch + 1, 0


def placed(
    plan: Plan, packs: Sequence[Pack], epoch: int, window: int, start: Position
) -> Iterator[tuple[Position, Pack]]:
    """Pair a window's packs with the positions behind them; skip those before `start`."""
    for number, pack in enumerate(packs):
        if Position(epoch, window, number) >= start:
            yield plan.after(epoch, window, number, len(packs)), pack
