"""Examples: rows in, what is trained of each out, by the recipe's rules.

Rows that are left out, cut or split are counted and named in a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from raytune_ft.config.schema import DataSection, Recipe, Source
from raytune_ft.data.encode import Example, encode_conversation
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
from raytune_ft.data.rows.formats import to_conversation
from raytune_ft.data.rows.moss import are_fields, encode_fields
from raytune_ft.data.segments import Conversation
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

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: TextTokenizer) -> Encoder:
        """Take what is needed from a recipe."""
        return cls(tokenizer, recipe.model.template, recipe.data)

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
        conversation = to_conversation(row, source, self.data, where)
        if conversation is None:
            return None
        try:
            return self._encoded(conversation)
        except DataError as error:
            raise DataError(
                f"{where}: {error}; correct the row, or leave it out with data.on_error: skip"
            ) from None

    def _encoded(self, conversation: Conversation) -> Example:
        data, written = self.data, conversation.written
        compat = data.compat is not None
        if written is not None and are_fields(written):
            return encode_fields(
                written, self.tokenizer, self.cut_at, conversation.loss, compat=compat
            )
        return encode_conversation(
            conversation, self.bound_template, self.tokenizer, self.cut_at, compat=compat
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave out the template, which is quickly bound again."""
        return {key: self.__dict__[key] for key in ("tokenizer", "template", "data")}


def encode_rows(
    source: RowSource, encoder: Encoder, rows: Sequence[int] | Numbers
) -> list[Example | DataError | None]:
    """Read and encode rows: each as its example, None (no answer), or what is wrong with it."""
    found: list[Example | DataError | None] = []
    for number, row in zip(rows, source.try_rows(rows), strict=True):
        try:
            if isinstance(row, DataError):
                raise row
            where = source.where(int(number))
            found.append(encoder.encode(row, source.source_of(int(number)), where))
        except DataError as error:
            found.append(error)
    return found


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
    if not example.n_targets and (data.compat is None or not len(example.input_ids)):
        drop(report, UNTRAINED, source.where(number))
        return None
    if over:
        kind = SPLIT if encoder.cut_at is None else CUT
        report["split" if kind == SPLIT else "cut"] += 1
        name_place(report, kind, source.where(number))
    return example
