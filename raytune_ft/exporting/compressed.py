"""8-bit safetensors: merged tensors in, those of the compressed-tensors format out.

vLLM reads it by itself, transformers with the package compressed-tensors. Linear layers but the
head get a scale per row; activations are quantised per token as they come (`dynamic`), so nothing
has to be calibrated. The same schemes as llm-compressor's FP8_DYNAMIC and W8A8 without smoothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import torch

from raytune_ft.model.updates import row_blocks

LARGEST = {"fp8": 448.0, "int8": 127.0}
"""Of float8_e4m3fn and of int8, both symmetric."""
FORMATS = {"fp8": "float-quantized", "int8": "int-quantized"}


def tensors(
    given: Iterator[tuple[str, torch.Tensor]], linear: Collection[str], kind: str
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors with those named in `linear` quantised, each followed by its scales."""
    for name, tensor in given:
        if name not in linear:
            yield name, tensor
            continue
        packed, scales = quantized(tensor, kind)
        yield name, packed
        yield f"{name}_scale", scales


def quantized(weight: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a weight (out, in) in 8 bits and its scales (out, 1) in the weight's own type."""
    dtype = torch.float8_e4m3fn if kind == "fp8" else torch.int8
    packed = torch.empty(weight.shape, dtype=dtype)
    scales = (weight.abs().amax(1, keepdim=True).float() / LARGEST[kind]).to(weight.dtype)
    scales = scales.clamp_min(torch.finfo(weight.dtype).tiny)
    for rows in row_blocks(weight):
        divided = weight[rows].float() / scales[rows].float()
        divided = divided.clamp(-LARGEST[kind], LARGEST[kind])
        packed[rows] = (divided if kind == "fp8" else divided.round()).to(dtype)
    return packed, scales


def config_of(kind: str, head: str) -> dict[str, Any]:
    """Return `quantization_config` of config.json; `head` is the module that is left as it is."""
    number: dict[str, Any] = {
        "num_bits": 8, "type": "float" if kind == "fp8" else "int", "symmetric": True,
    }  # fmt: skip
    group = {
        "targets": ["Linear"],
        "weights": {**number, "strategy": "channel", "dynamic": False},
        "input_activations": {**number, "strategy": "token", "dynamic": True},
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": FORMATS[kind],
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": [head],
        "kv_cache_scheme": None,
    }
