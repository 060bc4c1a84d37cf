"""MOSS: a row of fields that carry their own markers in, segments by turn and their ids out.

Rows are {meta_instruction, num_turns, chat: {turn_1: {Human, Inner Thoughts, Commands, Tool
Responses, MOSS}}}, each field with its markers, `<|MOSS|>: ...<eom>` and a line break. No template
is applied and no end is added: the markers are the end, and the assistant's are learned.

Ours learns what the assistant writes: Inner Thoughts, Commands, MOSS. XTuner v0.1.9, and so
`data.compat`, learns all but the meta instruction and the inside of tool responses.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeGuard

import numpy as np

from raytune_ft.data.encode import IGNORE_INDEX, Example, Remembered
from raytune_ft.data.rows.columns import (
    OR_SKIP,
    Row,
    check_text,
    column_of,
    describe,
    shown,
    text_in,
    text_of,
)
from raytune_ft.data.segments import Loss, Segment
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError

FIELDS: Mapping[str, bool] = {
    "Human": False,
    "Inner Thoughts": True,
    "Commands": True,
    "Tool Responses": False,
    "MOSS": True,
}
"""Field of a turn -> whether the assistant writes it."""
NAME = "MOSS"
"""What the rows call the assistant; replaced everywhere where `data.fill` has a `bot_name`."""
RESULT_EDGES = ("<|Results|>:", "<eor>\n")
"""What the reference learns of tool responses: as many tokens at both ends as these have."""
_HEAD, _END = re.compile(r"<\|[^|<>\n]{1,60}\|>:"), re.compile(r"<eo[a-z]>")
_END_LENGTH = len("<eom>")


@dataclass(frozen=True)
class Field(Segment):
    """One field; a turn's fields are kept or left out together."""

    turn: int = 0
    """1 for the first turn; 0 is the meta instruction."""
    edges: tuple[str, str] | None = None
    """Learn only as many tokens at both ends as these texts have."""


def moss_map(
    row: Row, where: str, fill: Mapping[str, str], compat: str | None = None
) -> tuple[Field, ...] | None:
    """Turn a MOSS row into its fields, in the file's order; None if it has no turn.

    Args:
        row: columns `meta_instruction`, `chat` and, if present, `num_turns`.
        where: the row's place, for error messages.
        fill: `bot_name` is read.
        compat: a reference release whose labels are wanted; special tokens are then made out of
            any text, as it does.

    Raises:
        DataError: a column is missing or has another shape.
    """
    fields = [Field(text_of(row, "meta_instruction", where), None, trained=False)]
    for number, (name, text) in _turn_fields(row, where):
        edges = RESULT_EDGES if compat and name == "Tool Responses" else None
        trained = True if compat else FIELDS[name]
        fields.append(Field(text, None, trained, turn=number, edges=edges))
    if len(fields) == 1:
        return None
    return tuple(_finished(field, where, fill.get("bot_name"), compat) for field in fields)


def are_fields(written: Sequence[Segment]) -> TypeGuard[Sequence[Field]]:
    """Tell whether a conversation's segments are MOSS fields."""
    return all(isinstance(segment, Field) for segment in written)


