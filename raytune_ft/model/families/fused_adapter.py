"""Adapters trained on the original network: names of the files in, names of ours out. Exact.

A low-rank update B A of a fused layer is the same A for each of its parts, with B's rows divided
as the layer's rows are. So adapters that XTuner v0.1.9 trained on `W_pack`, `query_key_value` or
`c_attn` go onto the native network as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from raytune_ft.errors import CheckpointError
from raytune_ft.model.families.layout import Layout, Widths

PEFT_PREFIX = "base_model.model."
SHARED = "lora_A"
"""What all parts of a fused layer have in common; everything else is divided by rows."""

Weights = dict[str, torch.Tensor]


def to_native(
    config: Any, weights: Weights, layout: Layout, widths: Widths, where: str
) -> tuple[Any, Weights]:
    """Return an adapter under the network's names; one that has them already is returned as is.

    Args:
        config: PEFT's LoraConfig.
        weights: names as in adapter_model.safetensors.
        layout: of the base model's family.
        widths: rows of the base model's query and key layers.
        where: the adapter's folder, for messages.

    Raises:
        CheckpointError: the adapter is for another size of model, or has a rank per layer.
    """
    found = {name: layout.source_of(name.removeprefix(PEFT_PREFIX)) for name in weights}
    if not any(found.values()):
        return config, weights
    if config.rank_pattern or config.alpha_pattern:
        raise CheckpointError(
            f"{where}: rank_pattern or alpha_pattern under the original network's names is not "
            "readable; merge the adapter with the tool that trained it"
        )
    native: Weights = {}
    for name, tensor in weights.items():
        source = found[name]
        if source is None:
            native[name] = tensor
        else:
            native |= _divided(*source, tensor, layout, widths, where)
    targets = {n.partition(f".{SHARED}")[0] for n in native if f".{SHARED}" in n}
    names = sorted(target.removeprefix(PEFT_PREFIX) for target in targets)
    saved = [
        native
        for name in config.modules_to_save or ()
        for native in layout.leaves_of(name) or [name]
    ]
    return replace(config, target_modules=names, modules_to_save=saved or None), native


def _divided(
    module: str, rest: str, tensor: torch.Tensor, layout: Layout, widths: Widths, where: str
) -> Weights:
    parts = layout.natives(module, widths)
    end = parts[-1][1].stop
    if end is not None and not rest.startswith(SHARED) and len(tensor) != end:
        raise CheckpointError(
            f"{where}: '{module}' has {len(tensor)} rows in the adapter and {end} in the model; "
            "load the adapter onto the base model that it was trained on"
        )
    return {
        f"{PEFT_PREFIX}{native}.{rest}": tensor if rest.startswith(SHARED) else tensor[rows].clone()
        for native, rows in parts
    }
