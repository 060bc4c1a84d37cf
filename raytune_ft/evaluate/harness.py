"""Our model as lm-evaluation-harness asks one: texts in, log-likelihoods or texts out.

Texts become ids by our tokenizer and, where a chat template is asked for, by `encode_prompt`, as
in training and chat. Rules of the harness itself (which spaces belong to a continuation, what a
text without a context is conditioned on, how long texts are divided) are its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from raytune_ft.chat.model import ChatModel
from raytune_ft.data.encode import encode_segments
from raytune_ft.data.segments import Segment
from raytune_ft.data.templating.templates import PromptTemplate
from raytune_ft.model.answers import Drawing, answer_all
from raytune_ft.model.scoring import Ending, score

MAX_NEW_TOKENS = 256
"""Of an answer whose task sets no limit; the harness's own number."""

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Wish:
    """How a task wants its answers; equal ones are written side by side."""

    until: tuple[str, ...]
    max_new_tokens: int
    drawing: Drawing

    @classmethod
    def of(cls, asked: dict[str, Any]) -> Wish:
        """Read a task's `generation_kwargs`."""
        until = asked.get("until") or []
        temperature = float(asked.get("temperature") or 0.0)
        if not asked.get("do_sample", temperature > 0.0):
            temperature = 0.0
        return cls(
            tuple([until] if isinstance(until, str) else until),
            int(asked.get("max_gen_toks") or asked.get("max_new_tokens") or MAX_NEW_TOKENS),
            Drawing(temperature, float(asked.get("top_p", 1.0)), int(asked.get("top_k", 0))),
        )


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """Wraps what `raytune-ft chat` would open."""

    def __init__(self, chat: ChatModel, progress: Progress, seed: int = 0) -> None:
        super().__init__()
        self.chat, self.progress, self.seed = chat, progress, seed
        self.prompts: dict[str, list[int]] = {}
        """Ids of conversations, by the text that the harness knows them by."""

    @property
    def eot_token_id(self) -> int:
        return self.chat.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.chat.tokenizer.bos_ids
        return bos[0] if bos else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """Part of the names under which the harness keeps prompts."""
        return self.chat.tokenizer.content_hash

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return what the harness writes down as the template."""
        if not chat_template:
            return ""
        template = self.chat.template
        if isinstance(template, PromptTemplate):
            return repr(template)
        return self.chat.tokenizer.chat_template or ""

    def apply_chat_template(
        self, chat_history: Sequence[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as text, and keep its ids, which the text need not give again.

        Without `add_generation_prompt` the last message is the beginning of the answer.
        """
        messages = [dict(message) for message in chat_history]
        begun = "" if add_generation_prompt else messages.pop()["content"]
        ids = self.chat.encode(messages)
        if begun:
            ids = _behind(ids, begun, self.chat)
        text = self.chat.tokenizer.decode(ids, skip_special_tokens=False)
        self.prompts[text] = ids
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if string in self.prompts:
            return self.prompts[string]
        ids = self.chat.tokenizer.encode(string)
        start = list(self.chat.tokenizer.text_start_ids)
        if add_special_tokens is False or ids[: len(start)] == start:
            return ids
        return [*start, *ids]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context in self.prompts:
            ids = self.prompts[context]
            return ids, _behind(ids, continuation, self.chat)[len(ids) :]
        pair: tuple[list[int], list[int]] = super()._encode_pair(context, continuation)
        return pair

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        endings = [self._ending(context, wanted) for _, context, wanted in requests]
        different = list(dict.fromkeys(endings))
        scores = score(self.chat.model, different, progress=lambda *at: self.progress("score", *at))
        known = dict(zip(different, scores, strict=True))
        return [(known[ending].log_prob, known[ending].greedy) for ending in endings]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, in disjoint windows of the model's context."""
        counts, windows = [], []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.chat.context, 1)
            pairs = [make_disjoint_window(pair) for pair in found]
            counts.append(len(pairs))
            windows += [(None, context, wanted) for context, wanted in pairs]
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Write answers, cut before the first of the task's stop texts."""
        groups: dict[Wish, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(Wish.of(request.args[1]), []).append(place)
        texts: dict[int, str] = {}
        for wish, places in groups.items():
            contexts = [requests[place].args[0] for place in places]
            texts.update(zip(places, self._write(contexts, places, wish), strict=True))
            self.progress("write", len(texts), len(requests))
        return [texts[place] for place in range(len(requests))]

    def _write(self, contexts: Sequence[str], places: Sequence[int], wish: Wish) -> list[str]:
        room = max(1, self.chat.context - wish.max_new_tokens)
        decode = self.chat.tokenizer.decode
        answers = answer_all(
            self.chat.model,
            # what stands nearest to the answer counts most
            [self.tok_encode(context)[-room:] for context in contexts],
            stop_ids=self.chat.stop_ids,
            max_new_tokens=wish.max_new_tokens,
            drawing=wish.drawing,
            seeds=[self.seed + place for place in places],
            ends=lambda ids: any(stop in decode(ids) for stop in wish.until),
        )
        return [cut(decode(answer.ids), wish.until) for answer in answers]

    def _ending(self, context: list[int], wanted: list[int]) -> Ending:
        ids = [*context, *wanted][-(self.chat.context + 1) :]
        return Ending(tuple(ids), max(1, len(ids) - len(wanted)))


def cut(text: str, until: Sequence[str]) -> str:
    """Return what stands before the first of the stop texts."""
    places = [text.find(stop) for stop in until if stop and stop in text]
    return text[: min(places)] if places else text


def _behind(ids: list[int], text: str, chat: ChatModel) -> list[int]:
    """Return `ids` with a text that goes on behind them."""
    segments = [
        Segment("", tuple(ids), trained=False),
        Segment(text, None, trained=True, foreign=((0, len(text)),), follows=True),
    ]
    found: list[int] = encode_segments(segments, chat.tokenizer).input_ids.tolist()
    return found
