"""NF4 against the rule written again (C41): blocks of 64 weights over the ends of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit

from raytune_ft.config.schema import LoraSection
from raytune_ft.errors import RecipeError
from raytune_ft.model.adapter import attach
from raytune_ft.model.nf4 import mend_cpu_layers, through_nf4
from tests.families.checkpoints import make
from tests.families.loaded import load

SHAPES = [(64, 64), (64, 112), (100, 112), (7, 13), (3, 5), (96, 32), (40, 80), (1, 64)]
BLOCK = 64


SCALES = 256
"""Scales that share a scale of their own, where they are quantised too."""


def levels() -> torch.Tensor:
    """Make the 16 levels of arXiv 2305.14314, appendix E: quantiles of a normal distribution."""
    last = 0.9677083
    above = torch.special.ndtri(torch.linspace(last, 0.5, 9, dtype=torch.float64))[:-1]
    below = torch.special.ndtri(torch.linspace(last, 0.5, 8, dtype=torch.float64))[:-1]
    found = torch.cat([-below, torch.zeros(1, dtype=torch.float64), above]).sort().values
    return (found / found.max()).float()


def scale_levels() -> torch.Tensor:
    """Make the 256 levels of arXiv 2110.02861, section 2.1: 7 decades, each finer than the last."""
    found = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float64)
        means = 10.0 ** (decade - 6) * (edges[:-1] + edges[1:]) / 2
        found += [*means.tolist(), *(-means).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32)


def rounded(
    values: torch.Tensor, block: int, code: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the nearest levels (n, block), and the largest value (n, 1) that scales a block."""
    padding = -values.numel() % block
    blocks = torch.cat([values, values.new_zeros(padding)]).view(-1, block)
    largest = blocks.abs().amax(1, keepdim=True)
    nearest = ((blocks / largest).unsqueeze(-1) - code).abs().argmin(-1)
    return code[nearest], largest


def in_blocks(values: torch.Tensor, block: int) -> torch.Tensor:
    flat = values.flatten()
    return torch.cat([flat, flat.new_zeros(-flat.numel() % block)]).view(-1, block)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
LARGE = [(300, 112), (130, 257)]
"""With more than 256 scales."""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_a_weight_of_any_shape_comes_back_as_the_rule_says(
    shape: tuple[int, int], device: str
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = through_nf4(weight.to(device), double_quant=False).cpu()
    shares, scales = rounded(weight.flatten(), BLOCK, levels())
    expected = (shares * scales).flatten()[: weight.numel()].view(shape)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE])
def test_scales_go_through_8_bits_less_their_mean(shape: tuple[int, int], device: str) -> None:
    """Each to the nearest level; the library is free between two that are as near to 1e-4."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = in_blocks(through_nf4(weight.to(device), double_quant=True).cpu(), BLOCK)
    shares, scales = rounded(weight.flatten(), BLOCK, levels())
    full = shares.abs().argmax(1, keepdim=True)
    seen = found.gather(1, full) / shares.gather(1, full)
    torch.testing.assert_close(found, shares * seen, rtol=1e-6, atol=1e-6)

    mean = scales.mean()
    parts, largest = rounded((scales - mean).flatten(), SCALES, scale_levels())
    nearest = (parts * largest).flatten()[: len(scales)] + mean
    room = 1e-4 * largest.expand(-1, SCALES).flatten()[: len(scales)] + 1e-6
    wrong, least = (seen - scales).abs().flatten(), (nearest - scales.flatten()).abs()
    assert (wrong <= least + room).all()


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
