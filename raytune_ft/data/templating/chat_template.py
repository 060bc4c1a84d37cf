"""Template `tokenizer`: the model's own chat template, cut at the answers.

In: messages and tools. Out: segments; an answer is a segment with its end-of-turn token, the same
in training and as part of a later prompt. `answers` tells which rules its span follows.

Jinja's variables are those that transformers gives: messages, tools, documents, the named tokens
and add_generation_prompt; a call's arguments are objects, or text where a template wants text;
reasoning is called `thinking` too. `strftime_now` says 26 July 2024, always: see `sandbox`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from raytune_ft.data.segments import Loss, Message, Segment, is_text, text_segments
from raytune_ft.data.templating.answers import Answer, Ends, Locator
from raytune_ft.data.templating.renderings import Conversation
from raytune_ft.data.templating.sandbox import renderer
from raytune_ft.data.templating.shapes import Shapes
from raytune_ft.data.templating.signs import Rendered, Signs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError, RaytuneError

ROLES = ("system", "user", "assistant", "tool")
# What a template may see of a message; other fields of a row have no place in a conversation.
FIELDS = ("role", "content", "reasoning_content", "tool_calls", "name", "tool_call_id")


class ChatTemplate:
    """Template `tokenizer`."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._source = tokenizer.chat_template or ""
        self._renderer = renderer(self._source)
        ends = {tokenizer.eos_id, *tokenizer.extra_stop_ids}
        stops = {tokenizer.decode([id_], skip_special_tokens=False) for id_ in ends}
        eos = tokenizer.named_tokens.get("eos_token", "")
        self._ends = Ends(_any_of({*tokenizer.special_tokens, *stops, eos}), stops)
        self._literals = _any_of(self._renderer.literals)
        self._shapes = Shapes(self._source, tokenizer.named_tokens)
        self.thinks = "</think>" in self._source
        self.stop_ids = frozenset(ends | self._end_of_turn())

    def segments(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        loss: Loss = "assistant",
    ) -> list[Segment]:
        """Render a conversation and cut it at the answers.

        What follows the last answer is not rendered for training, and neither is what a template
        writes behind the last end of turn.

        Raises:
            DataError: the template refuses these messages, or cannot keep a text of theirs from
                being read as a special token.
            ModelError: the template fails, or an answer's span cannot be proved.
        """
        if is_text(messages) and not tools and not add_generation_prompt:
            tokenizer = self._tokenizer
            return text_segments(messages[0]["content"], tokenizer.bos_ids, tokenizer.eos_id)
        if add_generation_prompt or tools:
            return self._rendered(messages, tools, loss, add_generation_prompt)
        known = self._shapes.segments(messages, loss)
        if known is None:
            known = self._rendered(messages, (), loss, add_generation_prompt=False)
            self._shapes.learn(messages, loss, known)
        return known

    def _rendered(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        loss: Loss,
        add_generation_prompt: bool,
    ) -> list[Segment]:
        """Render a conversation as often as it takes; arguments and errors as in `segments`."""
        prepared = self._prepared(messages)
        answers = [i for i, message in enumerate(prepared) if message["role"] == "assistant"]
        if answers and not add_generation_prompt:
            prepared = prepared[: answers[-1] + 1]
        conversation = self._conversation(prepared, tools, prompting=add_generation_prompt)
        try:
            full = conversation.render()
            self._check_bare(conversation.bare)
            locator = Locator(conversation, full, self._ends)
            located: list[Answer] = []
            for index in answers:
                earliest = located[-1].end if located else 0
                located.append(locator.locate(index, earliest))
        except RecursionError:
            raise DataError("the messages are nested too deeply; simplify them") from None
        return self._cut(full, located, loss, open_end=add_generation_prompt or not answers)

    def _conversation(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], *, prompting: bool
    ) -> Conversation:
        signs = Signs.for_conversation(
            messages, tools, self._source, self._literals, self._ends.special
        )
        variables = self._tokenizer.named_tokens
        return Conversation(self._renderer, variables, messages, tools, signs, prompting=prompting)

    def _cut(
        self, full: Rendered, answers: Sequence[Answer], loss: Loss, *, open_end: bool
    ) -> list[Segment]:
        segments: list[Segment] = []
        done = 0
        for answer in answers:
            segments += _pieces(full, answer.message, [(done, answer.start, loss == "all")])
            chosen = loss != "last" or answer is answers[-1]
            parts = [(answer.start, answer.end, chosen)]
            if loss != "all" and full.generated:
                parts = _marked(full, answer, chosen)
            segments += _pieces(full, None, parts)
            if not answer.closed:
                # A template that never ends a turn would teach the model never to stop.
                segments.append(Segment("", (self._tokenizer.eos_id,), chosen))
            done = answer.end
        if open_end:
            segments += _pieces(full, None, [(done, len(full.text), loss == "all")])
        # one text for a model that knows the template: a cut puts no space into it
        return segments[:1] + [replace(segment, follows=True) for segment in segments[1:]]

    def _prepared(self, messages: Sequence[Message]) -> list[Message]:
        prepared = []
        for place, message in enumerate(messages, start=1):
            if message["role"] not in ROLES:
                raise DataError(
                    f"message {place} has role '{message['role']}'; roles are {', '.join(ROLES)}"
                )
            copy = {key: message[key] for key in FIELDS if message.get(key)}
            copy["content"] = message.get("content") or ""
            if "reasoning_content" in copy:
                copy["thinking"] = copy["reasoning_content"]
            if "tool_calls" in copy:
                copy["tool_calls"] = [
                    _with_arguments(call, self._arguments_as_text) for call in copy["tool_calls"]
                ]
            prepared.append(copy)
        return prepared

    def _check_bare(self, texts: Iterable[str]) -> None:
        """Refuse texts without signs that hold the words of a special token."""
        encode = self._tokenizer.encode
        joined = "\n".join(texts)
        if not joined or encode(joined) == encode(joined, foreign=((0, len(joined)),)):
            return
        found = next(
            (
                text
                for text in joined.split("\n")
                if encode(text) != encode(text, ((0, len(text)),))
            ),
            joined,
        )
        raise DataError(
            f"a text of the row holds {found[:60]!r}, which the model's chat template would take "
            "for its own; remove it from the row"
        )

    @cached_property
    def _arguments_as_text(self) -> bool:
        """Whether the template wants a call's arguments as JSON text: objects make it fail."""
        function = {"name": "f", "arguments": {"a": "b"}}
        call: dict[str, Any] = {"id": "call00001", "type": "function", "function": function}
        fails = []
        for as_text in (False, True):
            messages: list[Message] = [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [_with_arguments(call, as_text)],
                },
            ]
            conversation = self._conversation(messages, (), prompting=False)
            try:
                conversation.plain(2, False)
                fails.append(False)
            except RaytuneError:
                fails.append(True)
        return fails == [True, False]

    def _end_of_turn(self) -> set[int]:
        turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            segments = self.segments(turn, add_generation_prompt=False)
        except RaytuneError:
            return set()
        last = segments[-1]
        ids = last.ids or self._tokenizer.encode(last.text)
        return set(ids[-1:]) & set(self._tokenizer.special_tokens.values())


