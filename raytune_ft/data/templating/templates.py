"""Templates: messages in, segments of text out, each trained or not.

Two kinds: XTuner v0.1.9's prompt templates, and `tokenizer`, the model's own chat template. Every
segment is tokenised on its own, so an answer has the same ids in training and in a later prompt.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from raytune_ft.data.segments import (
    Loss,
    Message,
    Segment,
    is_text,
    text_segments,
    whole,
)
from raytune_ft.data.templating.chat_template import ChatTemplate
from raytune_ft.data.templating.prompts import PROMPTS, SYSTEMS, Prompt
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError, ModelError, RecipeError

__all__ = [
    "PROMPTS",
    "SYSTEMS",
    "Message",
    "Prompt",
    "Segment",
    "Template",
    "get_template",
    "template_names",
]

TOKENIZER = "tokenizer"


class Template(Protocol):
    """How a conversation is written for a model."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an answer."""
        ...

    @property
    def thinks(self) -> bool:
        """Whether it has words for reasoning, between think tags in front of an answer."""
        ...

    def segments(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        loss: Loss = "assistant",
    ) -> list[Segment]:
        """Cut a conversation into segments.

        Args:
            messages: the conversation.
            add_generation_prompt: leave it open for an answer.
            tools: what the assistant may call, JSON schemas in OpenAI's form.
            loss: which segments are trained: every answer with its end, the last one, or all the
                text but what opens a turn (bos).
        """
        ...


def template_names() -> list[str]:
    """Return every value that `model.template` may have."""
    return [TOKENIZER, *PROMPTS]


def get_template(name: str, tokenizer: TextTokenizer) -> Template:
    """Bind a template to a tokenizer.

    Raises:
        RecipeError: no template has this name; the nearest one is named.
        ModelError: `tokenizer` is asked for and the model has no chat template.
    """
    if name == TOKENIZER:
        if tokenizer.chat_template is None:
            raise ModelError(
                "model.template 'tokenizer': this model has no chat template; "
                f"choose one of: {', '.join(PROMPTS)}"
            )
        return ChatTemplate(tokenizer)
    if name not in PROMPTS:
        near = difflib.get_close_matches(name, template_names(), n=1, cutoff=0.6)
        hint = f"did you mean '{near[0]}'?" if near else f"choose: {', '.join(template_names())}"
        raise RecipeError(f"model.template: no template '{name}'; {hint}")
    prompt = PROMPTS[name]
    known = [tokenizer.token_id(text) for text in prompt.stops]
    stops = {
        tokenizer.eos_id,
        *tokenizer.extra_stop_ids,
        *(id_ for id_ in known if id_ is not None),
    }
    return PromptTemplate(prompt, tokenizer.bos_ids, tokenizer.eos_id, frozenset(stops))


@dataclass(frozen=True)
class PromptTemplate:
    """XTuner's rule: bos, input, output, eos in every turn; loss on output and eos."""

    prompt: Prompt
    bos_ids: tuple[int, ...]
    eos_id: int
    stop_ids: frozenset[int]

    @property
    def thinks(self) -> bool:
        """None of XTuner's templates has words for reasoning."""
        return False

    def segments(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        loss: Loss = "assistant",
    ) -> list[Segment]:
        """Write each turn by the template.

        Raises:
            DataError: the roles make no turns, or there is something that XTuner v0.1.9's templates
                have no words for: tools, their calls and results, and reasoning.
        """
        check_plain(messages, tools)
        if is_text(messages) and not add_generation_prompt:
            return text_segments(messages[0]["content"], self.bos_ids, self.eos_id)
        segments: list[Segment] = []
        turns = split_turns(messages)
        for number, turn in enumerate(turns, start=1):
            if self.bos_ids:
                segments.append(Segment("", self.bos_ids, trained=False))
            segments.append(self._input(turn, number, trained=loss == "all"))
            if "assistant" in turn:
                trained = loss != "last" or not any("assistant" in t for t in turns[number:])
                answer = turn["assistant"]
                segments.append(Segment(answer, None, trained, whole(answer)))
                segments.append(Segment("", (self.eos_id,), trained))
        return segments

    def _input(self, turn: Mapping[str, str], number: int, *, trained: bool) -> Segment:
        """Write system text and question; braces in them stay as they are."""
        system, user = turn.get("system"), turn.get("user")
        before, _, after = self.prompt.instruction.partition("{input}")
        parts: list[tuple[str, bool]] = []
        if system:
            head, _, tail = self.prompt.system.partition("{system}")
            parts += [(head, False), (system, True), (tail, False)]
        if user:
            before = before.replace("{round}", str(number), 1)
            parts += [(before, False), (user, True)]
        parts.append((after, False))
        text, foreign = "", []
        for part, is_foreign in parts:
            if is_foreign:
                foreign.append((len(text), len(text) + len(part)))
            text += part
        return Segment(text, None, trained, tuple(foreign))


def check_plain(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what only a model's own chat template has words for; DataError, one line."""
    advice = "set model.template: tokenizer"
    if tools:
        raise DataError(f"a prompt template has no words for tools; {advice}, or leave them out")
    for place, message in enumerate(messages, start=1):
        for key in ("tool_calls", "reasoning_content"):
            if message.get(key):
                raise DataError(
                    f"message {place} has {key}, which a prompt template has no words for; "
                    f"{advice}, or leave it out"
                )
        if message["role"] == "tool":
            raise DataError(
                f"message {place} has role 'tool', which a prompt template has no words for; "
                f"{advice}"
            )


def split_turns(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Group messages into turns of at most one system, user and assistant text, in this order.

    Raises:
        DataError: a role comes twice in a turn, or in another order.
    """
    order = ("system", "user", "assistant")
    turns: list[dict[str, str]] = []
    for place, message in enumerate(messages, start=1):
        role = message["role"]
        if role not in order:
            raise DataError(f"message {place} has role '{role}'; roles are {', '.join(order)}")
        if not turns or "assistant" in turns[-1]:
            turns.append({})
        elif any(order.index(role) <= order.index(earlier) for earlier in turns[-1]):
            raise DataError(
                f"message {place} is another '{role}' before an answer; "
                "'user' and 'assistant' take turns"
            )
        turns[-1][role] = message["content"]
    return turns
