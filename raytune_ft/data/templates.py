"""Templates: messages in, segments of text out, each trained or not.

Two kinds: XTuner v0.1.9's prompt templates, and `tokenizer`, the model's own chat template. Every
segment is tokenised on its own, so an answer has the same ids in training and in a later prompt.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from raytune_ft.data.chat_template import ChatTemplate
from raytune_ft.data.prompts import PROMPTS, SYSTEMS, Prompt
from raytune_ft.data.segments import Message, Segment, is_text, text_segments
from raytune_ft.data.tokenizer import TextTokenizer
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

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> list[Segment]:
        """Cut a conversation into segments; the last is open for an answer if asked."""
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

    def segments(
        self, messages: Sequence[Message], *, add_generation_prompt: bool
    ) -> list[Segment]:
        """Write each turn by the template; DataError if the roles make no turns."""
        if is_text(messages) and not add_generation_prompt:
            return text_segments(messages[0]["content"], self.bos_ids, self.eos_id)
        segments: list[Segment] = []
        for number, turn in enumerate(split_turns(messages), start=1):
            if self.bos_ids:
                segments.append(Segment("", self.bos_ids, trained=False))
            segments.append(Segment(self._input(turn, number), None, trained=False))
            if "assistant" in turn:
                segments.append(Segment(turn["assistant"], None, trained=True))
                segments.append(Segment("", (self.eos_id,), trained=True))
        return segments

    def _input(self, turn: Mapping[str, str], number: int) -> str:
        instruction = self.prompt.instruction
        if turn.get("user"):
            instruction = instruction.replace("{round}", str(number), 1)
            text = instruction.replace("{input}", turn["user"], 1)
        else:
            text = instruction.rpartition("{input}")[2]
        system = turn.get("system")
        return self.prompt.system.replace("{system}", system, 1) + text if system else text


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
