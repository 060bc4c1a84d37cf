"""Proposals: what is proposed fits by the arithmetic of the plan, and nothing faster does."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.config import catalog
from raytune_ft.config.estimates import layout
from raytune_ft.config.estimates.footprint import count
from raytune_ft.config.estimates.pace import DEVICES, epoch_seconds
from raytune_ft.config.estimates.peak import memory_bytes
from raytune_ft.config.estimates.proposal import FILLED, PACKS, Proposal, proposals
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.pairs import problem
from raytune_ft.config.schema import Recipe

GIB = 2**30
H200 = DEVICES["h200"]
NAMES = ("internlm_7b_qlora_oasst1_e3", "llama2_7b_qlora_oasst1_512_e3", "qwen3_8b_full_oasst1_e3")


def shape_of(recipe: Recipe) -> dict[str, Any]:
    shape = catalog.card_config(recipe.model.path)
    assert shape is not None
    return dict(shape)


def found(recipe: Recipe, gib: float) -> list[Proposal]:
    shape = shape_of(recipe)
    return proposals(recipe, lambda changed: count(shape, changed), int(gib * GIB), H200)


def typed(name: str, proposal: Proposal) -> Recipe:
    """The recipe that a user gets who types the proposal, checked by the loader."""
    return load_recipe(name, list(proposal.overrides))


@settings(max_examples=6, deadline=None)
@given(name=st.sampled_from(NAMES), gib=st.floats(5, 140))
def test_what_is_proposed_fits_when_it_is_typed(name: str, gib: float) -> None:
    recipe = load_recipe(name)
    for one in found(recipe, gib)[:5]:
        changed = typed(name, one)
        assert problem(changed) is None
        counts = count(shape_of(changed), changed)
        again = layout.choose(changed, counts, int(gib * GIB), H200)
        assert (again.layout, again.memory) == (one.layout, one.memory)
        assert one.memory <= FILLED * gib * GIB
        assert changed.global_batch_size == recipe.global_batch_size


def everything(recipe: Recipe) -> Iterator[Recipe]:
    """Much that keeps method and length, written down apart from the search."""
    train, whole = recipe.train, recipe.train.micro_batch_size * recipe.train.accumulation
    body = recipe.model_dump(mode="json")
    for micro, again, stored, optimizer, zero in product(
        (n for n in range(1, whole + 1) if whole % n == 0),
        (True, False, 9, 30),
        ("none", "int8", "nf4"),
        {train.optimizer, "paged_adamw_32bit", "paged_adamw_8bit", "adamw_8bit"},
        {train.deepspeed, "none", "zero2_offload"},
    ):
        model = {"gradient_checkpointing": again, "quantization": stored}
        sizes = {"micro_batch_size": micro, "accumulation": whole // micro}
        way = {"layout": "recipe", "optimizer": optimizer, "deepspeed": zero}
        try:
            yield Recipe.model_validate(
                {**body, "model": body["model"] | model, "train": body["train"] | sizes | way}
            )
        except ValueError:
            continue  # a pair that does not work


@pytest.mark.parametrize("name", NAMES)
def test_nothing_faster_fits(name: str) -> None:
    recipe = load_recipe(name)
    counts = count(shape_of(recipe), recipe)  # the method is kept
    taken = [
        (
            sum(memory_bytes(one, counts, on_gpu=True).values()),
            epoch_seconds(one, counts, H200, PACKS),
        )
        for one in everything(recipe)
    ]
    for gib in (10, 16, 24, 48, 80, 139):
        fitting = [seconds for memory, seconds in taken if memory <= layout.FILLED * gib * GIB]
        kept = [
            one
            for one in found(recipe, gib)
            if one.recipe.model.method == recipe.model.method
            and one.recipe.data.max_length == recipe.data.max_length
        ]
        assert kept or not fitting
        if fitting:
            assert kept[0].seconds <= min(fitting) * layout.AS_FAST


def test_the_data_changes_last_and_as_little_as_can_be() -> None:
    recipe = load_recipe("internlm_7b_qlora_oasst1_e3")
    sizes = (5.75, 5.85, 6, 7.5, 8, 12, 80)
    lengths = {gib: found(recipe, gib)[0].recipe.data.max_length for gib in sizes}
    assert lengths[80] == lengths[12] == lengths[8] == lengths[7.5] == lengths[6] == 2048
    assert lengths[5.75] <= lengths[5.85] < 2048
    assert found(recipe, 3) == []


def test_what_fits_already_and_is_fastest_is_left_alone() -> None:
    recipe = load_recipe("internlm_7b_qlora_oasst1_e3")
    again = found(recipe, 40)[0]
    settled = typed("internlm_7b_qlora_oasst1_e3", again)
    assert found(settled, 40)[0].overrides == ()


def test_workers_are_offered_what_spreads() -> None:
    recipe = load_recipe("llama2_7b_full_oasst1_e3", ["run.workers=8"])
    kinds = {one.recipe.train.deepspeed for one in found(recipe, 80)}
    assert "zero3" in kinds
    assert all(not one.recipe.train.deepspeed.startswith("zero3") for one in found(
        load_recipe("llama2_7b_qlora_oasst1_e3", ["run.workers=8"]), 80)
        if one.recipe.model.quantization != "none")  # fmt: skip
