"""Map functions: XTuner v0.1.9's, by its names and with its conversations, a row in, messages out.

One differs: `oasst1_map_fn` keeps a Markdown heading of three hashes in its answer. `REFERENCE`
has the function that loses it, for `data.compat`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from raytune_ft.data.rows.columns import Row, optional_text, text_of
from raytune_ft.data.rows.msagent import msagent_react_map_fn
from raytune_ft.data.rows.multi_turn import (
    oasst1_cut_map_fn,
    oasst1_map_fn,
    openai_map_fn,
    wizardlm_map_fn,
)
from raytune_ft.data.segments import Message
from raytune_ft.data.templating.prompts import SYSTEMS

MapFunction = Callable[[Row, str], list[Message]]
"""(row, its place for error messages) -> conversation; an empty one drops the row."""


@dataclass(frozen=True)
class Format:
    """How rows with certain columns are read."""

    read: MapFunction
    columns: tuple[str, ...]
    """Columns that a row must have."""
    optional: tuple[str, ...] = ()
    """Columns that are read where a row has them."""
    prompt: str = ""
    """Column of what an answer answers; answers in it were given before and are not learned."""


def turn(user: str, assistant: str, system: str = "") -> list[Message]:
    """Build a conversation of one turn."""
    first = [{"role": "system", "content": system}] if system else []
    return [
        *first,
        {"role": "user", "content": user},
        {"role": "assistant", "content": assistant},
    ]


def _pair(question: str, answer: str, system: str | None = None) -> Format:
    """Make the format of two columns, with a system text of SYSTEMS."""

    def read(row: Row, where: str) -> list[Message]:
        text = SYSTEMS[system] if system else ""
        return turn(text_of(row, question, where), text_of(row, answer, where), text)

    return Format(read, (question, answer))


def _joined(first: str, second: str, answer: str, system: str) -> Format:
    """Make the format whose question is two columns joined by a line break."""

    def read(row: Row, where: str) -> list[Message]:
        question = text_of(row, first, where) + "\n" + optional_text(row, second, where)
        return turn(question, text_of(row, answer, where), SYSTEMS[system])

    return Format(read, (first, second, answer))


_ALPACA = _joined("instruction", "input", "output", "alpaca")


def alpaca_map_fn(row: Row, where: str) -> list[Message]:
    """Read instruction, input, output; `<nooutput>` drops the row."""
    conversation = _ALPACA.read(row, where)
    return [] if row["output"] == "<nooutput>" else conversation


def colors_map_fn(row: Row, where: str) -> list[Message]:
    """Read color and what follows the first colon of description."""
    _, _, description = text_of(row, "description", where).partition(":")
    return turn(description.strip(), text_of(row, "color", where), SYSTEMS["colorist"])


def openorca_map_fn(row: Row, where: str) -> list[Message]:
    """Read system_prompt, question, response."""
    system = optional_text(row, "system_prompt", where)
    return turn(text_of(row, "question", where), text_of(row, "response", where), system)


def pretrain_map_fn(row: Row, where: str) -> list[Message]:
    """Read text, stripped, to be learned as it is."""
    return [{"role": "assistant", "content": text_of(row, "text", where).strip()}]


MAP_FUNCTIONS: Mapping[str, Format] = {
    "alpaca_map_fn": Format(alpaca_map_fn, _ALPACA.columns),
    "alpaca_zh_map_fn": _joined("instruction_zh", "input_zh", "output_zh", "alpaca"),
    "arxiv_map_fn": _pair("abstract", "title", "arxiv_gentile"),
    "code_alpaca_map_fn": _pair("prompt", "completion", "coder"),
    "colors_map_fn": Format(colors_map_fn, ("description", "color")),
    "crime_kg_assitant_map_fn": _pair("input", "output", "lawyer"),
    "default_map_fn": _pair("input", "output"),
    "law_reference_map_fn": _pair("question", "answer", "lawyer"),
    "medical_map_fn": _joined("instruction", "input", "output", "medical"),
    "msagent_react_map_fn": Format(msagent_react_map_fn, ("conversations",)),
    "oasst1_map_fn": Format(oasst1_map_fn, ("text",)),
    "openai_map_fn": Format(openai_map_fn, ("messages",)),
    "openorca_map_fn": Format(openorca_map_fn, ("system_prompt", "question", "response")),
    "pretrain_map_fn": Format(pretrain_map_fn, ("text",)),
    "sql_map_fn": _joined("context", "question", "answer", "sql"),
    "stack_exchange_map_fn": _pair("question", "response"),
    "tiny_codes_map_fn": _pair("prompt", "response", "coder"),
    "wizardlm_map_fn": Format(wizardlm_map_fn, ("conversations",)),
}

REFERENCE: Mapping[str, MapFunction] = {"oasst1_map_fn": oasst1_cut_map_fn}
"""Functions that read otherwise under `data.compat`."""
