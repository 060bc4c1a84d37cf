"""Adapters and their beginnings: what does not go together is refused, its neighbour is not."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from raytune_ft.config.schema import Recipe

NF4, INT8 = {"quantization": "nf4"}, {"quantization": "int8"}


def recipe(**sections: dict[str, Any]) -> Recipe:
    content: dict[str, Any] = {"model": {}, "data": {"sources": [{"path": "rows.jsonl"}]}}
    for name, section in sections.items():
        content[name] = {**content.get(name, {}), **section}
    content["model"]["path"] = "tiny"
    return Recipe.model_validate(content)


def begins(init: str, **lora: Any) -> dict[str, Any]:
    return {"init_lora_weights": init, **lora}


@pytest.mark.parametrize(
    ("sections", "message", "instead"),
    [
        ({"model": NF4, "lora": begins("pissa")}, "use loftq", {"lora": begins("loftq")}),
        ({"model": NF4, "lora": begins("olora")}, "use loftq", {"model": {"quantization": "none"}}),
        ({"model": INT8, "lora": begins("pissa_niter_4")}, "leave it out", {"lora": {}}),
        ({"lora": begins("loftq")}, "model.quantization: nf4", {"model": NF4}),
        ({"model": INT8, "lora": begins("loftq")}, "or use pissa", {"model": NF4}),
        ({"lora": begins("orthogonal", r=5)}, "use 6", {"lora": begins("orthogonal", r=6)}),
        (
            {"model": {"load_from": "runs/a"}, "lora": begins("eva")},
            "leave one of them out",
            {"lora": begins("gaussian")},
        ),
        ({"model": {"new_tokens": ["a", "b", "a"]}}, "'a' twice", {"model": {"new_tokens": ["a"]}}),
        ({"model": {"new_tokens": [" "]}}, "a token of blanks", {"model": {"new_tokens": ["a "]}}),
        (
            {"train": {"neftune_noise_alpha": 5.0, "objective": "dpo"}},
            "shaken questions",
            {"train": {"neftune_noise_alpha": 5.0}},
        ),
    ],
)
def test_a_pair_is_refused_with_what_to_use_instead(
    sections: dict[str, Any], message: str, instead: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        recipe(**sections)
    assert "\n" not in caught.value.errors()[0]["msg"]
    recipe(**{**sections, **instead})


def test_a_full_run_asks_nothing_of_the_adapter() -> None:
    recipe(model={"method": "full"}, lora=begins("loftq", use_dora=True))
