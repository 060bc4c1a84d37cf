"""Modelfiles: what Ollama would write is what training wrote.

Its templates are Go's; the few actions in ours have the same meaning in Jinja, which renders them
here, so that the text is read by an engine that is not ours.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import Environment

from raytune_ft.data.templating.templates import PROMPTS, get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.exporting import modelfile
from raytune_ft.exporting.modelfile import around_of, conversation, first_text, renderer

IN_JINJA = {
    "{{ $asked := false }}": "{% set at = namespace(asked=false) %}",
    "{{ if .System }}": "{% if system %}",
    "{{ .System }}": "{{ system }}",
    "{{ else }}": "{% else %}",
    "{{ range .Messages }}": "{% for message in messages %}",
    '{{ if eq .Role "user" }}': "{% if message.role == 'user' %}",
    '{{ else if eq .Role "assistant" }}': "{% elif message.role == 'assistant' %}",
    "{{ if $asked }}": "{% if at.asked %}",
    "{{ $asked = true }}": "{% set at.asked = true %}",
    "{{ .Content }}": "{{ message.content }}",
}
NO_PLAIN_TEXT = {"chatglm2"}
"""Its questions are numbered."""
TALKS = ("u", "su", "uau", "suau", "suauauau")


def in_jinja(text: str) -> str:
    """Translate; an `end` closes what was opened last."""
    for action, written in IN_JINJA.items():
        text = text.replace(action, written)
    opened, parts = [], text.split("{{ end }}")
    for number, part in enumerate(parts[:-1]):
        for word in part.split("{% ")[1:]:
            if word.startswith(("if ", "for ")):
                opened.append(word.split()[0])
        parts[number] = f"{part}{{% end{opened.pop()} %}}"
    assert not opened
    return "".join(parts)


def rendered(template: str, roles: str) -> str:
    messages = conversation(roles)
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    engine = Environment(autoescape=False, keep_trailing_newline=True)
    return engine.from_string(in_jinja(template)).render(messages=messages, system=system)


@pytest.mark.parametrize("name", ["tokenizer", *PROMPTS])
def test_ollama_writes_what_training_wrote(tiny_model: Path, name: str) -> None:
    tokenizer = TextTokenizer.from_folder(tiny_model)
    text, own = modelfile.write("it.gguf", name, "be kind", tokenizer)
    lines = text.splitlines()
    assert lines[0] == "FROM ./it.gguf"
    assert 'SYSTEM """be kind"""' in lines
    assert 'PARAMETER stop "<|im_end|>"' in lines
    assert own is (name not in NO_PLAIN_TEXT)
    assert own is ("TEMPLATE" in text)
    if not own:
        return
    template = text.partition('TEMPLATE """')[2].partition('"""')[0]
    bound = get_template(name, tokenizer)
    render, first = renderer(bound, tokenizer), first_text(bound, tokenizer)
    for roles in TALKS:
        # the engine puts the start token before what it is given
        assert first + rendered(template, roles) == render(conversation(roles)), roles


def test_a_template_that_is_more_than_text_is_left_alone() -> None:
    """One that counts, one that drops early answers, and one that takes no system text."""

    def counts(messages: object) -> str:
        assert isinstance(messages, list)
        return "".join(f"{i}{m['content']}" for i, m in enumerate(messages))

    def forgets(messages: object) -> str:
        assert isinstance(messages, list)
        return "".join(m["content"] + "|" for m in messages[-2:])

    assert around_of(counts) is None
    assert around_of(forgets) is None
    braces = around_of(lambda messages: "".join("{{" + m["content"] for m in messages))
    assert braces is None
