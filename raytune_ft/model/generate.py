"""Generation: prompt ids in, new ids out one by one, with a key-value cache.

An own loop of one page, because an answer must stop within one token when nobody reads it any
more, and because each request brings its own random state.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from raytune_ft.errors import RecipeError
from raytune_ft.model.decoding import Decoder, Graphs
from raytune_ft.model.loss import causal_model

Choose = Callable[[torch.Tensor], int]


def stream_ids(
    model: nn.Module,
    prompt_ids: Sequence[int],
    *,
    stop_ids: Collection[int],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    cancelled: Callable[[], bool] | None = None,
    repetition_penalty: float = 1.0,
    graphs: Graphs | None = None,
    choose: Choose | None = None,
) -> Iterator[int]:
    """Yield new token ids; a stop id ends the answer and is not yielded.

    Args:
        model: a causal language model, quantised or not, with or without an adapter.
        prompt_ids: at least one id.
        stop_ids: ids that end the answer.
        max_new_tokens: ids at most; the model's context may end the answer earlier.
        temperature: 0 takes the likeliest token; else logits are divided by it.
        top_p: keep the likeliest tokens up to this share of probability; 1 keeps all.
        top_k: keep this many tokens; 0 keeps all.
        seed: of this answer's own random state; none: a fresh one.
        cancelled: asked before each token.
        repetition_penalty: above 1 makes tokens that occurred less likely.
        graphs: of this model, which the caller keeps from answer to answer; none: of this one.
        choose: takes float32 logits (1, V) and returns the id, instead of all rules above.

    Raises:
        RecipeError: the prompt is empty or longer than the model's context.
    """
    room = room_for(model, len(prompt_ids))
    # checks run at the call, not at the first token
    return _stream(
        model,
        list(prompt_ids),
        frozenset(stop_ids),
        min(max_new_tokens, room),
        _by_logits(choose)
        or _Sampler(device_of(model), temperature, top_p, top_k, seed, repetition_penalty).choose,
        cancelled or _never,
        graphs,
    )


def logits_processors(
    temperature: float, top_p: float, top_k: int, repetition_penalty: float = 1.0
) -> Any:
    """Return transformers' processors of logits; those of drawing only above temperature 0."""
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors: Any = LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature <= 0.0:
        return processors
    processors.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(TopPLogitsWarper(top_p))
    return processors


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and recomputation off for a while, without gradients.

    Not inference_mode: bitsandbytes keeps what it makes, and training needs it later.
    """
    training = _training_modules(model)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


class _Sampler:
    """Choose a token from logits, with transformers' own processors."""

    def __init__(
        self,
        device: torch.device,
        temperature: float,
        top_p: float,
        top_k: int,
        seed: int | None,
        repetition_penalty: float,
    ) -> None:
        self.greedy = temperature <= 0.0
        self.processors = logits_processors(temperature, top_p, top_k, repetition_penalty)
        if self.greedy:
            return
        self.generator = torch.Generator(device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)

    def choose(self, seen: torch.Tensor, logits: torch.Tensor) -> int:
        """Return the next id for `seen` (1, n) and float32 `logits` (1, V)."""
        scores = self.processors(seen, logits)
        if self.greedy:
            return int(scores.argmax(-1))
        probabilities = scores.softmax(-1)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def _by_logits(choose: Choose | None) -> Callable[[torch.Tensor, torch.Tensor], int] | None:
    return None if choose is None else lambda _seen, logits: choose(logits)


def _stream(
    model: nn.Module,
    prompt_ids: list[int],
    stop_ids: frozenset[int],
    limit: int,
    choose: Callable[[torch.Tensor, torch.Tensor], int],
    cancelled: Callable[[], bool],
    graphs: Graphs | None,
) -> Iterator[int]:
    lent = graphs or Graphs()
    decoder = Decoder(model, [prompt_ids], limit, lent)
    seen = decoder.ids
    training = _training_modules(model)
    try:
        for _ in range(limit):
            if cancelled():
                return
            if model.training:  # asked each time: the caller may have trained between two ids
                model.eval()
            # not inference_mode: bitsandbytes keeps what it makes, and training needs it later
            with torch.no_grad():
                chosen = choose(seen, decoder.logits())
            if chosen in stop_ids:
                return
            decoder.append([chosen])
            seen = torch.cat([seen, decoder.ids], dim=1)
            yield chosen
    finally:
        for module in training:
            module.training = True
        decoder.close()
        if graphs is None:
            lent.close()


def room_for(model: nn.Module, n_prompt: int) -> int:
    """Return how many ids may follow a prompt; RecipeError if it is empty or too long itself."""
    if n_prompt == 0:
        raise RecipeError("prompt: no tokens; give a message")
    config = causal_model(model).config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    if context is None:
        return 2**31
    if n_prompt > context:
        raise RecipeError(
            f"prompt: {n_prompt} tokens, and the model's context is {context}; shorten it"
        )
    return int(context) - n_prompt


def _training_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if module.training]


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's first weight is."""
    return next(model.parameters()).device


def _never() -> bool:
    return False
