"""Shapes: what a chat template does for one conversation, known for all others like it.

In: conversations of plain texts, and how the first of each shape was cut. Out: the segments of the
next ones without a rendering, or None where that is not proved to give the same.

A shape is the roles in turn and which answers are learned. `tracing` proves that what the template
writes for a shape are the same literals around the texts, whatever these are, under conditions
that are looked at for every row. `answers` decides spans by comparing renderings; here it is made
sure that each comparison that it makes is one of literals: the prompt for an answer is a prefix of
the whole, slot by slot, and so is what the template writes if the conversation ended there, behind
which no text stands. Then the spans of all conversations of the shape lie at the same literals.
A template that rewrites earlier turns, or reads texts, keeps its renderings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raytune_ft.data.segments import Loss, Message, Segment
from raytune_ft.data.templating.renderings import GOES_ON
from raytune_ft.data.templating.signs import PRIVATE
from raytune_ft.data.templating.tracing import (
    MOST_SLOTS,
    Conditions,
    Part,
    Tracer,
    UntraceableError,
)

Key = tuple[tuple[str, ...], Loss]

MOST_SHAPES = 4096
MOST_CHARACTERS = 2**20
"""Longer conversations are rendered, so that the sandbox's limits are those of the rendering."""
ATTEMPTS = 3
"""Conversations of a shape that are tried before it is given up: it may have been their words."""


@dataclass(frozen=True)
class Piece:
    """One segment: `ready` if it has no text of a row, else its parts."""

    ready: Segment | None
    parts: tuple[Part, ...] = ()
    trained: bool = False
    follows: bool = False
    foreign: frozenset[int] = frozenset()
    """Places in `parts` of slots that are a row's own."""

    def segment(self, texts: Sequence[str]) -> Segment:
        """Write the segment with texts in its slots."""
        if self.ready is not None:
            return self.ready
        written: list[str] = []
        spans: list[tuple[int, int]] = []
        length = 0
        for place, part in enumerate(self.parts):
            text = part if isinstance(part, str) else texts[part]
            if place in self.foreign:
                spans.append((length, length + len(text)))
            length += len(text)
            written.append(text)
        return Segment("".join(written), None, self.trained, tuple(spans), self.follows)


@dataclass(frozen=True)
class Plan:
    """The segments of a shape."""

    pieces: tuple[Piece, ...]
    conditions: Conditions

    def segments(self, texts: Sequence[str]) -> list[Segment] | None:
        """Write texts; None if they do not fulfil the conditions."""
        if not self.conditions.hold(texts):
            return None
        return [piece.segment(texts) for piece in self.pieces]


class Shapes:
    """The shapes of one chat template that have been seen."""

    def __init__(self, source: str, variables: Mapping[str, Any]) -> None:
        """Take a template and what it may see beside the conversation; `Tracer` says more."""
        self._template = (source, variables)
        self._plans: dict[Key, Plan | int] = {}

    def segments(self, messages: Sequence[Message], loss: Loss) -> list[Segment] | None:
        """Return the segments of a conversation; None if it has to be rendered."""
        found = _shape(messages) if self._plans else None
        if found is None:
            return None
        roles, texts = found
        plan = self._plans.get((roles, loss))
        return plan.segments(texts) if isinstance(plan, Plan) else None

    def learn(self, messages: Sequence[Message], loss: Loss, segments: Sequence[Segment]) -> None:
        """Learn a shape from a conversation that was rendered, and its segments."""
        found = _shape(messages)
        if found is None or self._tracer is None or len(self._plans) >= MOST_SHAPES:
            return
        roles, texts = found
        known = self._plans.get((roles, loss), 0)
        if isinstance(known, Plan) or known >= ATTEMPTS:
            return
        plan: Plan | None = None
        with suppress(UntraceableError):
            plan = _plan(self._tracer, roles, texts, segments)
        self._plans[roles, loss] = known + 1 if plan is None else plan

    @cached_property
    def _tracer(self) -> Tracer | None:
        """The template, compiled for slots; chat and serving never need it."""
        with suppress(UntraceableError):
            return Tracer(*self._template)
        return None


