"""Memory by arithmetic: counted from a card's shape as the planner counts on the network itself."""

from __future__ import annotations

import pytest

from raytune_ft.config import catalog, listing
from raytune_ft.config.estimates.footprint import count, fitting_targets, linear_layers
from raytune_ft.config.estimates.peak import memory_bytes
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe

GIB = 2**30

PUBLISHED = {
    "gemma2_2b_it": 2_614_341_888,
    "gemma2_9b_it": 9_241_705_984,
    "gemma3_1b_it": 999_885_952,
    "glm4_9b": 9_400_279_040,
    "llama2_7b": 6_738_415_616,
    "llama2_70b": 68_976_648_192,
    "llama3_1_8b": 8_030_261_248,
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_3b": 3_212_749_824,
    "llama3_3_70b_instruct": 70_553_706_496,
    "mistral_7b": 7_241_732_096,
    "mistral_7b_v0_3": 7_248_023_552,
    "phi3_5_mini_instruct": 3_821_079_552,
    "phi4": 14_659_507_200,
    "phi4_mini_instruct": 3_836_021_760,
    "qwen2_5_0_5b": 494_032_768,
    "qwen2_5_1_5b": 1_543_714_304,
    "qwen2_5_3b": 3_085_938_688,
    "qwen2_5_7b": 7_615_616_512,
    "qwen2_5_14b": 14_770_033_664,
    "qwen2_5_32b": 32_763_876_352,
    "qwen2_5_72b": 72_706_203_648,
    "qwen3_0_6b": 596_049_920,
    "qwen3_1_7b": 1_720_574_976,
    "qwen3_4b": 4_022_468_096,
    "qwen3_8b": 8_190_735_360,
    "qwen3_14b": 14_768_307_200,
    "qwen3_32b": 32_762_123_264,
    "smollm2_135m": 134_515_008,
    "smollm2_360m": 361_821_120,
    "smollm2_1_7b": 1_711_376_384,
    "starcoder": 15_517_456_384,
    "yi_6b": 6_061_035_520,
    "yi_34b": 34_388_917_248,
}
"""Parameters of the published checkpoints, as the hub counts them in their safetensors files."""


@pytest.mark.parametrize(("model", "parameters"), PUBLISHED.items())
def test_a_card_has_the_published_number_of_parameters(model: str, parameters: int) -> None:
    recipe = load_recipe(f"{model}_qlora_oasst1_e3")
    assert count(catalog.card(model).config, recipe).total == parameters


def shapes() -> dict[str, str]:
    """One model for each different shape."""
    return {str(sorted(catalog.card(m).config.items())): m for m in catalog.models()}


@pytest.mark.parametrize("model", sorted(shapes().values()))
def test_counts_are_those_of_transformers_own_network(model: str) -> None:
    from raytune_ft.model.memory import plan_memory

    config = catalog.card(model).config
    for method in ("qlora/oasst1_e3", "qlora/open_platypus_e1", "full/oasst1_e3"):
        body = catalog.body_for(model, method)
        body["train"]["layout"] = "recipe"
        recipe = Recipe.model_validate(body)
        plan = plan_memory(recipe, config, 10**15)
        assert count(config, recipe) == plan.counts
        assert memory_bytes(recipe, plan.counts, on_gpu=True) == plan.parts
        assert listing.memory(model, method) == plan.total


def test_listed_memory_is_that_of_the_recipe() -> None:
    for name in ("internlm_7b_qlora_oasst1_e3", "phi4_qlora_open_platypus_e1"):
        recipe = load_recipe(name)
        (entry,) = [e for e in listing.entries(name) if e.name == name]
        shape = catalog.card_config(recipe.model.path)
        assert shape is not None
        parts = memory_bytes(recipe, count(shape, recipe), on_gpu=True)
        assert entry.memory == sum(parts.values())
    assert 7 < (entry.memory or 0) / GIB < 20


def test_a_target_that_no_layer_has_is_not_guessed() -> None:
    qwen, phi = catalog.card("qwen3_8b").config, catalog.card("phi4").config
    assert fitting_targets(["c_attn"], qwen) == []
    assert fitting_targets(["q_proj", "v_proj"], phi) == ["qkv_proj"]
    assert {layer.name for layer in linear_layers(phi)} == {
        "qkv_proj", "o_proj", "gate_up_proj", "down_proj",
    }  # fmt: skip
