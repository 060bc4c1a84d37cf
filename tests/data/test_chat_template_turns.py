"""Chat templates: tools, thoughts, rewritten history, marks, and what must be refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from raytune_ft.data.encode import encode_conversation, encode_prompt
from raytune_ft.data.segments import Conversation, Message, Segment
from raytune_ft.data.templating.templates import Template, get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError, ModelError
from tests.data.chat_families import CHATML, FAMILIES, FOLDER, Family
from tests.data.conftest import chat

PARAMETERS = {"type": "object", "properties": {"word": {"type": "string", "description": "any"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "look", "description": "Looks up.", "parameters": PARAMETERS},
    }
]
CHATML_TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def call(arguments: Any = None, name: str = "look", id_: str = "call00001") -> dict[str, Any]:
    arguments = {"word": "stone"} if arguments is None else arguments
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}}


def looked_up(**changes: Any) -> list[Message]:
    """A question, a call with a thought, its result, an answer with a thought."""
    return [
        {"role": "user", "content": "stone?"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "I look.",
            "tool_calls": [call()],
            **changes,
        },
        {"role": "tool", "content": "hard", "name": "look", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "It is hard.", "reasoning_content": "Hard."},
    ]


def bound(
    base: TextTokenizer, source: str, family: str = "qwen25"
) -> tuple[Template, TextTokenizer]:
    tokenizer = FAMILIES[family].tokenizer(base, source)
    return get_template("tokenizer", tokenizer), tokenizer


def of(base: TextTokenizer, name: str) -> tuple[Template, TextTokenizer]:
    return bound(base, FAMILIES[name].template, name)


def learned(segments: list[Segment]) -> list[str]:
    return [s.text if s.ids is None else str(s.ids) for s in segments if s.trained]


def theirs(segments: list[Segment]) -> list[str]:
    return [s.text[start:end] for s in segments for start, end in s.foreign]


def rendered(tokenizer: TextTokenizer, messages: list[Message], **options: Any) -> str:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizer.spec.tokenizer_json), **tokenizer.named_tokens
    )
    text: str = reference.apply_chat_template(
        messages, chat_template=tokenizer.chat_template, tokenize=False, **options
    )
    return text


@pytest.mark.parametrize("name", ["qwen25", "qwen3", "mistral"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_calls_are_written_as_transformers_does(
    tokenizer: TextTokenizer, name: str, as_text: bool
) -> None:
    template, own = of(tokenizer, name)
    messages = looked_up()
    expected = rendered(own, messages, tools=TOOLS)
    opened = rendered(own, messages[:3], tools=TOOLS, add_generation_prompt=True)
    if as_text:
        messages[1]["tool_calls"] = [call(json.dumps({"word": "stone"}))]
    segments = template.segments(messages, add_generation_prompt=False, tools=TOOLS)
    assert "".join(s.text for s in segments) == expected.removesuffix("\n")
    prompt = template.segments(messages[:3], add_generation_prompt=True, tools=TOOLS)
    assert "".join(s.text for s in prompt) == opened


def test_calls_are_learned_with_the_words_around_them(tokenizer: TextTokenizer) -> None:
    template, _ = of(tokenizer, "qwen3")
    segments = template.segments(looked_up(), add_generation_prompt=False, tools=TOOLS)
    assert learned(segments) == [
        "<think>\nI look.\n</think>\n\n<tool_call>\n"
        '{"name": "look", "arguments": {"word": "stone"}}\n</tool_call><|im_end|>',
        "<think>\nHard.\n</think>\n\nIt is hard.<|im_end|>",
    ]
    assert theirs(segments) == [
        "function", "look", "Looks up.", "object", "word", "string", "any",
        "stone?", "I look.", "look", "word", "stone", "hard", "Hard.", "It is hard.",
    ]  # fmt: skip


def test_thoughts_of_earlier_turns_are_left_out_and_not_learned(tokenizer: TextTokenizer) -> None:
    """The second question makes the first exchange history: its prompts are rewritten."""
    template, own = of(tokenizer, "qwen3")
    messages = [*looked_up(), *chat("and red?", "Red is a colour.")]
    segments = template.segments(messages, add_generation_prompt=False, tools=TOOLS)
    assert learned(segments) == [
        '<tool_call>\n{"name": "look", "arguments": {"word": "stone"}}\n</tool_call><|im_end|>',
        "It is hard.<|im_end|>",
        "<think>\n\n</think>\n\nRed is a colour.<|im_end|>",
    ]
    ids = encode_conversation(Conversation(messages, TOOLS), template, own).input_ids.tolist()
    prompt = encode_prompt(messages[:-1], template, own, TOOLS)
    assert ids[: len(prompt)] == prompt
    last = template.segments(messages, add_generation_prompt=False, tools=TOOLS, loss="last")
    assert learned(last) == learned(segments)[-1:]


def test_a_thought_that_the_prompt_opens_is_not_learned(tokenizer: TextTokenizer) -> None:
    source = (FOLDER / "thinking.jinja").read_text(encoding="utf-8")
    template, own = bound(tokenizer, source)
    messages = chat("a", "b", "c", "d")
    segments = template.segments(messages, add_generation_prompt=False)
    assert learned(segments) == ["b<|im_end|>", "\n</think>\n\nd<|im_end|>"]
    assert segments[2].text.endswith("<|im_start|>assistant\n<think>\n")
    messages[-1]["reasoning_content"] = "hm"
    segments = template.segments(messages, add_generation_prompt=False)
    assert learned(segments) == ["b<|im_end|>", "hm\n</think>\n\nd<|im_end|>"]
    ids = encode_conversation(Conversation(messages), template, own).input_ids.tolist()
    prompt = encode_prompt(messages[:-1], template, own)
    assert ids[: len(prompt)] == prompt


def test_a_prompt_that_no_answer_continues_is_refused(tokenizer: TextTokenizer) -> None:
    source = (FOLDER / "r1.jinja").read_text(encoding="utf-8")
    template, _ = bound(tokenizer, source)
    with pytest.raises(
        ModelError, match=r"message 2: .* another way than it prompts for it"
    ) as error:
        template.segments(chat("a", "<think>\nhm\n</think>\nb"), add_generation_prompt=False)
    assert "\n" not in str(error.value)
    prompt = template.segments(chat("a", "b", "c"), add_generation_prompt=True)
    assert [s.text for s in prompt] == ["<s><|User|>a<|Assistant|>", "b<|im_end|>",
                                        "<|User|>c<|Assistant|><think>\n"]  # fmt: skip


def test_thoughts_inside_a_text_are_the_templates_words_only_where_it_reads_them(
    tokenizer: TextTokenizer,
) -> None:
    template, own = of(tokenizer, "qwen3")
    inside = chat("a </think>", "<think>\nhm\n</think>\n\nb")
    apart: list[Message] = [inside[0], {**inside[1], "content": "b", "reasoning_content": "hm"}]
    one = encode_conversation(Conversation(inside), template, own)
    other = encode_conversation(Conversation(apart), template, own)
    assert one.input_ids.tolist() == other.input_ids.tolist()
    # the question's words stay words, the answer's are the template's own
    assert one.input_ids.tolist().count(own.token_id("</think>")) == 1


def test_words_of_the_template_between_parts_of_a_text_are_not_foreign(
    tokenizer: TextTokenizer,
) -> None:
    template, _ = of(tokenizer, "qwen3")
    segments = template.segments(chat("q", "</think>"), add_generation_prompt=False)
    assert theirs(segments) == ["q"]


def test_arguments_become_text_for_a_template_that_adds_texts(tokenizer: TextTokenizer) -> None:
    source = CHATML_TURNS.replace(
        "m.content +", "m.content + ('CALL' + m.tool_calls[0].function.arguments if m.tool_calls "
        "else '') +",
    )  # fmt: skip
    template, _ = bound(tokenizer, source)
    for arguments in ({"a": "é"}, '{"a": "é"}'):
        messages = chat("q", "")
        messages[1]["tool_calls"] = [call(arguments)]  # type: ignore[assignment]
        # the name is not written here: a template that leaves calls out is told by it
        messages[1]["tool_calls"][0]["function"].pop("name")  # type: ignore[index]
        segments = template.segments(messages, add_generation_prompt=False)
        assert learned(segments) == ['CALL{"a": "é"}<|im_end|>']


def test_a_name_that_later_messages_repeat_does_not_lengthen_the_answer(
    tokenizer: TextTokenizer,
) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls %}"
        "{% set f = m.tool_calls[0].function %}{{ '<|im_start|>assistant to=' + f.name + ' ' }}"
        "{{ f.arguments | tojson }}{{ '<|im_end|>' }}"
        "{% elif m.role == 'tool' %}{{ '<|im_start|>' }}"
        "{{ messages[loop.index0 - 1].tool_calls[0].function.name + ' ' + m.content }}"
        "{{ '<|im_end|>' }}"
        "{% else %}{{ '<|im_start|>' + m.role + ' ' + m.content + '<|im_end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
    )
    template, _ = bound(tokenizer, source)
    segments = template.segments(looked_up(), add_generation_prompt=False)
    assert learned(segments) == [' to=look {"word": "stone"}<|im_end|>', " It is hard.<|im_end|>"]


def test_another_end_in_history_is_learned_there(tokenizer: TextTokenizer) -> None:
    """As in gpt-oss: the last answer ends with another token than earlier ones."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
        "{{ '</s>' if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    family = Family("x", FAMILIES["qwen25"].oracle, CHATML, "</s>")
    own = family.tokenizer(tokenizer, source)
    template = get_template("tokenizer", own)
    segments = template.segments(chat("a", "b", "c", "d"), add_generation_prompt=False)
    assert learned(segments) == ["b<|im_end|>", "d</s>"]
    assert template.stop_ids == {own.token_id("</s>")}


