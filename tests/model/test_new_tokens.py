"""Rows of new tokens: where they begin, which matrices get them, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import LoraSection
from raytune_ft.errors import RecipeError
from raytune_ft.model.adapter import attach, load_adapter, save_adapter
from raytune_ft.model.new_tokens import check_place, make_room, tables, widen
from tests.conftest import make_tiny_model
from tests.families.checkpoints import make
from tests.families.loaded import load
from tests.model.test_adapter import base, logits

PIECES = {297: (5, 9, 11), 298: (7,), 299: ()}


def model_of(folder: Path, *, tied: bool, rows: int = 297) -> Any:
    make_tiny_model(folder, tie_word_embeddings=tied, vocab_size=rows)
    return base(folder)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rows", [297, 299, 320])
def test_a_row_is_the_mean_of_its_pieces_and_no_matrix_shrinks(
    tmp_path: Path, tied: bool, rows: int
) -> None:
    """C40: rows to spare stay; what was known does not change; tied stays tied."""
    model = model_of(tmp_path, tied=tied, rows=rows)
    before = [table.weight.detach().clone() for table in tables(model)]
    make_room(model, PIECES)
    assert len(tables(model)) == len(before) == (1 if tied else 2)
    assert model.config.vocab_size == max(rows, 300)
    for table, known in zip(tables(model), before, strict=True):
        weight = table.weight
        assert weight.shape == (max(rows, 300), 64)
        assert not weight.requires_grad
        assert torch.equal(weight[:297], known[:297])
        assert torch.equal(weight[300:], known[300:])
        for id_, mean in (
            (297, known[[5, 9, 11]].mean(0)), (298, known[7]), (299, known[:297].mean(0))
        ):  # fmt: skip
            torch.testing.assert_close(weight[id_], mean)
    state = torch.random.get_rng_state()
    widen(model, 330)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("whole", [[], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_an_adapter_brings_its_rows(
    tmp_path: Path, tied: bool, whole: list[str], quantization: str
) -> None:
    make_tiny_model(tmp_path, tie_word_embeddings=tied)
    model = base(tmp_path, quantization=quantization)
    make_room(model, PIECES)
    lora = LoraSection(r=4, modules_to_save=whole)
    wrapped = attach(model, lora, 1, new_ids=PIECES).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    save_adapter(wrapped, tmp_path / "adapter", "base")
    loaded = load_adapter(base(tmp_path, quantization=quantization), tmp_path / "adapter")
    ids = torch.tensor([[3, 297, 5, 298, 299, 8]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, wrapped(ids).logits)
    assert logits(loaded).shape[-1] == 300


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, r"has 'lm_head' without 'model.embed_tokens'"),
        ({"modules_to_save": ["embed_tokens"]}, r"has 'model.embed_tokens' without 'lm_head'"),
        ({"targets": ["q_proj", "embed_tokens"]}, r"lora.targets: 'model.embed_tokens' is the"),
    ],
)
def test_rows_that_are_trained_twice_are_refused(
    tmp_path: Path, lora: dict[str, Any], message: str
) -> None:
    model = model_of(tmp_path, tied=True)
    make_room(model, PIECES)
    with pytest.raises(RecipeError, match=message) as caught:
        attach(model, LoraSection.model_validate({"r": 4, **lora}), 1, new_ids=PIECES)
    assert "\n" not in str(caught.value)


def test_heads_and_files_that_have_no_place(tmp_path: Path) -> None:
    folder = make("baichuan2_7b", tmp_path / "model")
    with pytest.raises(RecipeError, match=r"output head of .* is no plain matrix"):
        make_room(load(folder), {900: (1,)})
    with pytest.raises(RecipeError, match="read by the model's own code"):
        check_place(folder)
