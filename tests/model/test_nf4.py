"""NF4 against the rule written again: blocks of 64 weights over the ends of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit

from raytune_ft.config.schema import LoraSection
from raytune_ft.errors import RecipeError
from raytune_ft.model.adapter import attach
from raytune_ft.model.nf4 import mend_cpu_layers, through_nf4
from tests.families.checkpoints import make
from tests.families.loaded import load

SHAPES = [(64, 64), (64, 112), (100, 112), (7, 13), (3, 5), (96, 32), (40, 80), (1, 64)]
BLOCK = 64


def reference(weight: torch.Tensor) -> torch.Tensor:
    """Round each weight to the nearest of 16 levels, scaled by the largest of its block."""
    levels = quantize_4bit(torch.ones(BLOCK), quant_type="nf4")[1].code
    flat = weight.flatten()
    padding = -flat.numel() % BLOCK
    blocks = torch.cat([flat, torch.zeros(padding)]).view(-1, BLOCK)
    scales = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / scales).unsqueeze(-1) - levels).abs().argmin(-1)
    return (levels[nearest] * scales).flatten()[: flat.numel()].view(weight.shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_of_any_shape_comes_back_as_the_rule_says(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(through_nf4(weight, double_quant=False), reference(weight))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_layer_computes_with_these_weights(shape: tuple[int, int], double_quant: bool) -> None:
    """Output and gradient; a layer of odd width was wrong by half of its largest weight."""
    random = torch.Generator().manual_seed(2)
    weight, bias = torch.randn(shape, generator=random), torch.randn(shape[0], generator=random)
    layer = Linear4bit(
        shape[1], shape[0], compute_dtype=torch.float32, compress_statistics=double_quant,
        quant_type="nf4",
    )  # fmt: skip
    layer.weight = Params4bit(
        weight, requires_grad=False, quant_type="nf4", compress_statistics=double_quant
    )
    layer.bias = torch.nn.Parameter(bias, requires_grad=False)
    layer = layer.to("cpu")
    mend_cpu_layers(layer)
    x = torch.randn(5, shape[1], generator=random, requires_grad=True)
    found = layer(x)
    found.sum().backward()
    seen = through_nf4(weight, double_quant=double_quant)
    torch.testing.assert_close(found, x @ seen.T + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, seen.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_dora_is_refused_where_it_would_read_other_weights(
    tmp_path: Path, quantization: str
) -> None:
    """On a CPU PEFT reads odd NF4 layers by the broken kernel, and int8 layers without scales."""
    model = load(make("baichuan_13b", tmp_path / "odd"), quantization=quantization)
    with pytest.raises(RecipeError, match=r"lora.use_dora: model.layers.0.*on a CPU") as caught:
        attach(model, LoraSection(use_dora=True), 1)
    assert "\n" not in str(caught.value)


def test_a_loaded_model_of_odd_width_is_mended(tmp_path: Path) -> None:
    folder = make("baichuan_13b", tmp_path / "odd")
    assert load(folder).config.hidden_size % BLOCK, "the checkpoint must be of odd width"
    plain, stored = load(folder), load(folder, quantization="nf4")
    name = "model.layers.0.self_attn.q_proj"
    x = torch.randn(2, plain.config.hidden_size, generator=torch.Generator().manual_seed(3))
    expected = x @ through_nf4(plain.get_submodule(name).weight, double_quant=True).T
    torch.testing.assert_close(stored.get_submodule(name)(x), expected, rtol=1e-5, atol=1e-5)
