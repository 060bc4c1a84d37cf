"""Adapters beside each other on one base: a saved one in, the same model with one more out.

`model.adapter.load_adapter` puts a run's own adapter on its base; here others join it, each under
a key of its own, none of them active until it is switched to.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from raytune_ft.errors import CheckpointError
from raytune_ft.model.adapter import has_head, read_adapter
from raytune_ft.model.families.layout import IDENTITY, widths_of


def add_adapter(model: Any, folder: Path, key: str) -> Any:
    """Put a saved adapter onto a model that may have others; strict in both directions.

    Args:
        model: a base, or one that peft has wrapped.
        folder: of the adapter; its names may be the original network's or ours.
        key: peft's name for it, new and without dots.

    Returns:
        The model, wrapped by peft; the adapter is in evaluation.

    Raises:
        CheckpointError: files are missing, or adapter and model do not match.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    layout = getattr(type(base), "layout", IDENTITY)
    config, weights = read_adapter(folder, layout, widths_of(base.config))
    _check(base, config, folder)
    config.inference_mode = True
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if base is model:
                model = get_peft_model(model, config, adapter_name=key)
            else:
                model.add_adapter(key, config)
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{folder}: adapter does not fit the model ({reason})") from None
        expected = get_peft_model_state_dict(model, adapter_name=key, save_embedding_layers=False)
        wrong = sorted(set(weights) ^ set(expected)) or sorted(
            name for name, tensor in weights.items() if tensor.shape != expected[name].shape
        )
        if wrong:
            model.unload() if len(model.peft_config) == 1 else model.delete_adapter(key)
            raise CheckpointError(
                f"{folder}: {len(wrong)} adapter tensors differ between file and model, first "
                f"'{wrong[0]}'; serve the adapter on the base that it was trained on"
            )
        set_peft_model_state_dict(model, weights, adapter_name=key)
    model.eval()
    return model


def _check(base: Any, config: Any, folder: Path) -> None:
    if config.bias != "none":
        raise CheckpointError(f"{folder}: trains biases of the base; serve it on its own")
    if config.trainable_token_indices or config.modules_to_save:
        raise CheckpointError(f"{folder}: trains whole modules of the base; serve it on its own")
    head = getattr(base, "get_output_embeddings", lambda: None)()
    if hasattr(head, "fold") and has_head(folder):
        raise CheckpointError(f"{folder}: trains this base's head; serve it on its own")
