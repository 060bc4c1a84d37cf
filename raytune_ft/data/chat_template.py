"""The model's own chat template, rendered in Jinja's immutable sandbox.

Chat templates do not mark what the assistant said. Answers are found by rendering prefixes: what a
conversation's text has more than the prompt before it, up to its end-of-turn token, is trained.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from raytune_ft.data.segments import Message, Segment, is_text, text_segments
from raytune_ft.data.tokenizer import TextTokenizer
from raytune_ft.errors import DataError, ModelError, RaytuneError


class ChatTemplate:
    """Template `tokenizer`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        try:
            self._template = _environment().from_string(tokenizer.chat_template or "")
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template cannot be read: {error}") from None
        eos = tokenizer.named_tokens.get("eos_token")
        texts = {*tokenizer.special_tokens, *([eos] if eos else [])}
        longest_first = sorted(texts, key=lambda text: (-len(text), text))
        self._special = re.compile("|".join(map(re.escape, longest_first))) if texts else None
        ends = {tokenizer.eos_id, *tokenizer.extra_stop_ids}
        self.stop_ids = frozenset(ends | self._end_of_turn())

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> list[Segment]:
        """Render a conversation and cut it at the answers.

        Raises:
            DataError: the template refuses these messages.
            ModelError: the template fails, or rewrites earlier turns, so that no answer could be
                trained as it is later prompted.
        """
        if is_text(messages) and not add_generation_prompt:
            tokenizer = self._tokenizer
            return text_segments(messages[0]["content"], tokenizer.bos_ids, tokenizer.eos_id)
        segments: list[Segment] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self.render(messages[:index], add_generation_prompt=True)
            segments.append(Segment(_after(prompt, done), None, trained=False))
            full = self.render(messages[: index + 1], add_generation_prompt=False)
            rest = _after(full, prompt)
            end = self._end(rest, message["content"])
            answer = rest[:end]
            segments.append(Segment(answer, None, trained=True))
            if end is None:
                # A template that never ends a turn would teach the model never to stop.
                segments.append(Segment("", (self._tokenizer.eos_id,), trained=True))
            done = prompt + answer
        if add_generation_prompt:
            prompt = self.render(messages, add_generation_prompt=True)
            segments.append(Segment(_after(prompt, done), None, trained=False))
        return segments

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        """Return the text of a conversation, with the variables that transformers provides."""
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,
                documents=None,
                **self._tokenizer.named_tokens,
            )
        except RaytuneError:
            raise
        except Exception as error:  # a template is foreign code: it may raise anything
            raise ModelError(
                f"the model's chat template fails: {type(error).__name__}: {error}; "
                "set model.template to a prompt template"
            ) from None

    def _end(self, rest: str, content: str) -> int | None:
        """Find where an answer ends in `rest`: after the first special token behind its content."""
        start = 0
        for text in (content, content.strip()):
            if text and text in rest:
                start = rest.index(text) + len(text)
                break
        found = self._special.search(rest, start) if self._special else None
        return found.end() if found else None

    def _end_of_turn(self) -> set[int]:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            answer = self.segments(turn, add_generation_prompt=False)[1]
        except RaytuneError:
            return set()
        last = self._tokenizer.encode(answer.text)[-1:]
        return set(last) & set(self._tokenizer.special_tokens.values())


def _after(text: str, prefix: str) -> str:
    if not text.startswith(prefix):
        raise ModelError(
            "the model's chat template rewrites earlier text when a turn is added, so answers "
            "cannot be trained as they are prompted; set model.template to a prompt template"
        )
    return text[len(prefix) :]


class _Generation(Extension):
    """Accept `{% generation %}...{% endgeneration %}` and render its body."""

    tags = {"generation"}  # noqa: RUF012  the base class's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Replace the block by its body."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    # No strftime_now: a date in the system text would make a resumed run another run.
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise DataError(f"the model's chat template refuses the messages: {message}")
