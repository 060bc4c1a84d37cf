"""Ids and labels: the reference's examples, and an oracle that counts characters."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.encode import IGNORE_INDEX, encode_conversation, encode_prompt
from raytune_ft.data.segments import Conversation, Message, Segment
from raytune_ft.data.templating.templates import (
    PROMPTS,
    Prompt,
    PromptTemplate,
    Template,
    get_template,
)
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from tests.data.conftest import GOLDEN, chat

EXAMPLES: list[dict[str, Any]] = json.loads((GOLDEN / "encode_pack.json").read_text())["encode"]
RAW = Prompt("{system}", "{input}")
"""What the reference does with rows that have an input and no template."""
ascii_text = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=25).filter(
    lambda text: "<|" not in text
)
turns = st.lists(st.tuples(ascii_text, ascii_text), min_size=1, max_size=4).map(
    lambda pairs: [text for pair in pairs for text in pair]
)


MARK = "\x1f"


class CodePoints:
    """The golden examples' tokenizer: one id per character, its Unicode code point.

    Outside foreign spans U+001F is a special token, its id 0.
    """

    def encode(self, text: str, foreign: Sequence[tuple[int, int]] = ()) -> list[int]:
        theirs = {place for start, end in foreign for place in range(start, end)}
        return [
            0 if character == MARK and place not in theirs else ord(character)
            for place, character in enumerate(text)
        ]


def prompt_template(name: str | None, tokenizer_class: str = "other") -> Template:
    bos = {"QWenTokenizer": (), "ChatGLMTokenizer": (64790, 64792)}.get(tokenizer_class, (1,))
    eos = 3 if tokenizer_class == "QWenTokenizer" else 2
    return PromptTemplate(PROMPTS[name] if name else RAW, bos, eos, frozenset())


def messages_of(turns: list[dict[str, str | None]]) -> list[Message]:
    """Write the reference's turns as messages; it treats empty and missing texts alike."""
    roles = {"system": "system", "input": "user", "output": "assistant"}
    return [
        {"role": role, "content": turn[key]}
        for turn in turns
        for key, role in roles.items()
        if turn.get(key)
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_ids_and_labels_equal_the_reference(example: dict[str, Any]) -> None:
    messages = messages_of(example["conversation"])
    if not example["input_ids_with_output"]:
        messages = [message for message in messages if message["role"] != "assistant"]
    got = encode_conversation(
        Conversation(messages),
        prompt_template(example["template"], example["tokenizer_class"]),
        CodePoints(),  # type: ignore[arg-type]
        example["max_length"],
        compat=True,
    )
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
    got = encode_conversation(
        Conversation(messages), get_template("tokenizer", tokenizer), tokenizer
    )
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
    ids = encode_conversation(Conversation(messages), template, tokenizer).input_ids.tolist()
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = encode_prompt(messages[:place], template, tokenizer)
            assert ids[: len(prompt)] == prompt


@given(texts=turns, max_length=st.integers(1, 60))
def test_a_cut_keeps_the_beginning(
    tokenizer: TextTokenizer, texts: list[str], max_length: int
) -> None:
    template = get_template("default", tokenizer)
    whole = encode_conversation(Conversation(chat(*texts)), template, tokenizer)
    cut = encode_conversation(Conversation(chat(*texts)), template, tokenizer, max_length)
    assert cut.input_ids.tolist() == whole.input_ids[:max_length].tolist()
    assert cut.labels.tolist() == whole.labels[:max_length].tolist()
    assert cut.uncut_length == whole.uncut_length == len(whole.input_ids)
    assert cut.n_targets == int(np.sum(whole.labels[:max_length] != IGNORE_INDEX))


@pytest.mark.parametrize("name", ["tokenizer", "default"])
def test_text_is_learned_whole_but_for_its_start(tokenizer: TextTokenizer, name: str) -> None:
    text = [{"role": "assistant", "content": "red stone"}]
    got = encode_conversation(Conversation(text), get_template(name, tokenizer), tokenizer)
    ids = [*tokenizer.bos_ids, *tokenizer.encode("red stone"), tokenizer.eos_id]
    assert got.input_ids.tolist() == ids
    assert got.labels.tolist() == [IGNORE_INDEX, *ids[1:]]


def test_the_first_token_is_never_a_target() -> None:
    """But under compat, where the labels are the reference's."""
    row = Conversation([{"role": "assistant", "content": "ab"}])
    tokenizer: Any = CodePoints()
    template = prompt_template(None, "QWenTokenizer")
    got = encode_conversation(row, template, tokenizer)
    assert got.labels.tolist() == [IGNORE_INDEX, ord("b"), 3]
    assert got.input_ids.dtype == got.labels.dtype == np.int32
    reference = encode_conversation(row, template, tokenizer, compat=True)
    assert reference.labels.tolist() == [ord("a"), ord("b"), 3]


def test_rows_that_are_written_already_are_taken_as_they_are() -> None:
    """Foreign text makes no special token, but under compat, as in the reference."""
    written = (
        Segment("", (1,), trained=False),
        Segment(f"{MARK}u{MARK}", None, trained=False, foreign=((1, 3),)),
        Segment(f"{MARK}", None, trained=True),
    )
    row = Conversation([], written=written)
    tokenizer: Any = CodePoints()
    got = encode_conversation(row, prompt_template("default"), tokenizer)
    assert got.input_ids.tolist() == [1, 0, ord("u"), ord(MARK), 0]
    assert got.labels.tolist() == [*[IGNORE_INDEX] * 4, 0]
    reference = encode_conversation(row, prompt_template("default"), tokenizer, compat=True)
    assert reference.input_ids.tolist() == [1, 0, ord("u"), 0, 0]


class Echo:
    """A template that writes down what it is asked."""

    stop_ids: frozenset[int] = frozenset()

    def segments(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        loss: str = "assistant",
    ) -> list[Segment]:
        names = [tool["name"] for tool in tools]
        text = f"{len(messages)} {names} {loss} {add_generation_prompt}"
        return [Segment(text, None, trained=False)]


def test_tools_and_loss_reach_the_template() -> None:
    tokenizer: Any = CodePoints()
    tools = [{"name": "search"}]
    row = Conversation(chat("a", "b"), tools=tools, loss="last")
    ids = encode_conversation(row, Echo(), tokenizer).input_ids
    assert "".join(map(chr, ids)) == "2 ['search'] last False"
    prompt = encode_prompt(chat("a"), Echo(), tokenizer, tools)
    assert "".join(map(chr, prompt)) == "1 ['search'] assistant True"


@pytest.mark.parametrize("name", ["tokenizer", *PROMPTS])
@given(text=st.lists(st.sampled_from(["<|im_end|>", "a ", "\n", "<|im_start|>"]), min_size=1))
def test_a_users_words_are_never_special_tokens(
    tokenizer: TextTokenizer, name: str, text: list[str]
) -> None:
    """So many specials as with harmless words in their place; under compat, those more."""
    template = get_template(name, tokenizer)
    specials = set(tokenizer.special_tokens.values())

    def count(user: str, *, compat: bool = False) -> int:
        row = Conversation(chat(user, "yes", system=user))
        ids = encode_conversation(row, template, tokenizer, compat=compat).input_ids.tolist()
        return sum(id_ in specials for id_ in ids)

    forged = sum(part.startswith("<|") for part in text)
    harmless = count("x")
    assert count("".join(["x", *text, "x"])) == harmless
    assert count("".join(["x", *text, "x"]), compat=True) == harmless + 2 * forged
