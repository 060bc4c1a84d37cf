"""Earlier turns: dialogues in a text, in lists of messages with loose order, or in pairs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import dropwhile

from raytune_ft.data.rows.chat_rows import field
from raytune_ft.data.rows.columns import (
    OR_SKIP,
    Row,
    column_of,
    describe,
    from_json,
    list_in,
    shown,
    text_in,
    text_of,
)
from raytune_ft.data.segments import Message
from raytune_ft.errors import DataError

_MARKER = re.compile(r"###\s*(Human|Assistant):")


def oasst1_map_fn(row: Row, where: str) -> list[Message]:
    """Read text of the form `### Human: ...### Assistant: ...`, any number of turns.

    Only these two markers divide the text; XTuner v0.1.9 divides at every `###` and so loses what
    follows a heading inside an answer. A question without an answer at the end is left out.
    """
    parts = _MARKER.split(text_of(row, "text", where))
    roles = {"Human": "user", "Assistant": "assistant"}
    return _turns(
        [
            {"role": roles[speaker], "content": content.strip()}
            for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
        ],
        joint="\n",
    )


def oasst1_cut_map_fn(row: Row, where: str) -> list[Message]:
    """Read the same text as XTuner v0.1.9 does: cut at every `###`, paired by position.

    Parts that open with neither marker are lost, headings in answers among them.
    """
    sentences = []
    for part in text_of(row, "text", where).strip().split("###"):
        for marker in ("Human:", "Assistant:"):
            if part.strip().startswith(marker):
                sentences.append(part.strip().removeprefix(marker).strip())
    roles = ("user", "assistant")
    return [
        {"role": roles[place % 2], "content": sentence}
        for place, sentence in enumerate(sentences[: len(sentences) // 2 * 2])
    ]


def wizardlm_map_fn(row: Row, where: str) -> list[Message]:
    """Read conversations[from, value], senders human and gpt."""
    return _read(row, where, "conversations", ("from", "value"), _WIZARD)


def openai_map_fn(row: Row, where: str) -> list[Message]:
    """Read messages[role, content], roles system, user and assistant."""
    return _read(row, where, "messages", ("role", "content"), _OPENAI)


_WIZARD = {"human": "user", "gpt": "assistant"}
_OPENAI = {"system": "system", "user": "user", "assistant": "assistant"}


def _read(
    row: Row, where: str, column: str, keys: tuple[str, str], roles: Mapping[str, str]
) -> list[Message]:
    messages = []
    where = f"{where}: column '{column}'"
    for place, item in enumerate(list_in(column_of(row, column, where), where), start=1):
        at = f"{where}, message {place}"
        sender = field(item, keys[0], at)
        if sender not in roles:
            raise DataError(
                f"{at} is from '{shown(sender)}'; known are {', '.join(roles)}; choose another "
                "data.sources[].map, or leave the row out with data.on_error: skip"
            )
        messages.append({"role": roles[sender], "content": field(item, keys[1], at)})
    return _turns(messages)


def _turns(messages: list[Message], joint: str = "") -> list[Message]:
    """Put loose messages in order, by XTuner's rule.

    Answers before anything else are skipped, questions in a row are joined, a system text opens
    the next turn that is answered, and what is not answered at the end is left out.
    """
    done: list[Message] = []
    system, questions = "", list[str]()
    for message in dropwhile(lambda message: message["role"] == "assistant", messages):
        role, content = message["role"], message["content"]
        if role == "system":
            system = content
        elif role == "user":
            questions.append(content)
        else:
            if system:
                done.append({"role": "system", "content": system})
            done.append({"role": "user", "content": joint.join(questions)})
            done.append({"role": "assistant", "content": content})
            system, questions = "", []
    return done


def history_of(row: Row, where: str) -> list[Message]:
    """Read the turns before a row's own: a list of [question, answer] in column `history`."""
    pairs = from_json(row.get("history"))
    if pairs is None or pairs == "":
        return []
    where = f"{where}: column 'history'"
    if not isinstance(pairs, list):
        raise DataError(
            f"{where} is {describe(pairs)}, not a list of pairs; correct the row, {OR_SKIP}"
        )
    messages: list[Message] = []
    for place, pair in enumerate(pairs, start=1):
        at = f"{where}, turn {place}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise DataError(f"{at} is no pair [question, answer]; correct the row, {OR_SKIP}")
        question, answer = (text_in(text, at) for text in pair)
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": answer})
    return messages
