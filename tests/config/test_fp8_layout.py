"""What the plan counts for frozen weights in float8: bytes, seconds, and what a layout says."""

from __future__ import annotations

import pytest

from raytune_ft.config import catalog
from raytune_ft.config.estimates.footprint import count
from raytune_ft.config.estimates.layout import Layout, choose, layouts, weigh
from raytune_ft.config.estimates.pace import DEVICES
from raytune_ft.config.estimates.peak import memory_bytes
from raytune_ft.config.loader import load_recipe

QLORA = "internlm_7b_qlora_oasst1_e3"
GIB = 2**30


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_kept_weights_take_two_bytes_and_save_time(quantization: str) -> None:
    recipe = load_recipe(QLORA, ["model.compute=fp8", f"model.quantization={quantization}"])
    shape = catalog.card_config(recipe.model.path)
    assert shape is not None
    counts = count(shape, recipe)
    assert {one.resident for one in layouts(recipe, counts)} == {True, False}
    fixed = Layout(4, 4, 0).applied(recipe, counts.layers)
    kept = memory_bytes(fixed, counts, on_gpu=True, resident=True)["weights unpacked"]
    assert kept == 2 * counts.linear
    at_use, stays = (
        weigh(recipe, counts, DEVICES["h200"], Layout(4, 4, 0, resident=resident))
        for resident in (False, True)
    )
    assert stays.seconds < at_use.seconds and stays.memory > at_use.memory


def test_float8_is_faster_and_said() -> None:
    found = {}
    for compute in ("auto", "fp8"):
        recipe = load_recipe(QLORA, [f"model.compute={compute}"])
        shape = catalog.card_config(recipe.model.path)
        assert shape is not None
        found[compute] = choose(recipe, count(shape, recipe), 80 * GIB, DEVICES["h100"])
    assert 1.1 < found["auto"].seconds / found["fp8"].seconds < 1.6
    assert "products in float8, about" in found["fp8"].line
    assert "float8" not in found["auto"].line