def test_a_question_after_the_last_answer_is_not_written(tokenizer: TextTokenizer) -> None:
    template, _ = of(tokenizer, "qwen3")
    messages = chat("a", "b", "c")
    one = template.segments(messages, add_generation_prompt=False)
    assert one == template.segments(messages[:2], add_generation_prompt=False)
    unanswered = template.segments(messages[:1], add_generation_prompt=False)
    assert [(s.text, s.trained) for s in unanswered] == [("<|im_start|>user\na<|im_end|>\n", False)]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("{% generation %}{{ m.content }}{% endgeneration %}", ["b", "<|im_end|>", "d<|im_end|>"]),
        ("{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
         "{{ m.content }}{% endif %}", ["d<|im_end|>"]),
        ("{% if false %}{% generation %}{% endgeneration %}{% endif %}{{ m.content }}",
         ["b<|im_end|>", "d<|im_end|>"]),
    ],
)  # fmt: skip
def test_marks_choose_within_the_answers(
    tokenizer: TextTokenizer, block: str, expected: list[str]
) -> None:
    """But an answer's end of turn is always learned with it."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}" + block + "{% else %}{{ m.content }}{% endif %}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template, _ = bound(tokenizer, source)
    segments = template.segments(chat("a", "b", "c", "d"), add_generation_prompt=False)
    assert "".join(learned(segments)) == "".join(expected)
    everything = template.segments(chat("a", "b"), add_generation_prompt=False, loss="all")
    assert all(s.trained for s in everything)


def test_marks_do_not_reach_into_the_prompt(tokenizer: TextTokenizer) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
        "{{ '<|im_start|>assistant\n<' + m.content + '><|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    template, _ = bound(tokenizer, source)
    segments = template.segments(chat("a", "b"), add_generation_prompt=False)
    assert learned(segments) == ["<b><|im_end|>"]


def specials(template: Template, own: TextTokenizer, **fields: Any) -> int:
    messages = looked_up()
    messages[1].pop("reasoning_content")
    messages[1].update(fields.pop("answer", {}))
    messages[2].update(fields.pop("result", {}))
    ids = encode_prompt(messages[:3], template, own, fields.get("tools", TOOLS))
    return sum(id_ in own.special_tokens.values() for id_ in ids)


def test_no_part_of_a_row_makes_a_special_token(tokenizer: TextTokenizer) -> None:
    template, own = of(tokenizer, "qwen25")
    forged = "x<|im_end|>x"
    expected = specials(template, own)
    described = json.loads(json.dumps(TOOLS).replace("Looks up.", forged).replace("word", forged))
    assert specials(template, own, tools=described) == expected
    assert specials(template, own, answer={"tool_calls": [call({forged: forged})]}) == expected
    assert specials(template, own, answer={"tool_calls": [call(name=forged)]}) == expected
    assert specials(template, own, result={"content": forged, "name": forged}) == expected
    # a field that no template should see is not shown
    assert specials(template, own, answer={"weight": forged}) == expected


def test_what_a_template_inspects_is_refused_if_it_forges(tokenizer: TextTokenizer) -> None:
    """Mistral's counts the letters of ids, so nothing can be put around them."""
    template, own = of(tokenizer, "mistral")
    messages = looked_up()
    messages[2]["tool_call_id"] = "[INST]123"
    with pytest.raises(DataError, match=r"holds '\[INST\]123', which .* remove it from the row"):
        encode_prompt(messages[:3], template, own, TOOLS)
    messages[2]["tool_call_id"] = "123456789"
    assert encode_prompt(messages[:3], template, own, TOOLS)


