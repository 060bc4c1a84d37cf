"""NF4 weights unpacked as bitsandbytes does it, bit for bit, both ways on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from raytune_ft.errors import ModelError
from raytune_ft.kernels.nf4 import Nf4Weight, dequantize
from raytune_ft.model.nf4 import dequantized

SHAPES = [(64, 96), (3, 64), (129, 70), (7, 13), (1, 1), (5, 2600)]
"""Blocks within rows, over their ends, cut short; weights that fill no byte and no word."""


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    """Let bitsandbytes' way for odd widths run as it stands; it would be compiled."""
    with torch.compiler.set_stance("force_eager"):
        yield


def _linear(
    out: int, width: int, dtype: torch.dtype, double_quant: bool = True, **given: Any
) -> Linear4bit:
    layer = Linear4bit(width, out, bias=False, quant_type="nf4")
    random = torch.Generator().manual_seed(out * width)
    weight = (torch.randn(out, width, generator=random) * 0.02).to(dtype)
    layer.weight = Params4bit(
        weight, quant_type="nf4", compress_statistics=double_quant, module=layer, **given
    )
    return layer.to("cpu")


def _packed(layer: Linear4bit) -> torch.Tensor:
    return layer.weight.data.view(torch.uint8)


def _assert_same(got: torch.Tensor, exact: torch.Tensor, way: str) -> None:
    assert (got.shape, got.dtype) == (exact.shape, exact.dtype)
    if way == "triton" and got.dtype == torch.bfloat16:
        # the interpreter cuts numbers off where a GPU rounds: tests/gpu has the equality there
        one_place = exact.float().abs() * 2**-7
        assert ((got.float() - exact.float()).abs() <= one_place).all()
    else:
        assert torch.equal(got, exact)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_weights_are_bitsandbytes_own(
    shape: tuple[int, int], dtype: torch.dtype, double_quant: bool, way: str
) -> None:
    layer = _linear(*shape, dtype, double_quant)
    exact = dequantized(layer.weight.data, layer.weight.quant_state)

    _assert_same(dequantize(Nf4Weight.of(layer)), exact, way)


@pytest.mark.parametrize("given", [{"blocksize": 128}, {"quant_storage": torch.bfloat16}])
def test_other_blocks_and_storage(given: dict[str, Any], way: str) -> None:
    """FSDP wants packed weights stored in the type of the others."""
    layer = _linear(36, 100, torch.float32, **given)
    exact = dequantized(_packed(layer), layer.weight.quant_state)

    _assert_same(dequantize(Nf4Weight.of(layer)), exact, way)


def test_packed_bytes_that_begin_anywhere(way: str) -> None:
    layer = _linear(8, 64, torch.float32)
    exact = dequantized(layer.weight.data, layer.weight.quant_state)
    buffer = torch.empty(layer.weight.numel() + 1, dtype=torch.uint8)
    buffer[1:] = layer.weight.data.view(-1)
    layer.weight.data = buffer[1:].view_as(layer.weight)

    _assert_same(dequantize(Nf4Weight.of(layer)), exact, way)


def test_a_given_tensor_is_written(way: str) -> None:
    layer = _linear(9, 64, torch.float32)
    room = torch.full((700,), torch.nan)
    out = room[:576].view(9, 64)

    assert dequantize(Nf4Weight.of(layer), out) is out

    exact = dequantized(layer.weight.data, layer.weight.quant_state)
    _assert_same(out, exact, way)
    assert room[576:].isnan().all()


def test_other_weights_are_refused() -> None:
    fp4 = Linear4bit(64, 3, bias=False, quant_type="fp4").to("cpu")
    for layer in (nn.Linear(64, 3), fp4):
        with pytest.raises(ModelError, match="no NF4 weight"):
            Nf4Weight.of(layer)
    repacked = _linear(2, 64, torch.float32)
    repacked.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ModelError, match="repacked for a CPU"):
        Nf4Weight.of(repacked)