def _any_of(texts: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern of texts, the longest first."""
    ordered = sorted(set(texts) - {""}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, ordered))) if ordered else None


def _pieces(
    full: Rendered, not_yet: int | None, parts: Iterable[tuple[int, int, bool]]
) -> list[Segment]:
    """Make segments of spans (start, end, trained), without empty ones.

    `not_yet`: an answer's message, whose words the template has put into the prompt for it; there
    they are the template's.
    """
    segments = []
    for start, end, trained in parts:
        if start < end:
            foreign = tuple(
                (max(place.start, start) - start, min(place.end, end) - start)
                for place in full.places
                if place.start < end and start < place.end and place.owner != not_yet
            )
            segments.append(Segment(full.text[start:end], None, trained, foreign))
    return segments


def _marked(full: Rendered, answer: Answer, chosen: bool) -> list[tuple[int, int, bool]]:
    """Cut an answer where the template says that it is generated; its end of turn always is."""
    spans = [
        (max(start, answer.start), min(end, answer.reply_end))
        for start, end in full.generated
        if start < answer.reply_end and answer.start < end
    ]
    if not spans:
        return [(answer.start, answer.end, False)]
    if spans[-1][1] == answer.reply_end:
        spans[-1] = (spans[-1][0], answer.end)
    else:
        spans.append((answer.reply_end, answer.end))
    parts, done = [], answer.start
    for start, end in spans:
        parts += [(done, start, False), (start, end, chosen)]
        done = end
    return parts


def _with_arguments(call: Any, as_text: bool) -> Any:
    """Return a tool call with its arguments as JSON text or as an object."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], as_text)}
    arguments = call.get("arguments")
    if as_text and isinstance(arguments, Mapping):
        return {**call, "arguments": json.dumps(arguments, ensure_ascii=False)}
    if not as_text and isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            return call
        return {**call, "arguments": parsed} if isinstance(parsed, dict) else call
    return call
