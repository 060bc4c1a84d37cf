"""Every shipped recipe of eight GPUs: its batch, its ZeRO, and what a plan says without a GPU."""

from __future__ import annotations

import re

import pytest
import torch

from raytune_ft import survey
from raytune_ft.config import catalog
from raytune_ft.config.estimates.footprint import count
from raytune_ft.config.estimates.pace import DEVICES
from raytune_ft.config.estimates.peak import memory_bytes
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.outlook import GIB
from raytune_ft.planning import print_plan
from raytune_ft.training import presets

NAMES = [name for name in catalog.recipe_names() if name.endswith("_gpu8")]
REFERENCE = [name for name in catalog.reference_names() if name.endswith("_gpu8")]


def alone(recipe: Recipe) -> Recipe:
    """Return the recipe for one worker, at the same packs per step."""
    train = {"accumulation": recipe.train.accumulation * recipe.run.workers}
    return recipe.model_copy(
        update={
            "run": recipe.run.model_copy(update={"workers": 1}),
            "train": recipe.train.model_copy(update=train),
        }
    )


def test_all_of_them_are_listed() -> None:
    assert len(REFERENCE) == 9 and set(REFERENCE) < set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_eight_workers_share_a_step_of_64_packs(name: str) -> None:
    recipe = load_recipe(name)
    survey.check_names(recipe)
    survey.check_deepspeed(recipe)
    assert (recipe.run.workers, recipe.global_batch_size) == (8, 64)
    found = presets.resolve(recipe, torch.bfloat16, on_gpu=True)
    assert recipe.train.deepspeed == "zero2" and found is not None
    assert found["zero_optimization"]["stage"] == 2
    assert found["train_micro_batch_size_per_gpu"] == recipe.train.micro_batch_size
    assert found["gradient_accumulation_steps"] == recipe.train.accumulation


@pytest.mark.parametrize("name", NAMES)
def test_a_rank_of_eight_needs_less_than_one_alone(name: str) -> None:
    """Eight share the optimizer, and gradients under stage 2; the base lies on each of them."""
    recipe = load_recipe(name)
    model, _ = catalog.split(name)
    counts = count(catalog.card(model).config, recipe)
    eight, one = (memory_bytes(r, counts, on_gpu=True) for r in (recipe, alone(recipe)))
    assert eight["optimizer"] == pytest.approx(one["optimizer"] / 8, abs=1)
    assert eight["gradients"] == pytest.approx(one["gradients"] / 8, abs=1)
    assert eight["base weights"] == one["base weights"]
    assert sum(eight.values()) < sum(one.values())


@pytest.mark.parametrize("name", REFERENCE)
def test_a_plan_says_it_without_a_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever layout it chooses holds a rank's eight packs, in less than an H100 has."""
    assert print_plan(load_recipe(name), gpu="h100", source=name) == 0
    said = capsys.readouterr().out
    (laid,) = re.findall(
        r"^batch +64 packs per step = (\d) per pass x (\d) passes x 8 workers$", said, re.MULTILINE
    )
    assert int(laid[0]) * int(laid[1]) == 8
    (memory,) = re.findall(r"^memory +([\d.]+) GiB at the peak, per worker$", said, re.MULTILINE)
    assert 1 < float(memory) < DEVICES["h100"].memory / GIB
    (network,) = re.findall(r"^network +(.*)$", said, re.MULTILINE)
    assert " GB sent per worker and step; 8 workers keep 9" in network
