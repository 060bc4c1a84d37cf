"""Random weights of a real shape, made on the device in seconds: a config.json in, a model out.

Loading 14 GB from a disk would take longer than the steps that a benchmark is about. What comes
out is what `model.loading.load_model` gives: frozen, in the compute type, quantised layer by layer
as transformers does it, the output head left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from raytune_ft.config.schema import ModelSection
from raytune_ft.model.families import detect, translate
from raytune_ft.model.loading import compute_dtype

SMALL = 0.25
"""Of the weights that a network begins with; trained models' activations have few outliers."""


def random_model(
    config_json: Mapping[str, Any], section: ModelSection, device: torch.device
) -> nn.Module:
    """Make a causal language model of this config.json with random weights."""
    dtype = compute_dtype(section, device)
    config = translate(config_json)
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = detect(config_json).network(config)(config)
    finally:
        torch.set_default_dtype(default)
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # int8 layers keep columns of large activations apart
            parameter.mul_(SMALL)
    if section.quantization != "none":
        from raytune_ft.model.nf4 import mend_cpu_layers

        _quantise(model, section, dtype, device)
        mend_cpu_layers(model)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def _quantise(
    model: nn.Module, section: ModelSection, dtype: torch.dtype, device: torch.device
) -> None:
    head = model.get_output_embeddings()  # type: ignore[operator]
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            model.set_submodule(name, _quantised(module, section, dtype, device))


def _quantised(
    linear: nn.Linear, section: ModelSection, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    weight = linear.weight.data
    if section.quantization == "int8":
        new = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0, device="meta")
        kept = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        # `.to` quantises what comes from the host only
        new.weight = kept._quantize(device) if device.type == "cuda" else kept.to(device)
    else:
        new = bnb.nn.Linear4bit(*sizes, dtype, section.double_quant, "nf4", device="meta")
        new.weight = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=section.double_quant,
            quant_type="nf4",
            module=new,
        ).to(device)
    new.bias = linear.bias
    return new.requires_grad_(False)