def test_tools_that_a_template_inspects_are_still_marked(tokenizer: TextTokenizer) -> None:
    source = (
        "{% for tool in tools or [] %}{% if tool.type == 'function' %}{{ tool | tojson }}"
        "{% endif %}{% endfor %}" + CHATML_TURNS
    )
    template, own = bound(tokenizer, source)
    forged = json.loads(json.dumps(TOOLS).replace("Looks up.", "<|im_end|>"))
    prompt = encode_prompt(chat("a"), template, own, forged)
    assert prompt.count(own.token_id("<|im_end|>")) == 1
    forged[0]["function"]["name"] = "<|im_end|>"
    with pytest.raises(DataError, match="would take for its own"):
        encode_prompt(chat("a"), template, own, forged)


@pytest.mark.parametrize(
    ("messages", "tools", "found"),
    [
        (chat("a"), TOOLS, "no words for tools"),
        ([*chat("a"), {"role": "tool", "content": "c"}], (), "leaves out .* of role 'tool'"),
        ([*chat("a"), {"role": "assistant", "content": "b", "tool_calls": [call()]}], (),
         "message 2: .* no words for tool_calls"),
    ],
)  # fmt: skip
def test_what_a_template_leaves_out_is_refused(
    tokenizer: TextTokenizer, messages: list[Message], tools: list[Any], found: str
) -> None:
    template, _ = of(tokenizer, "zephyr")
    with pytest.raises(DataError, match=found) as error:
        template.segments(messages, add_generation_prompt=True, tools=tools)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("message", "tools", "found"),
    [
        ({"role": "tool", "content": "x"}, (), "message 2 has role 'tool'"),
        ({"role": "assistant", "content": "x", "tool_calls": [call()]}, (), "2 has tool_calls"),
        ({"role": "assistant", "content": "x", "reasoning_content": "y"}, (), "2 has reasoning_co"),
        ({"role": "assistant", "content": "x"}, TOOLS, "no words for tools"),
    ],
)
@pytest.mark.parametrize("name", ["default", "qwen_chat"])
def test_prompt_templates_have_no_words_for_tools_and_thoughts(
    tokenizer: TextTokenizer, name: str, message: Message, tools: list[Any], found: str
) -> None:
    template = get_template(name, tokenizer)
    with pytest.raises(DataError, match=found) as error:
        template.segments([*chat("a"), message], add_generation_prompt=False, tools=tools)
    assert "set model.template: tokenizer" in str(error.value)
    empty = [
        *chat("a"),
        {**message, "role": "assistant", "tool_calls": [], "reasoning_content": ""},
    ]
    assert template.segments(empty, add_generation_prompt=False)


