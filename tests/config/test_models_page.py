"""docs/models.md: made from the cards, and complete."""

from __future__ import annotations

import dataclasses

from raytune_ft.config import catalog, models_page
from raytune_ft.config.document import read_text
from tests.conftest import ROOT


def test_the_committed_page_is_what_the_cards_say() -> None:
    committed = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    assert committed == models_page.page() + "\n", (
        "make it again: python -m raytune_ft.config.models_page > docs/models.md"
    )


def test_every_card_has_a_row() -> None:
    rows = [line for line in models_page.page().splitlines() if line.startswith("| `")]
    assert len(rows) == len(catalog.models())
    for model in catalog.models():
        card = catalog.card(model)
        (row,) = [r for r in rows if r.startswith(f"| `{model}` |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 8
        assert all(cells)
        assert cells[1] == card.path
        assert cells[3] == f"`{card.template}`"


def test_the_example_card_is_one() -> None:
    """What "Adding a model card" shows is the shipped card, every field of a card named."""
    example = models_page.ADDING.partition("```yaml\n")[2].partition("```")[0]
    content = read_text(example, "example").content
    assert catalog.Card(**content) == catalog.card("qwen3_8b")
    for field in dataclasses.fields(catalog.Card):
        assert field.name in content or f"`{field.name}`" in models_page.ADDING


def test_every_family_is_used_and_known() -> None:
    used = {catalog.card(model).family for model in catalog.models()}
    assert used == set(catalog.families())
