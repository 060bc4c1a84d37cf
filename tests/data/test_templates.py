"""Templates: the reference's texts, and the model's own chat template cut at the answers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.data.templating.templates import (
    PROMPTS,
    SYSTEMS,
    PromptTemplate,
    get_template,
    template_names,
)
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError, ModelError, RecipeError
from tests.data.conftest import GOLDEN, chat

GOLD: dict[str, Any] = json.loads((GOLDEN / "templates.json").read_text(encoding="utf-8"))
REFERENCE: dict[str, Any] = GOLD["prompt_templates"]
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% endif %}"
)


def with_template(tokenizer: TextTokenizer, template: str | None) -> TextTokenizer:
    return TextTokenizer(dataclasses.replace(tokenizer.spec, chat_template=template))


def inputs(template: PromptTemplate, messages: list[dict[str, str]]) -> list[str]:
    segments = template.segments(messages, add_generation_prompt=False)
    return [s.text for s in segments if s.ids is None and not s.trained]


def test_names_are_those_of_the_reference() -> None:
    assert template_names() == ["tokenizer", *REFERENCE, "none"]


def test_system_texts_equal_the_reference() -> None:
    assert {name: facts["text"] for name, facts in GOLD["system_templates"].items()} == SYSTEMS


def test_without_a_template_the_words_stand_alone() -> None:
    template = PromptTemplate(PROMPTS["none"], (), 2, frozenset({2}))
    assert inputs(template, chat("Q1", "A1", "Q2", "A2")) == ["Q1", "Q2"]


@pytest.mark.parametrize("name", REFERENCE)
def test_prompt_texts_equal_the_reference(name: str) -> None:
    facts = REFERENCE[name]
    assert (PROMPTS[name].system, PROMPTS[name].instruction) == (
        facts["SYSTEM"],
        facts["INSTRUCTION"],
    )
    template = PromptTemplate(PROMPTS[name], (), 2, frozenset({2}))
    messages = chat("Q1", "A1", "Q2", "A2", system="SYS")
    assert inputs(template, messages) == facts["rendered_inputs_2_turns_system_SYS_Q1_Q2"]
    without_question = [messages[0], messages[2]]
    assert inputs(template, without_question) == [
        facts["rendered_input_when_input_is_empty_and_system_SYS"]
    ]


def test_braces_in_texts_stay_as_they_are(tokenizer: TextTokenizer) -> None:
    template = get_template("chatglm2", tokenizer)
    messages = chat("{input} {round} {0}", "a", system="{system} {x}")
    text = template.segments(messages, add_generation_prompt=False)[1].text
    assert text == "{system} {x}\n\n\n[Round 1]\n\n问：{input} {round} {0}\n\n答："


@pytest.mark.parametrize(
    "roles", [["user", "user"], ["user", "system"], ["tool"], ["user", "assistant", "function"]]
)
def test_roles_out_of_order_are_refused(tokenizer: TextTokenizer, roles: list[str]) -> None:
    messages = [{"role": role, "content": "x"} for role in roles]
    with pytest.raises(DataError, match=f"message {len(roles)} "):
        get_template("default", tokenizer).segments(messages, add_generation_prompt=True)


@pytest.mark.parametrize("name", PROMPTS)
def test_loss_of_prompt_templates(tokenizer: TextTokenizer, name: str) -> None:
    template = get_template(name, tokenizer)
    messages = chat("a", "b", "c", "d", system="s")
    plain = template.segments(messages, add_generation_prompt=False)
    last = template.segments(messages, add_generation_prompt=False, loss="last")
    everything = template.segments(messages, add_generation_prompt=False, loss="all")
    assert [s.text for s in last] == [s.text for s in everything] == [s.text for s in plain]
    end = ("", (tokenizer.eos_id,))
    learned = [(s.text, s.ids) for s in plain if s.trained]
    assert learned == [("b", None), end, ("d", None), end]
    assert [(s.text, s.ids) for s in last if s.trained] == learned[2:]
    assert [s.ids for s in everything if not s.trained] == [tokenizer.bos_ids] * 2


def test_wrong_names_are_answered_with_the_nearest(tokenizer: TextTokenizer) -> None:
    with pytest.raises(RecipeError, match="did you mean 'internlm_chat'"):
        get_template("internlm_caht", tokenizer)
    with pytest.raises(RecipeError, match="choose: tokenizer, default"):
        get_template("zzzzz", tokenizer)


def test_a_model_without_chat_template_lists_the_others(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ModelError, match="no chat template; choose one of: default, zephyr"):
        get_template("tokenizer", with_template(tokenizer, None))


def test_own_template_equals_transformers(tokenizer_folder: Path, tokenizer: TextTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    for source in (tokenizer.chat_template, SMOLLM2):
        template = get_template("tokenizer", with_template(tokenizer, source))
        for messages in (chat("a", "b"), chat("a\n", " b ", "c", "d", system="s")):
            expected = reference.apply_chat_template(messages, chat_template=source, tokenize=False)
            segments = template.segments(messages, add_generation_prompt=False)
            # what follows the last end-of-turn token belongs to the next turn
            assert "".join(s.text for s in segments) == expected.removesuffix("\n")
            expected = reference.apply_chat_template(
                messages[:-1], chat_template=source, tokenize=False, add_generation_prompt=True
            )
            segments = template.segments(messages[:-1], add_generation_prompt=True)
            assert "".join(s.text for s in segments) == expected


def test_own_template_trains_answers_with_their_end(tokenizer: TextTokenizer) -> None:
    template = get_template("tokenizer", with_template(tokenizer, SMOLLM2))
    segments = template.segments(chat("Q", "A", "Q2", "A2"), add_generation_prompt=False)
    assert [s.text for s in segments if s.trained] == ["A<|im_end|>", "A2<|im_end|>"]
    assert segments[0].text.startswith("<|im_start|>system\nYou are a helpful AI assistant named")
    assert segments[2].text == "\n<|im_start|>user\nQ2<|im_end|>\n<|im_start|>assistant\n"
    assert template.stop_ids == {tokenizer.token_id("<|im_end|>")}


def test_an_end_token_inside_an_answer_does_not_end_it(tokenizer: TextTokenizer) -> None:
    template = get_template("tokenizer", tokenizer)
    segments = template.segments(chat("Q", "say <|im_end|> now"), add_generation_prompt=False)
    assert segments[-1].text == "say <|im_end|> now<|im_end|>"


def test_a_template_that_never_ends_a_turn_gets_the_eos(tokenizer: TextTokenizer) -> None:
    source = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
    source += "{% if add_generation_prompt %}[assistant] {% endif %}"
    template = get_template("tokenizer", with_template(tokenizer, source))
    segments = template.segments(chat("Q", "A"), add_generation_prompt=False)
    assert [(s.text, s.ids) for s in segments if s.trained] == [
        ("A\n", None),
        ("", (tokenizer.eos_id,)),
    ]


def test_a_template_that_prompts_otherwise_than_it_writes_is_refused(
    tokenizer: TextTokenizer,
) -> None:
    source = "{{ messages|length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    template = get_template("tokenizer", with_template(tokenizer, source))
    with pytest.raises(ModelError, match="another way than it prompts"):
        template.segments(chat("Q", "A"), add_generation_prompt=False)


def test_a_template_can_refuse_messages(tokenizer: TextTokenizer) -> None:
    source = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template = get_template("tokenizer", with_template(tokenizer, source))
    with pytest.raises(DataError, match="refuses the messages: no system"):
        template.segments(chat("Q", "A", system="s"), add_generation_prompt=False)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10**9) %}{% endfor %}",
    ],
)
def test_a_hostile_template_meets_the_sandbox(tokenizer: TextTokenizer, source: str) -> None:
    template = get_template("tokenizer", with_template(tokenizer, source))
    with pytest.raises(ModelError, match="chat template fails"):
        template.segments(chat("Q", "A"), add_generation_prompt=False)


def test_a_broken_template_is_a_model_error(tokenizer: TextTokenizer) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        get_template("tokenizer", with_template(tokenizer, "{% for %}"))


def test_generation_marks_of_newer_templates_are_accepted(tokenizer: TextTokenizer) -> None:
    source = "{% for m in messages %}{% if m['role'] == 'assistant' %}>{% generation %}"
    source += "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}"
    source += "{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    template = get_template("tokenizer", with_template(tokenizer, source))
    segments = template.segments(chat("Q", "A"), add_generation_prompt=False)
    assert [(s.text, s.trained) for s in segments] == [("Q>", False), ("A<|im_end|>", True)]


def test_known_end_tokens_stop_an_untuned_model(tokenizer: TextTokenizer) -> None:
    end = tokenizer.token_id("<|im_end|>")
    spec = dataclasses.replace(tokenizer.spec, eos_id=5, extra_stop_ids=frozenset({6}))
    other = TextTokenizer(spec)
    assert get_template("qwen_chat", other).stop_ids == {5, 6, end}
    assert get_template("default", other).stop_ids == {5, 6}
