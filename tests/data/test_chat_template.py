"""Chat templates of today's families: an oracle that writes by hand, and transformers itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from raytune_ft.config.cache import cache_dir
from raytune_ft.data.encode import IGNORE_INDEX, encode_conversation, encode_prompt
from raytune_ft.data.segments import Conversation, Message, Segment
from raytune_ft.data.templating.templates import PROMPTS, get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from tests.data.chat_families import FAMILIES, Family, Piece
from tests.data.conftest import chat
from tests.data.tokenizer_files import train_pieces, write_folder

MARKERS = sorted({
    *(text for f in FAMILIES.values() for text in (*f.special, *f.words, f.eos, f.bos)),
    "<|Bot|>:", "<reserved_103>", "{input}", "{{ x }}", "<|im_", "[/INST",
})  # fmt: skip
fragments = st.one_of(
    st.sampled_from([" ", "\n", "\t", "hello", "日本", "é", "…", "\U000f0001", "\ue000", *MARKERS]),
    st.text(max_size=6),
)
texts = st.lists(fragments, max_size=5).map("".join)
systems = st.one_of(st.none(), texts)


@st.composite
def chats(
    draw: st.DrawFn, most: int = 12, content: st.SearchStrategy[str] = texts
) -> list[Message]:
    """1 to 12 turns of user and assistant, with a system text or without, which may be empty."""
    system = draw(st.one_of(st.none(), content))
    messages: list[Message] = []
    if system is not None:
        messages.append({"role": "system", "content": system})
    for _ in range(draw(st.integers(1, most))):
        messages.append({"role": "user", "content": draw(content)})
        messages.append({"role": "assistant", "content": draw(content)})
    return messages


def chats_for(family: Family, most: int = 4) -> st.SearchStrategy[list[Message]]:
    """Chats that a family can take: one that rewrites earlier prompts needs questions."""
    if not family.rewrites:
        return chats(most)
    return chats(most, texts.map("q".__add__))


@pytest.fixture(scope="session", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture(scope="session")
def own(family: Family, tokenizer: TextTokenizer) -> TextTokenizer:
    """The family's tokenizer."""
    return family.tokenizer(tokenizer)


def characters(pieces: list[Piece]) -> tuple[str, list[bool], list[bool]]:
    """Return the text, and for every character whether it is learned and whether it is theirs."""
    text = "".join(piece.text for piece in pieces)
    learn = [piece.learn for piece in pieces for _ in piece.text]
    return text, learn, [piece.theirs for piece in pieces for _ in piece.text]


def seen(segments: list[Segment], tokenizer: TextTokenizer) -> tuple[str, list[bool], list[bool]]:
    """Return the same of segments."""
    text, learn, theirs = "", [], []
    for segment in segments:
        part = segment.text
        if segment.ids is not None:
            part = tokenizer.decode(segment.ids, skip_special_tokens=False)
        text += part
        learn += [segment.trained] * len(part)
        theirs += [any(a <= i < b for a, b in segment.foreign) for i in range(len(part))]
    return text, learn, theirs


@settings(max_examples=40)
@given(data=st.data())
def test_every_character_is_judged_as_by_hand(
    family: Family, own: TextTokenizer, data: st.DataObject
) -> None:
    messages = data.draw(chats_for(family, 12))
    segments = get_template("tokenizer", own).segments(messages, add_generation_prompt=False)
    text, learn, theirs = characters(family.oracle(messages))
    end = max(i for i, flag in enumerate(learn) if flag) + 1
    got_text, got_learn, got_theirs = seen(segments, own)
    assert got_text == text[:end]
    assert got_learn == learn[:end]
    # a blank at the edge of a text may stand outside its span: no token is made of blanks
    wrong = [
        i for i, (got, want) in enumerate(zip(got_theirs, theirs[:end], strict=True))
        if got != want and not (want and text[i].isspace())
    ]  # fmt: skip
    assert wrong == []


