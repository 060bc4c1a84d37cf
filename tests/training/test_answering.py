"""Answers as people read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.model.answers import Answer
from raytune_ft.training.evaluating.answering import Voice


def test_an_answer_that_was_cut_ends_with_a_whole_character(tiny_model: Path) -> None:
    tokenizer = TextTokenizer.from_folder(tiny_model)
    engine: Any = None
    voice = Voice(engine, tokenizer, get_template("tokenizer", tokenizer), engine)
    ids = tokenizer.encode("red 我")[:-1]
    assert tokenizer.decode(ids).endswith("\ufffd")
    assert voice.text(Answer(ids, "length")) == "red"
    assert voice.text(Answer(ids, "end")) == tokenizer.decode(ids)
