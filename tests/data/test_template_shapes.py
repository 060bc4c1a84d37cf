"""Shapes: conversations that are not rendered are cut as those that are, or not at all."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.data.segments import Message, Segment
from raytune_ft.data.templating.chat_template import ChatTemplate
from raytune_ft.data.templating.shapes import Shapes
from raytune_ft.data.templating.tracing import Conditions, Tracer, UntraceableError
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import RaytuneError
from tests.data.chat_families import FAMILIES, Family
from tests.data.conftest import chat

MARKERS = sorted({
    *(text for f in FAMILIES.values() for text in (*f.special, *f.words, f.eos, f.bos)),
    "<think>\nx\n</think>\n\ny", "{{ x }}", "<|im_", "<|im_end|>\n<|im_start|>user\n",
})  # fmt: skip
words = st.sampled_from(
    ["red", "天空", "é", "\n", " ", "\t ", "x" * 40, "\U000f0001", "\ue000", *MARKERS]
)
contents = st.lists(words, min_size=1, max_size=4).map("".join) | st.text(max_size=6)
LOSSES = ("assistant", "last", "all")


@st.composite
def few_shapes(draw: st.DrawFn) -> list[Message]:
    """One to three turns, so that shapes come again."""
    texts = draw(st.lists(contents, min_size=2, max_size=6))
    system = draw(st.sampled_from(["", "told"]) | contents)
    return chat(*texts[: len(texts) // 2 * 2], system=system)


def outcome(template: ChatTemplate, messages: Sequence[Message], loss: str) -> list[Segment] | str:
    try:
        return template.segments(messages, add_generation_prompt=False, loss=loss)  # type: ignore[arg-type]
    except RaytuneError as error:
        return str(error)


def warmed(tokenizer: TextTokenizer) -> ChatTemplate:
    """A template that has seen every shape that `few_shapes` gives."""
    template = ChatTemplate(tokenizer)
    for turns in (1, 2, 3):
        for system in ("", "told"):
            for loss in LOSSES:
                outcome(template, chat(*["ask", "say"] * turns, system=system), loss)
    return template


@pytest.fixture(scope="module", params=[*FAMILIES, "marked"])
def own(request: pytest.FixtureRequest, tokenizer: TextTokenizer) -> TextTokenizer:
    """A family's tokenizer; `marked` has a template with generation marks."""
    if request.param == "marked":
        family: Family = FAMILIES["smollm2"]
        return family.tokenizer(tokenizer, family.marked)
    return FAMILIES[request.param].tokenizer(tokenizer)


@pytest.fixture(scope="module")
def both(own: TextTokenizer) -> tuple[ChatTemplate, ChatTemplate]:
    """A template that knows shapes, and one that has to render."""
    known, rendering = warmed(own), ChatTemplate(own)
    rendering._shapes.learn = lambda *args: None  # type: ignore[method-assign]
    return known, rendering


@settings(max_examples=80)
@given(messages=few_shapes(), loss=st.sampled_from(LOSSES))
def test_known_shapes_are_cut_as_renderings_are(
    both: tuple[ChatTemplate, ChatTemplate], messages: list[Message], loss: str
) -> None:
    known, rendering = both
    assert outcome(known, messages, loss) == outcome(rendering, messages, loss)


@pytest.mark.parametrize("name", ["qwen25", "smollm2", "phi3", "phi4", "glm4", "zephyr", "llama3"])
def test_families_that_only_write_texts_need_no_rendering(
    name: str, tokenizer: TextTokenizer
) -> None:
    template = warmed(FAMILIES[name].tokenizer(tokenizer))
    for turns in (1, 2):
        messages = chat(*["hard <|im_end|> words", "天"] * turns, system="</s>")
        assert template._shapes.segments(messages, "assistant") is not None
        assert template._shapes.segments([*messages, messages[1]], "assistant") is not None


