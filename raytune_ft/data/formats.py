"""Formats: one row of a data set in, one conversation out.

The map functions carry XTuner v0.1.9's names and give its conversations, but for `oasst1_map_fn`:
a Markdown heading of three hashes inside an answer stays in the answer. Without a map function a
row holds `messages`, `conversation` or `conversations` already.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from raytune_ft.data.chat_rows import from_conversation, from_messages, from_senders
from raytune_ft.data.columns import Row, check_text, optional_text, text_of
from raytune_ft.data.msagent import msagent_react_map_fn
from raytune_ft.data.multi_turn import oasst1_map_fn, openai_map_fn, wizardlm_map_fn
from raytune_ft.data.segments import Message
from raytune_ft.errors import DataError, RecipeError

MapFunction = Callable[[Row, str], list[Message]]
"""(row, its place for error messages) -> conversation; an empty one drops the row."""

# Texts: XTuner v0.1.9, xtuner/utils/templates.py (Apache-2.0), spelling as there.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n"
)
ARXIV = (
    "If you are an expert in writing papers, please generate a good paper title for this paper "
    "based on other authors' descriptions of their abstracts.\n"
)
COLORIST = (
    "You are a professional color designer. "
    "Please provide the corresponding colors based on the description of Human.\n"
)
CODER = (
    "You are a professional programer. "
    "Please provide the corresponding code based on the description of Human.\n"
)
LAWYER = "你现在是一名专业的中国律师，请根据用户的问题给出准确、有理有据的回复。\n"
MEDICAL = "如果你是一名医生，请根据患者的描述回答医学问题。\n"
SQL = (
    "If you are an expert in SQL, please generate a good SQL Query for Question "
    "based on the CREATE TABLE statement.\n"
)


def turn(user: str, assistant: str, system: str = "") -> list[Message]:
    """Build a conversation of one turn."""
    first = [{"role": "system", "content": system}] if system else []
    return [
        *first,
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]


def _pair(question: str, answer: str, system: str = "") -> MapFunction:
    """Make a map function for two columns."""

    def map_fn(row: Row, where: str) -> list[Message]:
        return turn(text_of(row, question, where), text_of(row, answer, where), system)

    return map_fn


def _joined(first: str, second: str, answer: str, system: str) -> MapFunction:
    """Make a map function whose question is two columns joined by a line break."""

    def map_fn(row: Row, where: str) -> list[Message]:
        question = text_of(row, first, where) + "\n" + optional_text(row, second, where)
        return turn(question, text_of(row, answer, where), system)

    return map_fn


def alpaca_map_fn(row: Row, where: str) -> list[Message]:
    """Read instruction, input, output; `<nooutput>` drops the row."""
    conversation = _joined("instruction", "input", "output", ALPACA)(row, where)
    return [] if row["output"] == "<nooutput>" else conversation


def colors_map_fn(row: Row, where: str) -> list[Message]:
    """Read color and what follows the first colon of description."""
    _, _, description = text_of(row, "description", where).partition(":")
    return turn(description.strip(), text_of(row, "color", where), COLORIST)


def openorca_map_fn(row: Row, where: str) -> list[Message]:
    """Read system_prompt, question, response."""
    system = optional_text(row, "system_prompt", where)
    return turn(text_of(row, "question", where), text_of(row, "response", where), system)


def pretrain_map_fn(row: Row, where: str) -> list[Message]:
    """Read text, stripped, to be learned as it is."""
    return [{"role": "assistant", "content": text_of(row, "text", where).strip()}]


MAP_FUNCTIONS: Mapping[str, MapFunction] = {
    "alpaca_map_fn": alpaca_map_fn,
    "alpaca_zh_map_fn": _joined("instruction_zh", "input_zh", "output_zh", ALPACA),
    "arxiv_map_fn": _pair("abstract", "title", ARXIV),
    "code_alpaca_map_fn": _pair("prompt", "completion", CODER),
    "colors_map_fn": colors_map_fn,
    "crime_kg_assitant_map_fn": _pair("input", "output", LAWYER),
    "default_map_fn": _pair("input", "output"),
    "law_reference_map_fn": _pair("question", "answer", LAWYER),
    "medical_map_fn": _joined("instruction", "input", "output", MEDICAL),
    "msagent_react_map_fn": msagent_react_map_fn,
    "oasst1_map_fn": oasst1_map_fn,
    "openai_map_fn": openai_map_fn,
    "openorca_map_fn": openorca_map_fn,
    "pretrain_map_fn": pretrain_map_fn,
    "sql_map_fn": _joined("context", "question", "answer", SQL),
    "stack_exchange_map_fn": _pair("question", "response"),
    "tiny_codes_map_fn": _pair("prompt", "response", CODER),
    "wizardlm_map_fn": wizardlm_map_fn,
}

# For the hint about a row without a map function: columns that give a format away.
_TELLING_COLUMNS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"instruction", "input", "output"}), "alpaca_map_fn"),
    (frozenset({"instruction_zh", "output_zh"}), "alpaca_zh_map_fn"),
    (frozenset({"system_prompt", "question", "response"}), "openorca_map_fn"),
    (frozenset({"context", "question", "answer"}), "sql_map_fn"),
    (frozenset({"question", "answer"}), "law_reference_map_fn"),
    (frozenset({"question", "response"}), "stack_exchange_map_fn"),
    (frozenset({"prompt", "completion"}), "code_alpaca_map_fn"),
    (frozenset({"prompt", "response"}), "tiny_codes_map_fn"),
    (frozenset({"abstract", "title"}), "arxiv_map_fn"),
    (frozenset({"description", "color"}), "colors_map_fn"),
    (frozenset({"input", "output"}), "default_map_fn"),
    (frozenset({"text"}), "oasst1_map_fn (dialogues) or pretrain_map_fn (plain text)"),
)


def to_messages(
    row: Row,
    map_name: str | None = None,
    fill: Mapping[str, str] | None = None,
    system: str = "",
    where: str = "row",
) -> list[Message] | None:
    """Turn a row into a conversation.

    Args:
        row: columns by name.
        map_name: a key of MAP_FUNCTIONS, or None for rows that are conversations already.
        fill: words put into `{key}` placeholders; other braces stay as they are.
        system: system text for rows that bring none; text to pre-train on gets none.
        where: the row's place, `file.jsonl:12`, for error messages.

    Returns:
        Messages, or None when there is no answer to learn from.

    Raises:
        DataError: the row has not the shape that the map function needs.
        RecipeError: no map function has this name.
    """
    conversation = map_function(map_name)(row, where)
    messages = [
        {"role": message["role"], "content": fill_text(message["content"], fill or {})}
        for message in conversation
    ]
    for message in messages:
        check_text(message["content"], f"{where}: {message['role']} text")
    if not any(m["role"] == "assistant" and m["content"].strip() for m in messages):
        return None
    has_system = any(message["role"] == "system" for message in messages)
    if system and not has_system and len(messages) > 1:
        return [{"role": "system", "content": fill_text(system, fill or {})}, *messages]
    return messages


def map_function(name: str | None) -> MapFunction:
    """Look up a map function; RecipeError names the nearest one."""
    if name is None:
        return standard_map_fn
    if name not in MAP_FUNCTIONS:
        near = difflib.get_close_matches(name, MAP_FUNCTIONS, n=1, cutoff=0.6)
        hint = f"did you mean '{near[0]}'?" if near else f"choose: {', '.join(MAP_FUNCTIONS)}"
        raise RecipeError(f"data.sources[].map: no map function '{name}'; {hint}")
    return MAP_FUNCTIONS[name]


def fill_text(text: str, fill: Mapping[str, str]) -> str:
    """Put words into the `{key}` placeholders of a text."""
    for key, word in fill.items():
        text = text.replace("{" + key + "}", word)
    return text


def standard_map_fn(row: Row, where: str) -> list[Message]:
    """Read a row that is a conversation already, in one of three shapes."""
    readers: dict[str, Callable[[Any, str], list[Message]]] = {
        "messages": from_messages,
        "conversation": from_conversation,
        "conversations": from_senders,
    }
    for column, reader in readers.items():
        if row.get(column) is not None:
            return reader(row[column], f"{where}: column '{column}'")
    hint = next(
        (f"they fit {name}" for columns, name in _TELLING_COLUMNS if columns <= row.keys()),
        "choose a map function, or write rows as {'messages': [{'role': ..., 'content': ...}]}",
    )
    raise DataError(
        f"{where}: no column 'messages', 'conversation' or 'conversations', and "
        f"data.sources[].map is not set; columns: {', '.join(row) or 'none'}; {hint}"
    )
