"""Automatic layouts: never over the memory there is, never slower with more; what layers keep."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.config import catalog
from raytune_ft.config.estimates.footprint import Counts, count
from raytune_ft.config.estimates.layout import (
    FILLED,
    STEP_DOWN,
    Choice,
    Layout,
    asked,
    choose,
    hosted_layouts,
    layouts,
    own_layout,
    smallest,
    weigh,
    weighed,
)
from raytune_ft.config.estimates.pace import DEVICES
from raytune_ft.config.estimates.peak import GPU_CONTEXT, kept_of_layers, memory_bytes
from raytune_ft.config.estimates.setting import LADDER, STATE_PART, Setting
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe

GIB = 2**30
H200 = DEVICES["h200"]
QLORA, FULL = "internlm_7b_qlora_oasst1_e3", "qwen3_8b_full_oasst1_e3"
NAMES = (QLORA, "llama2_7b_qlora_oasst1_512_e3", FULL)


def of(name: str, *words: str) -> tuple[Recipe, Counts]:
    recipe = load_recipe(name, list(words))
    shape = catalog.card_config(recipe.model.path)
    assert shape is not None
    return recipe, count(shape, recipe)


def taken(recipe: Recipe, counts: Counts, layout: Layout) -> int:
    """What the plan counts for a layout, apart from the search."""
    fixed = layout.applied(recipe, counts.layers)
    way: dict[str, Any] = {"resident": layout.resident, "hosted": layout.hosted}
    return sum(memory_bytes(fixed, counts, on_gpu=True, **way).values())


@settings(max_examples=15, deadline=None)
@given(
    name=st.sampled_from(NAMES), gib=st.floats(2, 160), more=st.floats(1, 3),
    path=st.sampled_from(["auto", "false"]),
)  # fmt: skip
def test_more_memory_is_never_slower_and_never_overfilled(
    name: str, gib: float, more: float, path: str
) -> None:
    recipe, counts = of(name, f"model.fast_path={path}")
    least = smallest(weighed(recipe, counts, H200))
    small, large = (choose(recipe, counts, int(size * GIB), H200) for size in (gib, gib * more))
    for choice in (small, large):
        assert choice.memory == taken(recipe, counts, choice.layout)
        assert choice.memory <= choice.available * FILLED or choice.layout == least.layout
        assert choice.layout.micro_batch_size * choice.layout.accumulation == 16
        assert choice.layout.applied(recipe, counts.layers).global_batch_size == 16
    if small.memory <= small.available * FILLED:
        assert large.seconds <= small.seconds


@pytest.mark.parametrize("gib", [8, 24, 80, 139.8])
def test_what_comes_after_a_layout_takes_clearly_less(gib: float) -> None:
    recipe, counts = of(QLORA)
    choice = choose(recipe, counts, int(gib * GIB), H200)
    sizes = [choice.memory, *(taken(recipe, counts, one) for one in choice.smaller)]
    for before, after in pairwise(sizes[:-1]):
        assert after <= before * STEP_DOWN
    least = smallest(weighed(recipe, counts, H200))
    assert sizes == sorted(set(sizes), reverse=True)
    assert [choice.layout, *choice.smaller][-1] == least.layout


@pytest.mark.parametrize("path", ["auto", "false"])
def test_each_layer_more_takes_time_and_gives_memory(path: str) -> None:
    recipe, counts = of(QLORA, f"model.fast_path={path}")
    for micro in (1, 4):
        found = [
            weigh(recipe, counts, H200, Layout(micro, 16 // micro, again))
            for again in range(counts.layers + 1)
        ]
        times = [one.seconds for one in found]
        assert times == sorted(set(times))
        # all of them: the one that runs again is one too many beside the others' inputs
        sizes = [one.memory for one in found[:-1]]
        assert sizes == sorted(sizes, reverse=True)
    resident = weigh(recipe, counts, H200, Layout(4, 4, 0, resident=True))
    streamed = weigh(recipe, counts, H200, Layout(4, 4, 0))
    assert resident.seconds < streamed.seconds
    assert resident.memory > streamed.memory


@pytest.mark.parametrize("word", ["train.deepspeed=none", "train.deepspeed=zero2"])
def test_each_step_onto_the_host_frees_memory_and_takes_its_time(word: str) -> None:
    recipe, counts = of(QLORA, word)
    found = [
        weigh(recipe, counts, H200, Layout(1, 16, 32, hosted=hosted)) for hosted in ((), *LADDER)
    ]
    assert all(after.memory < before.memory for before, after in pairwise(found))
    assert all(after.seconds > before.seconds for before, after in pairwise(found))
    assert found[-1].seconds < 1.05 * found[0].seconds
    tables = 2 * counts.embedding * 2
    inputs = 2048 * counts.hidden * 2
    # without DeepSpeed averages wait on the host as well, and five parts of them are here at once
    parts = 5 * 8 * STATE_PART if word.endswith("none") else 0
    freed = tables // 2 + 30 * inputs - parts
    assert found[0].memory - found[2].memory == pytest.approx(freed, rel=1e-3)


def test_an_8_gib_card_holds_2048_tokens_of_a_7b_with_the_recipe_as_it_is() -> None:
    for gib, packs in ((8, 2), (12, 1), (24, 1)):
        choice = choose(*of(QLORA), int(gib * GIB), H200)
        assert choice.memory <= FILLED * gib * GIB
        assert choice.layout.micro_batch_size >= packs
        assert choice.layout.hosted == LADDER[-1] or gib > 8
    assert choose(*of(QLORA), 80 * GIB, H200).layout.hosted == ()
    line = choose(*of(QLORA), 8 * GIB, H200).line
    assert "embedding, layer inputs and head on the host: about " in line
    assert "what is on the host frees " in line and "% of time" in line


def test_the_least_layout_leaves_5_gib_to_torch_and_learns_10000_tokens_a_second() -> None:
    """Issue 6, point 2: of the device 6.5 GiB, with what CUDA holds beside torch."""
    recipe, counts = of(QLORA, "train.deepspeed=none")
    least = smallest(weighed(recipe, counts, H200))
    assert least.layout.hosted == LADDER[-1]
    assert least.memory - GPU_CONTEXT <= 5 * GIB
    assert 16 * 2048 / least.seconds >= 10_000


def test_only_frozen_tables_of_fast_layers_go_to_the_host() -> None:
    assert list(hosted_layouts(*of(QLORA)))
    for word in ("model.fast_path=false", "run.workers=2", "lora.modules_to_save=[lm_head]",
                 "lora.targets=[q_proj,lm_head]", "train.objective=dpo",
                 "model.quantization=int8", "lora.use_dora=true"):  # fmt: skip
        assert not list(hosted_layouts(*of(QLORA, word)))
    assert not list(hosted_layouts(*of(FULL)))


def test_only_what_can_stay_unpacked_may_stay_so() -> None:
    def found(*words: str) -> set[bool]:
        return {one.resident for one in layouts(*of(QLORA, *words))}

    assert found() == {True, False}
    for words in (["model.fast_path=false"], ["model.quantization=int8"],
                  ["model.quantization=none"], ["lora.use_dora=true"]):  # fmt: skip
        assert found(*words) == {False}


def test_a_deepspeed_file_that_sizes_batches_is_followed(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {}}))
    assert {one.micro_batch_size for one in layouts(*of(QLORA, f"train.deepspeed={file}"))} == {1}
    file.with_name("b.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto"}))
    other = of(QLORA, f"train.deepspeed={file.with_name('b.json')}")
    assert {one.micro_batch_size for one in layouts(*other)} == {1, 2, 4, 8, 16}


def test_a_choice_is_read_as_it_was_written_and_holds_for_what_was_asked() -> None:
    recipe, counts = of(QLORA)
    choice = choose(recipe, counts, 80 * GIB, H200)
    content = json.loads(json.dumps(choice.to_json()))
    assert Choice.from_json(content) == choice
    assert content["asked"] == asked(recipe)
    for word in ("train.accumulation=8", "run.workers=2", "model.gradient_checkpointing=7",
                 "train.layout=recipe", "train.deepspeed=none"):  # fmt: skip
        assert asked(load_recipe(QLORA, [word])) != asked(recipe)
    assert asked(load_recipe(QLORA, ["train.log_every=3", "train.lr=1e-5"])) == asked(recipe)


def test_the_reason_names_memory_and_what_the_recipe_would_do() -> None:
    recipe, counts = of(QLORA, "model.fast_path=false")
    line = choose(recipe, counts, 80 * GIB, H200).line
    assert line.startswith("4 packs per pass x 4 passes, no layer recomputed: about 67.9 of 80.0 ")
    assert "the recipe's 1 x 16, all layers recomputed, takes 2." in line
    assert "the least that any layout takes" in choose(recipe, counts, 6 * GIB, H200).line
    wide = of(QLORA, "train.micro_batch_size=16", "train.accumulation=1",
              "model.gradient_checkpointing=false")  # fmt: skip
    assert "no layer recomputed, needs " in choose(*wide, 40 * GIB, H200).line


def test_the_recipe_s_own_numbers_are_a_layout() -> None:
    for value, layers in (("true", 32), ("false", 0), ("5", 5), ("99", 32), ("auto", 32)):
        recipe, counts = of(QLORA, f"model.gradient_checkpointing={value}")
        assert own_layout(recipe, counts.layers) == Layout(1, 16, layers)
    again = Layout(2, 8, 5).applied(recipe, 32)
    assert again.model.gradient_checkpointing == 5
    assert Recipe.model_validate(again.model_dump(mode="json")) == again
    assert Layout(2, 8, 32).applied(recipe, 32).model.gradient_checkpointing is True
    assert Layout(2, 8, 0).applied(recipe, 32).model.gradient_checkpointing is False


def test_one_is_a_number_of_layers_and_true_is_not() -> None:
    one, counts = of(QLORA, "model.gradient_checkpointing=1")
    assert own_layout(one, counts.layers).recomputed == 1
    assert one.model.gradient_checkpointing is not True


@pytest.mark.parametrize("again", [0, 1, 3, 4])
def test_layers_keep_what_torch_keeps_of_all_of_them(tmp_path: Path, again: int) -> None:
    """Of four layers, `again` recomputed: each storage that autograd saves, without weights."""
    from raytune_ft.model.adapter import attach
    from raytune_ft.model.loading import load_model, read_config
    from raytune_ft.model.memory import Shape
    from raytune_ft.training.laid_out import recompute
    from tests.conftest import make_tiny_model

    make_tiny_model(tmp_path, num_hidden_layers=4)
    tokens = 64
    recipe = Recipe.model_validate({
        "model": {"path": str(tmp_path), "gradient_checkpointing": again or False},
        "lora": {"r": 4, "dropout": 0.1},
        "data": {"sources": [{"path": "a.jsonl"}], "max_length": tokens},
        "train": {"deepspeed": "none"},
    })  # fmt: skip
    model: Any = attach(load_model(tmp_path, recipe.model, torch.device("cpu")), recipe.lora, 0)
    counts = Shape(read_config(tmp_path)).counts(recipe)
    recompute(model, again)
    model.train()
    body = model.get_base_model().model
    entering = torch.randn(1, tokens, counts.hidden, requires_grad=True)
    position = body.rotary_emb(entering, torch.arange(tokens).unsqueeze(0))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shared = {one.untyped_storage().data_ptr() for one in position}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights | shared and tensor.numel() >= tokens * 4:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = entering
        for layer in body.layers:
            hidden = layer(hidden, position_embeddings=position)
    expected = kept_of_layers(Setting(recipe, counts, on_gpu=False))
    expected -= tokens * 4 * tokens * (counts.layers - again)  # no mask is made of booleans here
    assert sum(kept.values()) == pytest.approx(expected, rel=0.06)
