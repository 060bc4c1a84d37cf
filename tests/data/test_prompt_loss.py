"""Rows of a prompt and a completion: what stands in the prompt is never learned."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft.config.schema import DataSection, Source
from raytune_ft.data.encode import encode_conversation
from raytune_ft.data.rows.formats import to_conversation
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError
from tests.data.conftest import chat


def learned(tokenizer: TextTokenizer, prompt: Any, completion: Any, loss: str = "assistant") -> str:
    source = Source.model_validate({"path": "x", "map": "prompt_completion", "loss": loss})
    row = {"prompt": prompt, "completion": completion}
    conversation = to_conversation(row, source, DataSection(sources=[source]), "x.jsonl:3")
    assert conversation is not None
    example = encode_conversation(
        conversation, get_template("qwen_chat", tokenizer), tokenizer, 512
    )
    return tokenizer.decode([int(label) for label in example.labels if label >= 0])


def test_earlier_answers_in_the_prompt_are_not_learned(tokenizer: TextTokenizer) -> None:
    said = learned(tokenizer, chat("Q", "earlier", "R"), [{"role": "assistant", "content": "now"}])
    assert "now" in said and "earlier" not in said
    assert learned(tokenizer, chat("Q", "earlier", "R"), "now") == said


def test_a_completion_of_several_answers_is_learned_whole(tokenizer: TextTokenizer) -> None:
    said = learned(tokenizer, chat("Q"), chat("Q", "first", "R", "second")[1:])
    assert "first" in said and "second" in said


def test_both_cannot_be_told_apart_and_are_refused(tokenizer: TextTokenizer) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl:3: .*several answers"):
        learned(tokenizer, chat("Q", "earlier", "R"), chat("Q", "first", "R", "second")[1:])


def test_what_the_recipe_asks_for_counts(tokenizer: TextTokenizer) -> None:
    said = learned(tokenizer, chat("Q", "earlier", "R"), "now", loss="all")
    assert "earlier" in said and "Q" in said
