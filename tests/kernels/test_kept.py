"""What a decoder layer keeps in its fast form, as the plan of a run counts it.

Counted as autograd saves it, each storage once, weights and what all layers share apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.estimates import peak, setting
from raytune_ft.config.estimates.peak import kept_per_token
from raytune_ft.config.estimates.setting import Setting
from raytune_ft.config.schema import Recipe
from raytune_ft.model import fast, loss
from raytune_ft.model.adapter import attach
from raytune_ft.model.fastpath import blocks
from raytune_ft.model.fastpath.lane import LANE, Packed
from raytune_ft.model.loading import load_model, read_config
from raytune_ft.model.memory import Shape
from tests.conftest import make_tiny_model

TOKENS = 16
BOUNDS = (0, 9, TOKENS)


def test_tiles_are_those_of_the_fast_path() -> None:
    assert (setting.TILE, setting.LONG) == (blocks.TILE, blocks.LONG)
    assert peak.FUSED_ROWS == loss.FUSED_ROWS


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("tile", [None, 8], ids=["whole", "tiled"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=["all", "two"])
def test_a_fast_layer_keeps_what_is_planned(
    dropout: float, targets: Any, tile: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No mask of dropout, no copy of what a norm or an adapter reads; of tiles their inputs."""
    for module in (blocks, setting) if tile else ():
        monkeypatch.setattr(module, "TILE", tile)
        monkeypatch.setattr(module, "LONG", tile)
    make_tiny_model(tmp_path, num_key_value_heads=4)
    recipe = Recipe.model_validate({
        "model": {"path": str(tmp_path), "dtype": "float32", "fast_path": True},
        "lora": {"r": 4, "dropout": dropout, "targets": targets},
        "data": {"sources": [{"path": "a.jsonl"}], "max_length": TOKENS},
        "train": {"deepspeed": "none"},
    })  # fmt: skip
    cpu = torch.device("cpu")
    model: Any = attach(load_model(tmp_path, recipe.model, cpu), recipe.lora, 0)
    counts = Shape(read_config(tmp_path)).counts(recipe)
    assert fast.install(model, cpu, wanted=True).packed
    model.train()
    body = model.get_base_model().model
    entering = torch.randn(1, TOKENS, counts.hidden, requires_grad=True)
    position = body.rotary_emb(entering, torch.arange(TOKENS).unsqueeze(0))
    packed = Packed(torch.tensor(BOUNDS, dtype=torch.int32), 9)
    apart = {p.untyped_storage().data_ptr() for p in model.parameters()}
    apart |= {one.untyped_storage().data_ptr() for one in position}
    kept: dict[int, int] = {}
    held: list[torch.Tensor] = []  # so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart and tensor.numel() >= TOKENS * 4:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with LANE.entered(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        body.layers[0](entering, position_embeddings=position, packed=packed)
    masks = {one.untyped_storage().data_ptr() for one in packed.masks.values()}
    found = sum(size for place, size in kept.items() if place not in masks)
    expected = TOKENS * kept_per_token(Setting(recipe, counts, on_gpu=True))
    assert found == pytest.approx(expected, rel=0.05)
