"""Preference rows: a chosen and a rejected answer to the same messages in, two conversations out.

Answers are texts, single messages, or lists of messages that may hold the whole conversation. What
they answer stands in them, or in a column of PROMPTS. Only the last answer may differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raytune_ft.data.rows.chat_rows import ROLES, SENDERS, check_roles, read_messages, read_senders
from raytune_ft.data.rows.columns import (
    OR_SKIP,
    Row,
    column_of,
    from_json,
    names,
    text_if_any,
    text_in,
)
from raytune_ft.data.rows.multi_turn import history_of
from raytune_ft.data.segments import Message
from raytune_ft.errors import DataError

CHOSEN, REJECTED = "chosen", "rejected"
PROMPTS = ("prompt", "messages", "conversations", "instruction", "question", "query", "input")
"""Columns that hold what is answered; the first that a row has is read."""
BESIDE = ("input", "history", "system", "system_prompt")
"""Columns that are read with it; `input` and `history` with `instruction` alone."""
_COLUMNS: tuple[tuple[str, str], ...] = (
    (CHOSEN, REJECTED),
    ("chosen_response", "rejected_response"),
    ("messages", "rejected_response"),
    ("messages", "rejected_messages"),
)
"""Names of the two columns; the last two are ms-swift's, whose chosen answer ends `messages`."""
_DIALOGUE = re.compile(r"\n\n(Human|Assistant):")
_FORMATS = {
    "instruction": "alpaca and columns {output: %s}",
    "question": "question_answer and columns {answer: %s}",
    "query": "query_response and columns {response: %s}",
    "input": "input_output and columns {output: %s}",
    "messages": "prompt_completion and columns {prompt: messages, completion: %s}",
}
"""Column that is answered -> how to learn one of the answers alone."""


def pair_columns(present: set[str]) -> tuple[str, str] | None:
    """Return the row's columns of chosen and rejected answers; None if it has none."""
    return next((pair for pair in _COLUMNS if present.issuperset(pair)), None)


def read_columns(row: Row) -> set[str]:
    """Return the columns that `read_pair` reads of a row."""
    used = {CHOSEN, REJECTED}
    if any(_is_whole(row.get(column)) for column in used):
        return used
    column = next((name for name in PROMPTS if row.get(name) is not None), None)
    beside = BESIDE if column == "instruction" else BESIDE[2:]
    return used | ({column} if column else set()) | (set(beside) & row.keys())


def advice_for_sft(row: Row, chosen: str) -> str:
    """Say how the chosen answers of such rows, whose own column is `chosen`, are learned alone."""
    told = "columns chosen, rejected: preferences are learned with train.objective dpo or orpo"
    column = next((name for name in PROMPTS if row.get(name) is not None), "prompt")
    whole = _is_whole(row.get(CHOSEN))
    if whole and _items(row[CHOSEN]) is not None:
        how = "openai" if chosen == "messages" else f"openai and columns {{messages: {chosen}}}"
    elif whole or column == "conversations" or isinstance(row.get(CHOSEN), Mapping):
        return f"{told}; to learn the chosen ones, write rows as {{'messages': [...]}}"
    else:
        known = _FORMATS.get(column, "prompt_completion and columns {completion: %s}")
        how = known % chosen
    return f"{told}; to learn the chosen ones, set data.sources[].map: {how}"


@dataclass(frozen=True)
class _Side:
    """One of the two answers."""

    messages: list[Message]
    whole: bool
    """Whether the messages begin with what is answered."""


def read_pair(row: Row, where: str) -> tuple[list[Message], list[Message]]:
    """Read both conversations of a row.

    Raises:
        DataError: a part is missing or of the wrong kind, or they differ before the last answer.
    """
    places = [f"{where}: column '{column}'" for column in (CHOSEN, REJECTED)]
    sides = [
        _side(column_of(row, column, where), place)
        for column, place in zip((CHOSEN, REJECTED), places, strict=True)
    ]
    beginning = next((side.messages[:-1] for side in sides if side.whole), None)
    if beginning is None:
        beginning = _beginning(row, where)
    chosen, rejected = (
        check_roles(side.messages if side.whole else [*beginning, *side.messages], place)
        for side, place in zip(sides, places, strict=True)
    )
    _check_same(chosen, rejected, where)
    return chosen, rejected