def encode_fields(
    fields: Sequence[Field],
    tokenizer: TextTokenizer | Remembered,
    max_length: int | None,
    loss: Loss = "assistant",
    *,
    compat: bool = False,
) -> Example:
    """Encode the turns that fit whole, each field on its own, behind the start ids.

    The reference leaves the start to the model's tokenizer, and Baichuan's puts none (`compat`).

    The turn that would pass `max_length` and all after it are left out. Without any turn the
    example is empty; `uncut_length` counts all turns.
    """
    room = sys.maxsize if max_length is None else max_length
    ids = list(tokenizer.text_start_ids if compat else tokenizer.bos_ids)
    trained = [False] * len(ids)
    uncut, n_turns, last_turn = len(ids), 0, 0
    for number, group in groupby(fields, key=lambda field: field.turn):
        turn_ids, turn_trained = _encode_turn(list(group), tokenizer)
        fits = uncut == len(ids) and (number == 0 or uncut + len(turn_ids) <= room)
        uncut += len(turn_ids)
        if fits:
            last_turn = len(ids)  # where the last turn that fits begins
            ids += turn_ids
            trained += turn_trained
            n_turns += number > 0
    if not n_turns:
        return Example(np.zeros(0, np.int32), np.zeros(0, np.int32), uncut)
    learned = np.asarray(trained, dtype=bool) | (loss == "all")
    learned[: last_turn if loss == "last" else 1] = False
    input_ids = np.asarray(ids, dtype=np.int32)
    labels = np.where(learned, input_ids, IGNORE_INDEX).astype(np.int32)
    return Example(input_ids, labels, uncut)


def _turn_fields(row: Row, where: str) -> Iterator[tuple[int, tuple[str, str]]]:
    """Yield (turn, (field's name, text)) in the row's order; fields without a value are none."""
    chat = column_of(row, "chat", where)
    if not isinstance(chat, Mapping):
        raise DataError(
            f"{where}: column 'chat' is {describe(chat)}, not an object of turns; "
            f"correct the row, {OR_SKIP}"
        )
    for number in range(1, _count_turns(row, chat, where) + 1):
        turn = chat.get(f"turn_{number}")
        if not isinstance(turn, Mapping):
            raise DataError(
                f"{where}: column 'chat' has no turn_{number}; correct the row, {OR_SKIP}"
            )
        for name, value in turn.items():
            if name not in FIELDS:
                known = ", ".join(FIELDS)
                raise DataError(
                    f"{where}: turn_{number} has a field '{shown(name)}'; known: {known}; "
                    f"correct the row, {OR_SKIP}"
                )
            if value is not None:
                yield number, (name, text_in(value, f"{where}: turn_{number}, '{name}'"))


def _count_turns(row: Row, chat: Mapping[str, Any], where: str) -> int:
    given = row.get("num_turns")
    if given is None:
        return sum(key.startswith("turn_") and value is not None for key, value in chat.items())
    try:
        return int(given)
    except (TypeError, ValueError, OverflowError):
        raise DataError(
            f"{where}: column 'num_turns' is {describe(given)}, not a count; "
            f"correct the row, {OR_SKIP}"
        ) from None


def _finished(field: Field, where: str, bot_name: str | None, compat: str | None) -> Field:
    """Name the assistant, and mark what lies between a field's own markers as foreign."""
    text = field.text if bot_name is None else field.text.replace(NAME, bot_name)
    check_text(text, f"{where}: turn {field.turn}")
    foreign: tuple[tuple[int, int], ...] = ()
    if not compat:
        inside = (0, len(text)) if field.turn == 0 else _inside(text)
        foreign = (inside,) if inside[0] < inside[1] else ()
    return replace(field, text=text, foreign=foreign)


def _inside(text: str) -> tuple[int, int]:
    """Return the span of a field's text between its own markers."""
    head = _HEAD.match(text)
    stop = len(text.rstrip())
    has_end = _END.fullmatch(text, stop - _END_LENGTH, stop) if stop >= _END_LENGTH else None
    return head.end() if head else 0, stop - _END_LENGTH if has_end else len(text)


def _encode_turn(
    fields: Sequence[Field], tokenizer: TextTokenizer | Remembered
) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    trained: list[bool] = []
    for field in fields:
        piece = np.asarray(tokenizer.encode(field.text, field.foreign), np.int32).tolist()
        learned = [field.trained] * len(piece)
        if field.edges is not None:
            first, last = (len(tokenizer.encode(edge)) for edge in field.edges)
            for place in range(first, len(piece) - last):
                learned[place] = False
        ids += piece
        trained += learned
    return ids, trained
