"""Answers written side by side are those that each prompt gets alone."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from raytune_ft.errors import RecipeError
from raytune_ft.model import answers
from raytune_ft.model.answers import Drawing, answer_all
from raytune_ft.model.families.alibi import AlibiLlamaModel
from raytune_ft.model.generate import stream_ids

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip


class AlibiLlama(LlamaForCausalLM):  # type: ignore[misc]
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = AlibiLlamaModel(config)


def model_of(kind: str) -> PreTrainedModel:
    """Rotary positions, ALiBi, a window over the last 8 tokens, and layers of both kinds."""
    torch.manual_seed(3)
    made = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "alibi": lambda: AlibiLlama(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})),
        "window": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=8)),
        "mixed": lambda: Gemma2ForCausalLM(
            Gemma2Config(**SHAPE, head_dim=8, sliding_window=8, tie_word_embeddings=False)
        ),
    }
    model: PreTrainedModel = made[kind]()
    with torch.no_grad():  # an untrained model repeats one word; wider logits make texts of it
        model.get_output_embeddings().weight.normal_(std=0.3)
    return model.train()


def prompts(count: int = 7) -> list[list[int]]:
    """Ragged: 1 to 31 tokens."""
    generator = torch.Generator().manual_seed(9)
    lengths = [12, 1, 31, 5, 12, 20, 3, 17, 9][:count]
    return [torch.randint(2, 97, (n,), generator=generator).tolist() for n in lengths]


def one_by_one(model: PreTrainedModel, stops: set[int], **how: Any) -> list[list[int]]:
    seeds = how.pop("seeds", [None] * len(prompts()))
    return [
        list(stream_ids(model, prompt, stop_ids=stops, max_new_tokens=24, seed=seed, **how))
        for prompt, seed in zip(prompts(), seeds, strict=True)
    ]


@pytest.mark.parametrize("kind", ["llama", "alibi", "window", "mixed"])
def test_answers_are_those_that_each_prompt_gets_alone(kind: str) -> None:
    model = model_of(kind)
    free = one_by_one(model, set())
    # ids that end some answers early and others never, so that rows leave the batch on the way
    stops = {ids[place] for ids, place in zip(free, (3, 5, 11), strict=False)}
    alone = one_by_one(model, stops)
    together = answer_all(model, prompts(), stop_ids=stops, max_new_tokens=24)
    assert [answer.ids for answer in together] == alone
    assert len({len(ids) for ids in alone}) > 2, "the test wants answers of differing lengths"
    for answer, ids in zip(together, alone, strict=True):
        assert answer.stopped == ("length" if len(ids) == 24 else "end")


def test_drawn_answers_are_those_of_their_seeds_wherever_they_stand() -> None:
    model = model_of("llama")
    how = {"temperature": 0.9, "top_p": 0.8, "top_k": 40}
    seeds = [11, 12, 13, 14, 15, 16, 17]
    alone = one_by_one(model, {5}, seeds=seeds, **how)
    drawn = answer_all(
        model, prompts(), stop_ids={5}, max_new_tokens=24, drawing=Drawing(**how), seeds=seeds
    )
    assert [answer.ids for answer in drawn] == alone
    likeliest = one_by_one(model, {5})
    assert alone != likeliest, "drawn, not the likeliest"
    some: list[int | None] = [None if place % 2 else seed for place, seed in enumerate(seeds)]
    mixed = answer_all(
        model, prompts(), stop_ids={5}, max_new_tokens=24, drawing=Drawing(**how), seeds=some
    )
    expected = [(likeliest if place % 2 else alone)[place] for place in range(len(seeds))]
    assert [answer.ids for answer in mixed] == expected


def test_batches_of_other_sizes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    whole = answer_all(model, prompts(), stop_ids={5}, max_new_tokens=12)
    monkeypatch.setattr(answers, "ROWS_AT_ONCE", 3)
    assert answer_all(model, prompts(), stop_ids={5}, max_new_tokens=12) == whole


def test_the_models_context_ends_an_answer_and_refuses_a_prompt() -> None:
    model = model_of("llama")
    long = [[7] * 90, [8] * 3, [9] * 96]
    found = answer_all(model, long, stop_ids=set(), max_new_tokens=10)
    assert [len(answer.ids) for answer in found] == [6, 10, 0]
    assert {answer.stopped for answer in found} == {"length"}
    with pytest.raises(RecipeError, match="97 tokens, and the model's context is 96"):
        answer_all(model, [[7] * 97], stop_ids=set(), max_new_tokens=1)
    assert answer_all(model, [], stop_ids=set(), max_new_tokens=1) == []


def test_an_own_rule_ends_an_answer_with_the_id_that_met_it() -> None:
    model = model_of("llama")
    free = [answer.ids for answer in answer_all(model, prompts(3), stop_ids=(), max_new_tokens=9)]
    found = answer_all(
        model, prompts(3), stop_ids=(), max_new_tokens=9, ends=lambda ids: len(ids) == 4
    )
    assert [(a.ids, a.stopped) for a in found] == [(ids[:4], "end") for ids in free]


def test_training_goes_on_as_if_nobody_had_asked() -> None:
    """Modes, recomputation, torch's random state and memory are as before."""
    model = model_of("llama")
    model.activation_checkpointing_enable({"use_reentrant": False})
    model.model.layers[1].eval()  # what was in evaluation stays there
    modes = [module.training for module in model.modules()]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    widths: list[int] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: widths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )

    def ask() -> int:
        drawing = Drawing(temperature=1.0)
        answer_all(model, prompts(2), stop_ids=(), max_new_tokens=5, drawing=drawing, seeds=[1, 2])
        gc.collect()
        return sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))

    first = ask()
    assert [ask() for _ in range(3)] == [first] * 3, "tensors are left behind"
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    # one token at a time behind the prompt: recomputation would have switched the cache off
    assert widths == [12, 1, 1, 1, 1] * 4


def test_quantised_weights_answer_alike(tiny_model: Path) -> None:
    from raytune_ft.config.schema import ModelSection
    from raytune_ft.model import loading

    section = ModelSection(path=str(tiny_model), quantization="nf4")
    model = loading.load_model(tiny_model, section, torch.device("cpu"))
    asked = [[5, 6, 7, 8, 9], [11, 12], [40] * 9]
    alone = [list(stream_ids(model, p, stop_ids=(), max_new_tokens=6)) for p in asked]
    found = answer_all(model, asked, stop_ids=(), max_new_tokens=6)
    assert [answer.ids for answer in found] == alone