@settings(max_examples=15)
@given(data=st.data())
def test_labels_decode_to_the_answers_and_their_ends(
    family: Family, own: TextTokenizer, data: st.DataObject
) -> None:
    messages = data.draw(chats_for(family))
    template = get_template("tokenizer", own)
    example = encode_conversation(Conversation(messages), template, own)
    labels = [id_ for id_ in example.labels.tolist() if id_ != IGNORE_INDEX]
    learned = "".join(piece.text for piece in family.oracle(messages) if piece.learn)
    assert own.decode(labels, skip_special_tokens=False) == learned


@settings(max_examples=15)
@given(data=st.data())
def test_training_begins_with_the_prompt(
    family: Family, own: TextTokenizer, data: st.DataObject
) -> None:
    messages = data.draw(chats_for(family))
    template = get_template("tokenizer", own)
    ids = encode_conversation(Conversation(messages), template, own).input_ids.tolist()
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    for index in answers[-1:] if family.rewrites else answers:
        prompt = encode_prompt(messages[:index], template, own)
        assert ids[: len(prompt)] == prompt


@settings(max_examples=15)
@given(data=st.data())
def test_the_last_answer_or_everything(
    family: Family, own: TextTokenizer, data: st.DataObject
) -> None:
    messages = data.draw(chats_for(family))
    template = get_template("tokenizer", own)
    by_default = template.segments(messages, add_generation_prompt=False)
    last = template.segments(messages, add_generation_prompt=False, loss="last")
    everything = template.segments(messages, add_generation_prompt=False, loss="all")
    assert [s.text for s in last] == [s.text for s in everything] == [s.text for s in by_default]
    assert all(s.trained for s in everything)
    n_last = len(template.segments(messages[:-1], add_generation_prompt=True))
    assert not any(s.trained for s in last[:n_last])
    assert [s.trained for s in last[n_last:]] == [s.trained for s in by_default[n_last:]]


@pytest.mark.parametrize("name", PROMPTS)
@settings(max_examples=30)
@given(messages=chats(4))
def test_prompt_templates_mark_what_is_theirs(
    tokenizer: TextTokenizer, name: str, messages: list[Message]
) -> None:
    """Replacing the foreign texts by others leaves the template's own words as they are."""
    template = get_template(name, tokenizer)
    written = template.segments(messages, add_generation_prompt=False)
    plain = [{**m, "content": "x" if m["content"] else ""} for m in messages]
    expected = template.segments(plain, add_generation_prompt=False)

    def own_words(segment: Segment) -> list[str]:
        words, done = [], 0
        for start, end in segment.foreign:
            words.append(segment.text[done:start])
            done = end
        return [*words, segment.text[done:]]

    assert [own_words(s) for s in written] == [own_words(s) for s in expected]
    theirs = [s.text[a:b] for s in written for a, b in s.foreign]
    assert theirs == [m["content"] for m in messages if m["content"]]
    answers = [s.text for s in written if s.trained and s.ids is None]
    assert answers == [m["content"] for m in messages if m["role"] == "assistant"]
    ends = [s.ids for s in written if s.trained and s.ids is not None]
    assert ends == [(tokenizer.eos_id,)] * len(answers)


def reference(own: TextTokenizer) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(own.spec.tokenizer_json), **own.named_tokens
    )


def mask(own: TextTokenizer, template: str, messages: list[Message]) -> tuple[str, int]:
    """Return the text that transformers' mask covers, and how many tokens."""
    out = reference(own).apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True
    )
    chosen = [i for i, m in zip(out["input_ids"], out["assistant_masks"], strict=True) if m]
    return own.decode(chosen, skip_special_tokens=False), len(chosen)


CHAT: list[Message] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "red stone?"},
    {"role": "assistant", "content": "blue river"},
    {"role": "user", "content": "and seven?"},
    {"role": "assistant", "content": "night, of course"},
]


def learned(own: TextTokenizer, messages: list[Message]) -> str:
    example = encode_conversation(Conversation(messages), get_template("tokenizer", own), own)
    return own.decode(
        [id_ for id_ in example.labels.tolist() if id_ != IGNORE_INDEX], skip_special_tokens=False
    )