def _shape(messages: Sequence[Message]) -> tuple[tuple[str, ...], list[str]] | None:
    """Return roles and texts up to the last answer; None if there is more than plain texts."""
    roles: list[str] = []
    texts: list[str] = []
    for message in messages:
        role, text = message.get("role"), message.get("content")
        if len(message) != 2 or not isinstance(role, str) or not isinstance(text, str):
            return None
        roles.append(role)
        texts.append(text)
    while roles and roles[-1] != "assistant":
        roles.pop()
        texts.pop()
    if not roles or len(roles) > MOST_SLOTS or sum(map(len, texts)) > MOST_CHARACTERS:
        return None
    for text in texts:
        if not text.strip() or (not text.isascii() and PRIVATE.search(text)):
            return None
    return tuple(roles), texts


def _plan(
    tracer: Tracer, roles: Sequence[str], texts: Sequence[str], segments: Sequence[Segment]
) -> Plan | None:
    """Generalise segments; None, or UntraceableError, where nothing is proved."""
    conditions = Conditions()
    messages = [{"role": role, "content": tracer.slot(i)} for i, role in enumerate(roles)]
    whole = tracer.trace(messages, conditions, add_generation_prompt=False)
    if whole is None or not set(range(len(roles))) <= set(whole):
        return None
    for index, role in enumerate(roles):
        if role == "assistant" and not _fixed(tracer, messages, index, whole, conditions):
            return None
    pieces = _pieces(whole, texts, segments)
    plan = None if pieces is None else Plan(pieces, conditions)
    return plan if plan is not None and plan.segments(texts) == list(segments) else None


def _fixed(
    tracer: Tracer,
    messages: Sequence[Message],
    index: int,
    whole: Sequence[Part],
    conditions: Conditions,
) -> bool:
    """Tell whether `answers.Locator` finds an answer by literals alone."""
    prompt = tracer.trace(messages[:index], conditions, add_generation_prompt=True)
    if prompt is None or not _is_prefix(prompt, whole):
        return False
    is_last = index == len(messages) - 1
    going_on = [*messages, GOES_ON] if is_last else messages[: index + 1]
    other = tracer.trace(going_on, conditions, add_generation_prompt=False)
    if other is None:
        return is_last
    behind = len(whole) - list(reversed(whole)).index(index)
    same = other[:behind] == tuple(whole[:behind])
    return same and all(isinstance(part, str) for part in other[behind:])


def _is_prefix(parts: Sequence[Part], whole: Sequence[Part]) -> bool:
    """Tell whether a text begins another one, whatever stands in their slots."""
    if not parts:
        return True
    *first, last = parts
    if len(parts) > len(whole) or first != list(whole[: len(first)]):
        return False
    there = whole[len(first)]
    if isinstance(last, str) and isinstance(there, str):
        return there.startswith(last)
    return last == there


def _pieces(
    whole: Sequence[Part], texts: Sequence[str], segments: Sequence[Segment]
) -> tuple[Piece, ...] | None:
    """Cut the whole as one conversation of its shape was cut; None if that is inside a text."""
    cutter = _Cutter(whole, texts)
    pieces: list[Piece] = []
    for segment in segments:
        if segment.ids is not None:
            pieces.append(Piece(segment))
            continue
        parts = cutter.take(len(segment.text))
        if parts is None:
            return None
        if all(isinstance(part, str) for part in parts):
            pieces.append(Piece(segment))
            continue
        spans = set(segment.foreign)
        foreign = frozenset(
            place for place, span in enumerate(_spans(parts, texts))
            if isinstance(parts[place], int) and span in spans
        )  # fmt: skip
        pieces.append(Piece(None, parts, segment.trained, segment.follows, foreign))
    return tuple(pieces)


def _spans(parts: Sequence[Part], texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    done = 0
    for part in parts:
        length = len(part if isinstance(part, str) else texts[part])
        yield done, done + length
        done += length


class _Cutter:
    """Takes parts off the beginning of a whole by numbers of characters."""

    def __init__(self, whole: Sequence[Part], texts: Sequence[str]) -> None:
        self._rest = list(reversed(whole))
        self._texts = texts

    def take(self, n_characters: int) -> tuple[Part, ...] | None:
        """Return the parts of the next characters; None if they end inside a slot."""
        taken: list[Part] = []
        while n_characters:
            if not self._rest:
                return None
            part = self._rest.pop()
            length = len(part if isinstance(part, str) else self._texts[part])
            if length > n_characters:
                if not isinstance(part, str):
                    return None
                self._rest.append(part[n_characters:])
                part = part[:n_characters]
            taken.append(part)
            n_characters -= min(length, n_characters)
        return tuple(taken)