def _side(value: Any, where: str) -> _Side:
    """Read an answer, or a conversation that ends with it."""
    items = _items(value)
    if items is None:
        text = text_in(value, where)
        turns = _dialogue(text)
        return _Side(turns or [{"role": "assistant", "content": text}], bool(turns))
    if not items:
        raise DataError(f"{where} is an empty list; correct the row, {OR_SKIP}")
    messages = _read(items, where)
    return _Side(messages, messages[0]["role"] != "assistant")


def _items(value: Any) -> Sequence[Any] | None:
    """Return the messages of a column, also of their JSON text; None for any other text."""
    found = from_json(value)
    items = [found] if isinstance(found, Mapping) else found
    if isinstance(value, str) and not (isinstance(items, list) and _are_messages(items)):
        return None  # an answer may be JSON
    return items if isinstance(items, list) else None


def _are_messages(items: Sequence[Any]) -> bool:
    kinds = (isinstance(item, Mapping) and item.keys() & {"role", "from"} for item in items)
    return bool(items) and all(kinds)


def _read(items: Sequence[Any], where: str) -> list[Message]:
    """Read messages in OpenAI's or ShareGPT's form, in any order of roles."""
    senders = isinstance(items[0], Mapping) and "from" in items[0]
    return read_senders(items, where) if senders else read_messages(items, where)


def _is_whole(value: Any) -> bool:
    """Tell whether a column holds what is answered too."""
    items = _items(value) if isinstance(value, str | list | Mapping) else None
    if not items:
        return isinstance(value, str) and bool(_dialogue(value))
    first = items[0] if isinstance(items[0], Mapping) else {}
    role = ROLES.get(first.get("role", "")) or SENDERS.get(first.get("from", ""))
    return role != "assistant"


def _dialogue(text: str) -> list[Message]:
    """Read a text of turns headed `Human:` and `Assistant:`, as Anthropic's hh-rlhf has them."""
    start, *parts = _DIALOGUE.split(text)
    if start or len(parts) < 4 or parts[0] != "Human":
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[who], "content": said.strip()} for who, said in turns]


def _beginning(row: Row, where: str) -> list[Message]:
    """Read what is answered from the columns beside the answers."""
    column = next((name for name in PROMPTS if row.get(name) is not None), None)
    if column is None:
        raise DataError(
            f"{where}: chosen and rejected answer nothing; columns: {names(row)}; name the column "
            f"of the question in data.sources[].columns as prompt, {OR_SKIP}"
        )
    place = f"{where}: column '{column}'"
    items = _items(row[column])
    if items is not None:
        messages = _read(items, place) if items else []
    else:
        question = text_in(row[column], place)
        extra = text_if_any(row, "input", where) if column == "instruction" else ""
        earlier = history_of(row, where) if column == "instruction" else []
        question = f"{question}\n{extra}" if extra else question
        messages = [*earlier, {"role": "user", "content": question}]
    system = text_if_any(row, "system", where) or text_if_any(row, "system_prompt", where)
    if system and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _check_same(chosen: list[Message], rejected: list[Message], where: str) -> None:
    """Refuse a pair whose answers do not answer the same messages."""
    if len(chosen) < 2:
        raise DataError(f"{where}: chosen and rejected answer nothing; correct the row, {OR_SKIP}")
    if chosen[:-1] == rejected[:-1]:
        return
    both = zip(chosen[:-1], rejected[:-1], strict=False)
    same = next((n for n, (one, other) in enumerate(both) if one != other), None)
    place = min(len(chosen), len(rejected)) if same is None else same + 1
    raise DataError(
        f"{where}: chosen and rejected differ before their last answer, at message {place}, and "
        f"only answers to the same messages are compared; correct the row, {OR_SKIP}"
    )