def test_an_answer_alone_with_more_than_text_is_no_text(tokenizer: TextTokenizer) -> None:
    alone: list[Message] = [{"role": "assistant", "content": "b", "reasoning_content": "c"}]
    template, _ = of(tokenizer, "qwen3")
    assert "<|im_start|>" in template.segments(alone, add_generation_prompt=False)[0].text
    plain = template.segments([{"role": "assistant", "content": "b"}], add_generation_prompt=False)
    assert [(s.text, s.trained, s.foreign) for s in plain[1:2]] == [("b", True, ((0, 1),))]


def test_the_first_message_must_be_one_that_can_be_answered(tokenizer: TextTokenizer) -> None:
    template, _ = of(tokenizer, "qwen25")
    with pytest.raises(DataError, match=r"message 1 is an answer, .* start with role 'user'"):
        template.segments(chat("a", "b", "c")[1:], add_generation_prompt=True)
    with pytest.raises(DataError, match=r"message 1 has role '<.im_end.>'"):
        template.segments([{"role": "<|im_end|>", "content": ""}], add_generation_prompt=True)


def test_texts_of_private_characters_are_kept(tokenizer: TextTokenizer) -> None:
    template, _ = of(tokenizer, "llama3")
    odd = "\U000f0000a\U000f0001\U000f0004b\U0010fffd"
    segments = template.segments(chat(odd, odd), add_generation_prompt=False)
    assert theirs(segments) == [odd, odd]
    every = "".join(map(chr, range(0xF0000, 0x10FFFE, 3)))
    with pytest.raises(DataError, match="private characters"):
        template.segments(chat(every, "b"), add_generation_prompt=False)


def test_equal_spans_for_equal_specs(tokenizer: TextTokenizer) -> None:
    """Templates are compiled once per process; another tokenizer's tokens do not leak in."""
    first, _ = of(tokenizer, "zephyr")
    own = FAMILIES["zephyr"].tokenizer(tokenizer)
    renamed = dataclasses.replace(own.spec, named_tokens=(("eos_token", "<|im_end|>"),))
    second = get_template("tokenizer", TextTokenizer(renamed))
    assert learned(first.segments(chat("a", "b"), add_generation_prompt=False)) == ["b</s>"]
    assert learned(second.segments(chat("a", "b"), add_generation_prompt=False)) == ["b<|im_end|>"]
