"""Examples: rows in, what is trained of each out, by the recipe's rules.

Rows that are left out, cut or split are counted and named in a report.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from raytune_ft.config.schema import DataSection, Recipe, Source
from raytune_ft.data.encode import (
    Example,
    Remembered,
    encode_pair,
    encode_segments,
    texts_to_encode,
    written_segments,
)
from raytune_ft.data.files.readers import DataRow
from raytune_ft.data.report import (
    CUT,
    EMPTY,
    SPLIT,
    TOO_LONG,
    UNTRAINED,
    UNUSABLE,
    Report,
    drop,
    name_place,
)
from raytune_ft.data.rows.formats import to_conversation, to_pair
from raytune_ft.data.rows.moss import are_fields, encode_fields
from raytune_ft.data.segments import Conversation, Loss, Segment
from raytune_ft.data.sources import Numbers, RowSource
from raytune_ft.data.templating.templates import Template, get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError


@dataclass(frozen=True)
class Encoder:
    """Everything between a row and its example; picklable."""

    tokenizer: TextTokenizer
    template: str
    data: DataSection
    objective: str = "sft"

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: TextTokenizer) -> Encoder:
        """Take what is needed from a recipe."""
        return cls(tokenizer, recipe.model.template, recipe.data, recipe.train.objective)

    @cached_property
    def bound_template(self) -> Template:
        """The template, bound to the tokenizer."""
        return get_template(self.template, self.tokenizer)

    @property
    def cut_at(self) -> int | None:
        """Tokens that are kept of a row; None if packing takes all of them."""
        data = self.data
        whole = data.over_length == "split" or data.packing == "concat"
        return None if whole and data.compat is None else data.max_length

    def encode(self, row: DataRow, source: Source, where: str) -> Example | None:
        """Encode one row, cut at `cut_at`; None if it has no answer to learn from.

        Raises:
            DataError: the row cannot be used; begins with `where`.
        """
        written = self.write(row, source, where)
        return None if written is None else self.encode_written(written, self.tokenizer)

    def write(self, row: DataRow, source: Source, where: str) -> Written | None:
        """Write one row as segments; None if it has no answer to learn from.

        Raises:
            DataError: the row cannot be used; begins with `where`.
        """
        rejected: Conversation | None = None
        if self.objective == "sft":
            conversation = to_conversation(row, source, self.data, where)
        else:
            conversation, rejected = to_pair(row, source, self.data, where) or (None, None)
        if conversation is None:
            return None
        try:
            segments = written_segments(conversation, self.bound_template)
            other = None if rejected is None else written_segments(rejected, self.bound_template)
            return Written(segments, conversation.loss, other)
        except DataError as error:
            raise DataError(
                f"{where}: {error}; correct the row, or leave it out with data.on_error: skip"
            ) from None

    def remember(self, rows: Iterable[Written]) -> Remembered:
        """Encode the texts of many rows at once."""
        compat = self.data.compat is not None
        tokenizer = self.tokenizer
        sides = (side for row in rows for side in (row.segments, row.rejected) if side)
        texts = (texts_to_encode(side, tokenizer, compat) for side in sides)
        return Remembered(tokenizer, chain.from_iterable(texts))

    def encode_written(self, row: Written, tokenizer: TextTokenizer | Remembered) -> Example:
        """Encode the segments of one row, cut at `cut_at`; a pair always at `max_length`."""
        if row.rejected is not None:
            return encode_pair(row.segments, row.rejected, tokenizer, self.data.max_length)
        compat, segments = self.data.compat is not None, row.segments
        if segments and are_fields(segments):
            return encode_fields(segments, tokenizer, self.cut_at, row.loss, compat=compat)
        return encode_segments(segments, tokenizer, self.cut_at, compat)

    def __getstate__(self) -> dict[str, object]:
        """Leave out the template, which is quickly bound again."""
        kept = ("tokenizer", "template", "data", "objective")
        return {key: self.__dict__[key] for key in kept}


@dataclass(frozen=True)
class Written:
    """A row as the template writes it."""

    segments: Sequence[Segment]
    loss: Loss
    rejected: Sequence[Segment] | None = None
    """Of a pair, the other conversation; `segments` are the chosen one's."""


def encode_rows(
    source: RowSource, encoder: Encoder, rows: Sequence[int] | Numbers
) -> list[Example | DataError | None]:
    """Read and encode rows: each as its example, None (no answer), or what is wrong with it.

    All are written first, and then all their texts encoded in one call.

    Raises:
        ModelError: the model's chat template fails, or its tokenizer.
    """
    written: list[Written | DataError | None] = []
    facts = zip(source.try_rows(rows), source.sources_of(rows), source.places(rows), strict=True)
    for row, of, where in facts:
        try:
            if isinstance(row, DataError):
                raise row
            written.append(encoder.write(row, of, where))
        except DataError as error:
            written.append(error)
    tokenizer = encoder.remember(row for row in written if isinstance(row, Written))
    return [
        encoder.encode_written(row, tokenizer) if isinstance(row, Written) else row
        for row in written
    ]


def usable_rows(
    source: RowSource,
    encoder: Encoder,
    rows: Sequence[int] | Numbers,
    encoded: Sequence[Example | DataError | None],
    report: Report,
) -> list[Example | None]:
    """Apply the recipe's rules; None for a row that is left out, with a note in the report.

    Raises:
        DataError: a row is unusable and `on_error` is `stop`, or it is over `max_length` and
            `over_length` is `error`.
    """
    examples = [
        _usable(example, source, int(number), encoder, report)
        for number, example in zip(rows, encoded, strict=True)
    ]
    used = [example for example in examples if example is not None]
    report["used"] += len(used)
    report["tokens"] += sum(len(example.input_ids) for example in used)
    report["targets"] += sum(example.n_targets for example in used)
    return examples


def _usable(
    example: Example | DataError | None,
    source: RowSource,
    number: int,
    encoder: Encoder,
    report: Report,
) -> Example | None:
    data = encoder.data
    if isinstance(example, DataError):
        if data.on_error == "stop":
            raise example
        drop(report, UNUSABLE, str(example))
        return None
    if example is None:
        drop(report, EMPTY, source.where(number))
        return None
    over = example.uncut_length > data.max_length
    if over and data.over_length == "error":
        raise DataError(
            f"{source.where(number)}: {example.uncut_length} tokens, data.max_length is "
            f"{data.max_length}; raise it, or set data.over_length to cut, split or drop"
        )
    if over and data.over_length == "drop":
        drop(report, TOO_LONG, source.where(number))
        return None
    # the reference keeps rows of which only the question is left, and learns nothing from them
    if not example.teaches and (data.compat is None or not len(example.input_ids)):
        drop(report, UNTRAINED, source.where(number))
        return None
    if over:
        kind = SPLIT if encoder.cut_at is None else CUT
        report["split" if kind == SPLIT else "cut"] += 1
        name_place(report, kind, source.where(number))
    return example