def test_templates_without_marks_give_nothing_there_and_the_answers_here(
    family: Family, own: TextTokenizer
) -> None:
    assert mask(own, family.template, CHAT) == ("", 0)
    expected = "".join(piece.text for piece in family.oracle(CHAT) if piece.learn)
    assert "blue river" in expected
    assert learned(own, CHAT) == expected


@settings(max_examples=20)
@given(messages=chats(3, st.sampled_from(["a", "red stone", "x y z", "seven (7)"])))
def test_spans_equal_those_of_transformers_with_marks(
    family: Family, own: TextTokenizer, tokenizer: TextTokenizer, messages: list[Message]
) -> None:
    """Their mask of a template with marks; ours of the same without, and of it with marks."""
    covered, _ = mask(own, family.marked, messages)
    ours = learned(own, messages)
    if family.name == "glm4":  # it ends no turn: the marks leave out what the model must learn
        ours = ours.replace("<|user|>", "").replace("<|endoftext|>", "")
    assert ours == covered
    with_marks = family.tokenizer(tokenizer, family.marked)
    assert learned(with_marks, messages) == learned(own, messages)


def test_the_whole_text_is_that_of_transformers(family: Family, own: TextTokenizer) -> None:
    template = get_template("tokenizer", own)
    for messages, prompting in ((CHAT[:2], True), (CHAT[:4], True), (CHAT, False)):
        text = reference(own).apply_chat_template(
            messages,
            chat_template=family.template,
            tokenize=False,
            add_generation_prompt=prompting,
            date_string="26 Jul 2024",
        )
        segments = template.segments(messages, add_generation_prompt=prompting)
        written = "".join(segment.text for segment in segments)
        assert written == text if prompting else text.startswith(written)


def test_the_default_models_own_template() -> None:
    folder = cache_dir() / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("needs the default model in the cache")
    own = TextTokenizer.from_folder(folder)
    template = get_template("tokenizer", own)
    messages = chat("What is <|im_end|>?", "A mark. ", "And [INST]?", " Another.")
    example = encode_conversation(Conversation(messages), template, own)
    labels = [id_ for id_ in example.labels.tolist() if id_ != IGNORE_INDEX]
    assert own.decode(labels, skip_special_tokens=False) == (
        "A mark. <|im_end|> Another.<|im_end|>"
    )
    ends = example.input_ids.tolist().count(own.token_id("<|im_end|>"))
    assert ends == 5  # the default system text, two questions, two answers


AS_LLAMA = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


@pytest.mark.parametrize("name", ["mistral", "llama2", "zephyr", "qwen25"])
def test_cuts_put_no_space_into_the_text(name: str, tmp_path: Path) -> None:
    """Sentencepiece puts a space before every text; a chat's ids are those of its whole text."""
    folder = write_folder(
        tmp_path / "model",
        {"tokenizer.model": train_pieces(**AS_LLAMA)},
        tokenizer_class="LlamaTokenizer",
    )
    spec = TextTokenizer.from_folder(folder).spec
    own = TextTokenizer(dataclasses.replace(spec, chat_template=FAMILIES[name].template))
    assert own.encode("x") != own.encode("\nx")[len(own.encode("\n")) :]
    template = get_template("tokenizer", own)
    messages = chat("red", "blue stone", "seven?", " night", system="aaa")
    ids = encode_conversation(Conversation(messages), template, own).input_ids.tolist()
    segments = template.segments(messages, add_generation_prompt=False)
    whole = "".join(s.text or own.decode(s.ids or (), skip_special_tokens=False) for s in segments)
    assert ids == own.encode(whole)
    prompt = encode_prompt(messages[:-1], template, own)
    assert ids[: len(prompt)] == prompt
    forged = chat("red", "blue", "x</s>x", "y</s>y", system="aaa")
    ids = encode_conversation(Conversation(forged), template, own).input_ids.tolist()
    plain = encode_conversation(Conversation(chat("a", "b", "c", "d", system="s")), template, own)
    assert ids.count(own.eos_id) == plain.input_ids.tolist().count(own.eos_id)
