"""docs/recipe.md: every field with its default, every example a recipe."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe, Section, Source
from raytune_ft.data.rows.formats import FORMATS
from tests.conftest import ROOT

PAGE = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
SECTIONS: dict[str, type[Section]] = {
    **{name: info.annotation for name, info in Recipe.model_fields.items()},  # type: ignore[misc]
    "data.sources": Source,
}
FIELDS = [(s, f) for s, section in SECTIONS.items() for f in section.model_fields]


def rows_of(section: str) -> dict[str, str]:
    """Return what the page says is the default, by field."""
    part = PAGE.partition(f"\n### {section}\n")[2].partition("\n## ")[0].partition("\n### ")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \| .+ \|$", part, re.MULTILINE))


def shown(section: type[Section], field: str) -> str:
    info = section.model_fields[field]
    if info.is_required():
        return "required"
    value = info.get_default()
    if isinstance(value, str):
        return f"`{value}`" if value else "`''`"
    text = json.dumps(list(value) if isinstance(value, tuple) else value)
    return f"`{text.replace(chr(34), '')}`"


@pytest.mark.parametrize(("section", "field"), FIELDS)
def test_field_is_there_with_its_default(section: str, field: str) -> None:
    assert rows_of(section)[field] == shown(SECTIONS[section], field)


@pytest.mark.parametrize("section", SECTIONS)
def test_no_field_is_made_up(section: str) -> None:
    assert list(rows_of(section)) == list(SECTIONS[section].model_fields)


def test_every_format_is_there() -> None:
    named = set(re.findall(r"`(\w+)`", PAGE.partition("### What a row may be")[2]))
    assert {name for name in FORMATS if not name.endswith("_map_fn")} <= named


def test_examples_are_recipes(tmp_path: Path) -> None:
    examples = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) == 5
    for text in examples:
        whole = text if "base:" in text else f"base: qwen3_8b_qlora_alpaca_e3\n{text}"
        file = tmp_path / "my.yaml"
        file.write_text(whole, encoding="utf-8")
        recipe = load_recipe(str(file))
        assert recipe.model.path == "Qwen/Qwen3-8B"


def test_its_command_line_is_one(tmp_path: Path) -> None:
    (line,) = re.findall(r"^raytune-ft train my.yaml (.*)$", PAGE, re.MULTILINE)
    recipe = load_recipe("qwen3_8b_qlora_alpaca_e3", shlex.split(line))
    assert recipe.train.lr == 1e-4
    assert recipe.data.sources[0].system == "You are Ada."