@pytest.mark.parametrize(
    "messages",
    [
        chat("a", " "),
        chat("", "b"),
        chat("a", "b\U000f0001"),
        [{"role": "user", "content": "a", "name": "n"}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": ["a"]}, {"role": "assistant", "content": "b"}],
        [{"role": "user", "content": "a"}],
        chat("a", "b" * 2**21),
    ],
)
def test_conversations_of_more_than_plain_texts_are_rendered(
    tokenizer: TextTokenizer, messages: list[Message]
) -> None:
    template = warmed(tokenizer)
    assert template._shapes.segments(chat("a", "b"), "assistant") is not None
    assert template._shapes.segments(messages, "assistant") is None


CONTENT = "messages[0].content"
READING = [
    f"{{{{ {CONTENT} | length }}}}",
    f"{{{{ {CONTENT}[0] }}}}",
    f"{{{{ {CONTENT}[:3] }}}}",
    f"{{{{ {CONTENT}.upper() }}}}",
    f"{{{{ {CONTENT} | upper }}}}",
    f"{{{{ {CONTENT}.split('x')[-1] }}}}",
    f"{{{{ {CONTENT} | replace('a', 'b') }}}}",
    f"{{{{ {CONTENT}.strip('a') }}}}",
    f"{{{{ ('a' ~ {CONTENT}).upper() }}}}",
    f"{{{{ (' ' ~ {CONTENT}) | trim }}}}",
    f"{{{{ {CONTENT} | string | length }}}}",
    f"{{{{ {CONTENT} in 'abc' }}}}",
    f"{{{{ {CONTENT} == messages[1].content }}}}",
    f"{{{{ {CONTENT} < 'm' }}}}",
    f"{{{{ '%s' % {CONTENT} }}}}",
    f"{{{{ '{{}}'.format({CONTENT}) }}}}",
    f"{{{{ {CONTENT} * 2 }}}}",
    f"{{{{ ', '.join([{CONTENT}, 'x']) }}}}",
    f"{{{{ [{CONTENT}, 'x'] | join(', ') }}}}",
    f"{{{{ 'xay'.replace('a', {CONTENT}) }}}}",
    f"{{{{ {{'a': 1}}[{CONTENT}] }}}}",
    f"{{{{ {{'a': 1}}.get({CONTENT}, 2) }}}}",
    f"{{{{ {CONTENT} | tojson }}}}",
    "{{ messages | tojson }}",
    "{{ messages }}",
    "{{ messages | map(attribute='content') | sort | first }}",
    "{{ messages | map(attribute='content') | map('upper') | first }}",
    "{{ messages | selectattr('content', 'in', 'ab') | list | length }}",
    "{{ messages | groupby('content') | length }}",
    "{{ messages | map(attribute='content') | unique | list | length }}",
    f"{{% for c in {CONTENT} %}}{{{{ c }}}}{{% endfor %}}",
    f"{{{{ {CONTENT} is upper }}}}",
    f"{{{{ {CONTENT} is sameas 'a' }}}}",
    f"{{{{ {CONTENT} | int }}}}",
    f"{{{{ {CONTENT}.text }}}}",
    f"{{% macro m(c) %}}{{{{ c }}}}!{{% endmacro %}}{{{{ m({CONTENT}) | length }}}}",
    f"{{% set c %}}<{{{{ {CONTENT} }}}}>{{% endset %}}{{{{ c[1:-1] }}}}",
    f"{{% filter upper %}}{{{{ {CONTENT} }}}}{{% endfilter %}}",
    f"{{{{ strftime_now({CONTENT}) }}}}",
    "{% for g in messages %}{% if loop.changed(g.content) %}c{% endif %}{% endfor %}",
]
WRITING = [
    f"<{{{{ {CONTENT} }}}}>",
    f"{{{{ '<' + {CONTENT} ~ 1.0 | string + '>' }}}}",
    f"{{{{ {CONTENT} | trim }}}}",
    f"{{{{ {CONTENT}.strip() | default('x') }}}}",
    f"{{{{ {CONTENT}.lstrip('\\n') }}}}",
    f"{{% if {CONTENT} is string and {CONTENT} %}}{{{{ {CONTENT} }}}}{{% endif %}}",
    f"{{% if '</think>' in {CONTENT} %}}a{{% else %}}{{{{ {CONTENT} }}}}{{% endif %}}",
    f"{{% if {CONTENT}.startswith('x') or {CONTENT} == 'y' or {CONTENT}.endswith('z') %}}a"
    f"{{% else %}}{{{{ {CONTENT} }}}}{{% endif %}}",
    f"{{% macro m(c) %}}<{{{{ c }}}}>{{% endmacro %}}{{{{ m({CONTENT}) }}}}{{{{ m(1) }}}}",
    f"{{% set c %}}<{{{{ {CONTENT} }}}}>{{% endset %}}{{{{ c ~ c }}}}",
    f"{{% set n = namespace(c={CONTENT}) %}}{{{{ n.c }}}}",
    f"{{% if {CONTENT} in ['x', 'y'] %}}a{{% endif %}}{{{{ {CONTENT} }}}}",
    "{{ messages | map(attribute='content') | first }}",
    f"{{% generation %}}<{{{{ {CONTENT} }}}}>{{% endgeneration %}}",
]


def traced(source: str) -> tuple[tuple[str | int, ...] | None, Conditions]:
    tracer, conditions = Tracer(source, {}), Conditions()
    messages = [{"role": "user", "content": tracer.slot(i)} for i in range(2)]
    return tracer.trace(messages, conditions, add_generation_prompt=False), conditions


@pytest.mark.parametrize("source", READING)
def test_a_template_that_reads_a_text_is_not_traced(source: str) -> None:
    with pytest.raises(UntraceableError):
        traced(source)


@pytest.mark.parametrize("source", WRITING)
@given(text=st.lists(st.sampled_from(["a", "x", "y", "z", " ", "</think>", "\n"])).map("".join))
def test_what_is_traced_is_what_is_rendered_under_its_conditions(source: str, text: str) -> None:
    from raytune_ft.data.templating.sandbox import renderer

    parts, conditions = traced(source)
    assert parts is not None
    texts = [text, "b"]
    if not text.strip() or not conditions.hold(texts):
        return
    messages = [{"role": "user", "content": text} for text in texts]
    written = "".join(part if isinstance(part, str) else texts[part] for part in parts)
    assert written == renderer(source).render({"messages": messages})


def test_conditions_are_what_the_template_asked() -> None:
    _, conditions = traced(WRITING[7])
    kinds = {("begins", "x"), ("equals", "y"), ("ends", "z")}
    assert conditions.never == {(0, kind, word) for kind, word in kinds}
    assert not conditions.stripped
    assert [conditions.hold([text]) for text in ("ayz.", "xa", "y", "az")] == [
        True, False, False, False,
    ]  # fmt: skip
    _, conditions = traced(WRITING[2])
    assert [conditions.hold([text]) for text in ("a b", " a", "a\n")] == [True, False, False]


def test_a_template_with_the_characters_of_slots_is_not_traced() -> None:
    with pytest.raises(UntraceableError):
        Tracer("\U000f0000{{ messages[0].content }}", {})
    with pytest.raises(UntraceableError):
        Tracer("{{ bos_token }}", {"bos_token": "\U000f0001"})


def test_a_refusal_is_a_refusal_for_all_texts() -> None:
    parts, _ = traced("{{ raise_exception('no') }}")
    assert parts is None


def test_a_shape_is_given_up_after_some_conversations(tokenizer: TextTokenizer) -> None:
    """One that the template reads in every conversation is not traced for each row again."""
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content | upper }}<|im_end|>{% endfor %}"
    template = ChatTemplate(
        TextTokenizer(dataclasses.replace(tokenizer.spec, chat_template=source))
    )
    tries = 0

    class Counting(Tracer):
        def trace(self, *args: object, **kwargs: object) -> tuple[str | int, ...] | None:
            nonlocal tries
            tries += 1
            return super().trace(*args, **kwargs)  # type: ignore[arg-type]

    shapes: Shapes = template._shapes
    shapes.__dict__["_tracer"] = Counting(source, {})
    for number in range(20):
        outcome(template, chat(f"q{number}", "a"), "assistant")
    assert 0 < tries <= 3
