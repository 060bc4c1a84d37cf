"""Held-out rows as questions: the ids of chat, the text of the row, refusals by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data.encode import encode_prompt
from raytune_ft.data.examples import Encoder
from raytune_ft.data.questions import Question, held_out_questions
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError


def chat(*texts: str, system: str = "") -> dict[str, Any]:
    roles = ["user", "assistant"] * len(texts)
    turns = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    return {"messages": [{"role": "system", "content": system}, *turns] if system else turns}


ROWS = [
    chat("what is red?", "a stone"),
    chat("one", "blue", "and two?", "  green  ", system="Be kind."),
    {"messages": []},
    chat("no answer"),
    chat("long " * 200, "night"),
    chat("seven?", "song " * 200),
    chat("last?", "glass"),
]


def asked(model: Path, folder: Path, rows: list[Any], n: int = 64, **data: Any) -> list[Question]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = Recipe.model_validate({
        "model": {"path": str(model), **data.pop("model", {})},
        "data": {"sources": [{"path": str(path), **data.pop("source", {})}], "max_length": 128,
                 "on_error": "skip", **data},
    })  # fmt: skip
    tokenizer = TextTokenizer.from_folder(model)
    return held_out_questions(
        sources.open_sources(recipe.data, 1), Encoder.of(recipe, tokenizer), n
    )


@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_prompts_are_those_of_chat_and_answers_those_of_the_row(
    tiny_model: Path, tmp_path: Path, packing: str
) -> None:
    found = asked(tiny_model, tmp_path, ROWS, pack=packing)
    assert [question.row for question in found] == [0, 1, 5, 6], "as training leaves rows out"
    answers = ["a stone", "green", ("song " * 200).strip(), "glass"]
    assert [question.answer for question in found] == answers, "uncut, without its end"
    tokenizer = TextTokenizer.from_folder(tiny_model)
    template = get_template("tokenizer", tokenizer)
    for question in found:
        before = ROWS[question.row]["messages"][:-1]
        assert question.prompt == encode_prompt(before, template, tokenizer)


def test_the_first_rows_are_asked_in_their_order(tiny_model: Path, tmp_path: Path) -> None:
    found = asked(tiny_model, tmp_path, ROWS, n=2)
    assert [question.row for question in found] == [0, 1]


def test_only_the_last_trained_turn_is_asked(tiny_model: Path, tmp_path: Path) -> None:
    rows = [chat("one", "blue", "two", "green")]
    (found,) = asked(tiny_model, tmp_path, rows, source={"loss": "last"})
    assert found.answer == "green"


@pytest.mark.parametrize(
    ("row", "source"), [({"text": "river and stone"}, {}), (chat("a", "b"), {"loss": "all"})]
)
def test_text_without_a_question_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, row: dict[str, Any], source: dict[str, Any]
) -> None:
    with pytest.raises(
        DataError, match=r"rows\.jsonl:1: text to learn as a whole, without a quest"
    ):
        asked(tiny_model, tmp_path, [row], source=source)


def test_rows_without_any_answer_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no row has an answer to compare with"):
        asked(tiny_model, tmp_path, [chat("a", ""), chat("b", "")])
