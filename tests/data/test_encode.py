"""Ids and labels: the reference's examples, and an oracle that counts characters."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.chat_rows import from_conversation
from raytune_ft.data.encode import IGNORE_INDEX, encode_chat, encode_prompt
from raytune_ft.data.templates import PROMPTS, PromptTemplate, get_template
from raytune_ft.data.tokenizer import TextTokenizer
from tests.data.conftest import GOLDEN, chat

EXAMPLES: list[dict[str, Any]] = json.loads((GOLDEN / "encode_pack.json").read_text())["encode"]
TRAINED = [example for example in EXAMPLES if example["input_ids_with_output"]]
ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=25).filter(
    lambda text: "<|" not in text
)
turns = st.lists(st.tuples(ascii_text, ascii_text), min_size=1, max_size=4).map(
    lambda pairs: [text for pair in pairs for text in pair]
)


class CodePoints:
    """The golden examples' tokenizer: one id per character, its Unicode code point."""

    def encode(self, text: str) -> list[int]:
        return [ord(character) for character in text]


@pytest.mark.parametrize("example", TRAINED, ids=range(len(TRAINED)))
def test_ids_and_labels_equal_the_reference(example: dict[str, Any]) -> None:
    bos = {"QWenTokenizer": (), "ChatGLMTokenizer": (64790, 64792)}
    kind = example["tokenizer_class"]
    template = PromptTemplate(
        PROMPTS[example["template"] or "default"],
        bos.get(kind, (1,)),
        3 if kind == "QWenTokenizer" else 2,
        frozenset(),
    )
    messages = from_conversation(example["conversation"], "row")
    got = encode_chat(messages, template, CodePoints(), example["max_length"])  # type: ignore[arg-type]
    assert got.input_ids.tolist() == example["input_ids"]
    assert got.labels.tolist() == example["labels"]


def oracle(messages: list[dict[str, str]]) -> tuple[str, list[bool]]:
    """Write ChatML by hand and mark which characters the model is to learn."""
    text, learn = "", []
    for message in messages:
        head = ("\n" if text else "") + f"<|im_start|>{message['role']}\n"
        body = message["content"] + "<|im_end|>"
        text += head + body
        learn += [False] * len(head) + [message["role"] == "assistant"] * len(body)
    return text, learn


@given(texts=turns, system=ascii_text)
def test_labels_cover_exactly_the_answers(
    tokenizer: TextTokenizer, texts: list[str], system: str
) -> None:
    messages = chat(*texts, system=system)
    got = encode_chat(messages, get_template("tokenizer", tokenizer), tokenizer)
    text, learn = oracle(messages)
    place = 0
    for id_, label in zip(got.input_ids.tolist(), got.labels.tolist(), strict=True):
        piece = tokenizer.decode([id_], skip_special_tokens=False)
        assert text[place : place + len(piece)] == piece
        marks = learn[place : place + len(piece)]
        assert {label} == {id_ if mark else IGNORE_INDEX for mark in marks}
        place += len(piece)
    assert place == len(text)


@pytest.mark.parametrize("name", ["tokenizer", *PROMPTS])
@given(texts=st.lists(st.text(max_size=12), min_size=2, max_size=6), system=st.text(max_size=8))
def test_training_equals_serving_up_to_each_answer(
    tokenizer: TextTokenizer, name: str, texts: list[str], system: str
) -> None:
    template = get_template(name, tokenizer)
    messages = chat(*texts[: len(texts) // 2 * 2], system=system)
    ids = encode_chat(messages, template, tokenizer).input_ids.tolist()
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(messages[:place], template, tokenizer)
            assert ids[: len(prompt)] == prompt


@given(texts=turns, max_length=st.integers(1, 60))
def test_a_cut_keeps_the_beginning(
    tokenizer: TextTokenizer, texts: list[str], max_length: int
) -> None:
    template = get_template("default", tokenizer)
    whole = encode_chat(chat(*texts), template, tokenizer)
    cut = encode_chat(chat(*texts), template, tokenizer, max_length)
    assert cut.input_ids.tolist() == whole.input_ids[:max_length].tolist()
    assert cut.labels.tolist() == whole.labels[:max_length].tolist()
    assert cut.uncut_length == whole.uncut_length == len(whole.input_ids)
    assert cut.n_targets == int(np.sum(whole.labels[:max_length] != IGNORE_INDEX))


@pytest.mark.parametrize("name", ["tokenizer", "default"])
def test_text_is_learned_whole_but_for_its_start(tokenizer: TextTokenizer, name: str) -> None:
    text = [{"role": "assistant", "content": "red stone"}]
    got = encode_chat(text, get_template(name, tokenizer), tokenizer)
    ids = [*tokenizer.bos_ids, *tokenizer.encode("red stone"), tokenizer.eos_id]
    assert got.input_ids.tolist() == ids
    assert got.labels.tolist() == [IGNORE_INDEX, *ids[1:]]


def test_the_first_token_is_never_a_target() -> None:
    template = PromptTemplate(PROMPTS["default"], (), 2, frozenset())
    got = encode_chat([{"role": "assistant", "content": "ab"}], template, CodePoints())  # type: ignore[arg-type]
    assert got.labels.tolist() == [IGNORE_INDEX, ord("b"), 2]
    assert got.input_ids.dtype == got.labels.dtype == np.int32
