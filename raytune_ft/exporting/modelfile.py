"""Modelfile: how Ollama asks a GGUF file as training did (template, system text, ends of answers).

A prompt template is text around messages. It is read off renderings of marked messages, and more
renderings must come out of it: a template that is no such thing is left to the one inside the GGUF
file. Formats: https://docs.ollama.com/modelfile, and Go's text/template for the template.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from raytune_ft.data.segments import Message
from raytune_ft.data.templating.templates import Template, get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError

ROLES = {"s": "system", "u": "user", "a": "assistant"}
MARKS = {role: f"\u2402{role}\u2403" for role in ROLES.values()}
"""Stand for messages in a rendering; no template has these characters."""
CHECKED = ("u", "su", "uau", "suau", "uauau", "suauau")
"""Conversations, by roles, that the text around messages has to give again."""

Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class Around:
    """A template's text around messages."""

    start: str
    """Before everything, where there is no system text."""
    system: tuple[str, str]
    """Before and behind a system text, in place of `start`."""
    answer: str
    """Behind each question: what begins an answer."""
    again: str
    """Behind an answer and before the next question."""

    def render(self, messages: Sequence[Message]) -> str:
        """Write a conversation that is open for an answer."""
        texts = {message["role"]: message["content"] for message in messages}
        parts = [self.start]
        if "system" in texts:
            parts = [self.system[0], texts["system"], self.system[1]]
        turns = [message for message in messages if message["role"] != "system"]
        for number, message in enumerate(turns):
            if message["role"] == "assistant":
                parts.append(message["content"])
            else:
                parts += [self.again if number else "", message["content"], self.answer]
        return "".join(parts)

    def as_go(self, first: str) -> str:
        """Write it as Ollama reads it; `first` is what its engine puts before every prompt."""
        start, opening = self.start.removeprefix(first), self.system[0].removeprefix(first)
        return (
            "{{ $asked := false }}"
            f"{{{{ if .System }}}}{opening}{{{{ .System }}}}{self.system[1]}"
            f"{{{{ else }}}}{start}{{{{ end }}}}"
            "{{ range .Messages }}"
            f'{{{{ if eq .Role "user" }}}}{{{{ if $asked }}}}{self.again}{{{{ end }}}}'
            f"{{{{ $asked = true }}}}{{{{ .Content }}}}{self.answer}"
            '{{ else if eq .Role "assistant" }}{{ .Content }}{{ end }}'
            "{{ end }}"
        )


def write(gguf_name: str, template: str, system: str, tokenizer: TextTokenizer) -> tuple[str, bool]:
    """Return the Modelfile's text, and whether it has a template of its own.

    Args:
        gguf_name: of the file beside it.
        template: value of `model.template`.
        system: text that conversations without one begin with.
        tokenizer: of training.
    """
    bound = get_template(template, tokenizer)
    around = around_of(renderer(bound, tokenizer))
    lines = [f"FROM ./{gguf_name}"]
    if around is not None:
        lines.append(f'TEMPLATE """{around.as_go(first_text(bound, tokenizer))}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    for id_ in sorted({*bound.stop_ids, tokenizer.eos_id}):
        text = tokenizer.decode([id_], skip_special_tokens=False)
        lines.append(f"PARAMETER stop {json.dumps(text, ensure_ascii=False)}")
    return "\n".join(lines) + "\n", around is not None


def first_text(template: Template, tokenizer: TextTokenizer) -> str:
    """Return the start token's text where conversations begin with it, as plain texts do.

    An engine puts it before everything it reads, or before nothing.
    """
    text = tokenizer.decode(tokenizer.text_start_ids, skip_special_tokens=False)
    return text if renderer(template, tokenizer)(conversation("u")).startswith(text) else ""


def renderer(template: Template, tokenizer: TextTokenizer) -> Render:
    """Return what writes a conversation that is open for an answer, as training did, as text."""

    def render(messages: Sequence[Message]) -> str:
        return "".join(
            segment.text
            if segment.ids is None
            else tokenizer.decode(segment.ids, skip_special_tokens=False)
            for segment in template.segments(messages, add_generation_prompt=True)
        )

    return render


def around_of(render: Render) -> Around | None:
    """Read a template off its renderings; None if it is more than text around messages."""
    try:
        start = _cut(render(conversation("u")), "u")
        told = _cut(render(conversation("su")), "su")
        twice = _cut(render(conversation("uau")), "uau")
        if start is None or told is None or twice is None:
            return None
        found = Around(start[0], (told[0], told[1]), start[1], twice[2])
        texts = (found.start, *found.system, found.answer, found.again)
        if any(mark in text for text in texts for mark in ("{{", '"""')):
            return None
        asked = [conversation(roles) for roles in CHECKED]
        return found if all(found.render(m) == render(m) for m in asked) else None
    except DataError:  # it takes no system text, say
        return None


def conversation(roles: str) -> list[Message]:
    """Return marked messages of the roles that letters stand for."""
    return [{"role": ROLES[role], "content": MARKS[ROLES[role]]} for role in roles]


def _cut(text: str, roles: str) -> list[str] | None:
    """Return what stands around the marks of a rendering; None where one is missing."""
    parts = []
    for role in roles:
        before, found, text = text.partition(MARKS[ROLES[role]])
        if not found:
            return None
        parts.append(before)
    return [*parts, text]
