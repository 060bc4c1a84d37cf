"""The JSON Schema for editors accepts what the loader accepts, and refuses slips."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from raytune_ft.config import catalog
from raytune_ft.config.document import read_file, read_text
from raytune_ft.config.json_schema import recipe_schema
from raytune_ft.config.loader import dump_yaml, load_recipe
from raytune_ft.config.schema import Recipe
from tests.conftest import ROOT

SCHEMA = recipe_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
SMALL: dict[str, Any] = {"model": {"path": "m"}, "data": {"sources": [{"path": "a.jsonl"}]}}


def changed(**sections: Any) -> dict[str, Any]:
    content = copy.deepcopy(SMALL)
    for name, value in sections.items():
        if isinstance(value, dict) and isinstance(content.get(name), dict):
            content[name] |= value
        else:
            content[name] = value
    return content


def test_it_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert set(Recipe.model_fields) | {"base", "compat"} == set(SCHEMA["properties"])


@pytest.mark.parametrize("name", catalog.recipe_names()[::13])
def test_written_recipes_are_valid(name: str) -> None:
    VALIDATOR.validate(read_text(dump_yaml(load_recipe(name)), name).content)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_shipped_files_are_valid(file: Any) -> None:
    if file.name not in ("catalog.yaml", "families.yaml"):
        VALIDATOR.validate(read_file(file, file.name).content)


@pytest.mark.parametrize(
    "content",
    [
        SMALL,
        changed(compat="xtuner-0.1.9"),
        {"base": "qwen3_8b_qlora_alpaca_e3", "train": {"lr": 1e-4}},
        {"base": "qwen3_8b_qlora_alpaca_e3", "model": {"quantization": "none"}},
        changed(checkpoint={"keep": -1}),
    ],
)
def test_good_content(content: dict[str, Any]) -> None:
    assert not list(VALIDATOR.iter_errors(content))


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"path": "m"}},
        {"data": {"sources": [{"path": "a"}]}},
        {"model": {}, "data": {"sources": [{"path": "a"}]}},
        changed(train={"lerning_rate": 1}),
        changed(train={"lr": "fast"}),
        changed(train={"epochs": 0}),
        changed(data={"sources": []}),
        changed(data={"sources": [{"map": "alpaca_map_fn"}]}),
        changed(compat="xtuner"),
        changed(checkpoint={"keep": 0}),
        {"base": "x", "trian": {}},
    ],
)
def test_bad_content(content: dict[str, Any]) -> None:
    assert list(VALIDATOR.iter_errors(content))


def test_every_field_is_explained() -> None:
    for section in SCHEMA["$defs"].values():
        for name, field in section["properties"].items():
            assert field.get("description"), name
