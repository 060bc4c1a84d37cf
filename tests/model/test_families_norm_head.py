"""Baichuan2's head: folded where it is frozen, normalised in the forward pass where it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.config.schema import LoraSection
from raytune_ft.errors import ModelError, RecipeError
from raytune_ft.model.adapter import attach, load_adapter, save_adapter, trains_head
from raytune_ft.model.families.norm_head import LoraNormHead, NormHead, normalised
from raytune_ft.model.loss import TokenLoss
from tests.model.families import make, tensors
from tests.model.test_families_files import IDS, load, logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("baichuan2-7b", tmp_path_factory.mktemp("norm") / "base")


def random_head() -> tuple[NormHead, torch.Tensor]:
    torch.manual_seed(3)
    head = NormHead(6, 11, bias=False)
    with torch.no_grad():
        head.weight.mul_(torch.rand(11, 1) * 9)
    return head, torch.randn(5, 6)


def reference(weight: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ nn.functional.normalize(weight).T


def test_both_forms_are_the_reference() -> None:
    head, hidden = random_head()
    expected = reference(head.weight, hidden)
    torch.testing.assert_close(head(hidden), expected)
    head.fold()
    torch.testing.assert_close(head(hidden), expected)
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(11))


def test_gradients_are_the_references_only_unfolded() -> None:
    """Those of the rows are orthogonal to the rows; folding would lose that."""
    head, hidden = random_head()
    weight, own = head.weight.detach().clone().requires_grad_(), hidden.clone().requires_grad_()
    reference(weight, own).square().sum().backward()
    hidden.requires_grad_()
    head(hidden).square().sum().backward()
    assert head.weight.grad is not None
    torch.testing.assert_close(head.weight.grad, weight.grad)
    torch.testing.assert_close(hidden.grad, own.grad)
    along = (head.weight.grad * weight).sum(1)
    torch.testing.assert_close(along, torch.zeros(11), atol=1e-5, rtol=0)
    head.zero_grad()
    head.fold()
    head(hidden).square().sum().backward()
    assert (head.weight.grad * head.weight).sum(1).abs().max().item() > 0.1


def test_bfloat16_lengths_are_taken_in_float32() -> None:
    weight = torch.full((3, 4096), 1.0, dtype=torch.bfloat16)
    assert normalised(weight)[0, 0].item() == 1 / 64
    assert normalised(torch.zeros(2, 4)).tolist() == [[0.0] * 4] * 2


def test_loading_folds_a_frozen_head_and_keeps_a_trained_one(folder: Path) -> None:
    frozen, learning = load(folder), load(folder, head_trained=True)
    stored = tensors("baichuan2-7b")["lm_head.weight"]
    assert torch.equal(learning.lm_head.weight, stored)
    torch.testing.assert_close(frozen.lm_head.weight, nn.functional.normalize(stored))
    torch.testing.assert_close(logits(frozen), logits(learning), rtol=1e-5, atol=1e-5)
    hidden = frozen.model(IDS).last_hidden_state
    torch.testing.assert_close(logits(frozen), reference(stored, hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "lora, answer",
    [
        ({}, False),
        ({"targets": ["q_proj"]}, False),
        ({"targets": ["q_proj", "lm_head"]}, True),
        ({"modules_to_save": ["lm_head"]}, True),
        ({"modules_to_save": ["embed_tokens"]}, False),
    ],
)
def test_what_trains_the_head(lora: dict[str, Any], answer: bool) -> None:
    assert trains_head(LoraSection.model_validate(lora)) is answer


@pytest.mark.parametrize(
    "lora", [{"targets": ["lm_head"]}, {"modules_to_save": ["lm_head"]}], ids=["lora", "whole"]
)
def test_the_loss_reaches_a_trained_head(folder: Path, lora: dict[str, Any]) -> None:
    """The update stands inside the length: logits and gradients of W + sBA as a plain product."""
    section = LoraSection.model_validate({"r": 3, "dropout": 0.0, **lora})
    model = attach(load(folder, head_trained=True), section, seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    loss, _ = TokenLoss(model)(IDS, IDS, torch.arange(17)[None], torch.zeros_like(IDS))
    loss.backward()
    head: Any = model.get_base_model().get_output_embeddings()
    whole = "modules_to_save" in lora
    assert isinstance(head, LoraNormHead) is not whole
    trained = [p for p in model.parameters() if p.requires_grad and p.shape[0] == 125696]
    got = [p.grad.clone() for p in trained]
    model.zero_grad()

    if whole:
        weight = head.modules_to_save["default"].weight
    else:
        a, b = head.lora_A["default"].weight, head.lora_B["default"].weight
        weight = head.get_base_layer().weight + head.scaling["default"] * b @ a
    hidden = model.get_base_model().model(IDS).last_hidden_state[0, :-1]
    wanted = nn.functional.cross_entropy(reference(weight, hidden), IDS[0, 1:], reduction="sum")
    wanted.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
    assert len(got) == 1
    torch.testing.assert_close(got[0], trained[0].grad, rtol=1e-3, atol=1e-5)


def test_an_adapter_of_the_head_needs_the_head_as_it_was(folder: Path, tmp_path: Path) -> None:
    model = attach(load(folder, head_trained=True), LoraSection(r=2, targets=["lm_head"]), seed=1)
    save_adapter(model, tmp_path, "base")
    with pytest.raises(ModelError, match="head_trained=True"):
        load_adapter(load(folder), tmp_path)


def test_dora_on_the_head_is_refused(folder: Path) -> None:
    lora = LoraSection(r=2, targets=["lm_head"], use_dora=True)
    with pytest.raises(RecipeError, match=r"lora.use_dora: not for the output head of Baichuan2"):
        attach(load(folder, head_trained=True), lora, seed=1)
