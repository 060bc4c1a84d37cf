"""Adapters: low-rank updates attached to, saved from and loaded onto a frozen model.

Folders are PEFT's own (adapter_config.json, adapter_model.safetensors), so plain peft reads them,
and they are always for the base as it is in its files, whatever the adapter began with.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from raytune_ft.config.schema import LoraSection
from raytune_ft.errors import CheckpointError, ModelError, RecipeError
from raytune_ft.model import beginnings, new_tokens
from raytune_ft.model.beginnings import PEFT_PREFIX, Source
from raytune_ft.model.families.fused_adapter import to_native
from raytune_ft.model.families.layout import IDENTITY, Layout, Widths, widths_of
from raytune_ft.model.merge import MergeReport, merge_to
from raytune_ft.model.silence import quiet
from raytune_ft.model.tensors import load_pickled, load_tensors, save_tensors

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = [
    "MergeReport", "Source", "attach", "has_head", "keep_beginning", "load_adapter", "merge_to",
    "save_adapter", "trains_head",
]  # fmt: skip

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
"""What PEFT wrote until 0.7 (November 2023)."""
HEAD = "lm_head"


def attach(
    model: nn.Module,
    lora: LoraSection,
    seed: int,
    *,
    source: Source | None = None,
    kept: Path | None = None,
    new_ids: Collection[int] = (),
) -> PeftModel:
    """Wrap a frozen model with a new adapter.

    The weights depend on `seed` alone, and for some beginnings on the base and the first rows,
    whatever drew random numbers before; the caller's random state is left as it was. What is
    trained is float32, but whole modules of half-precision models.

    Args:
        model: as `load_model` gave it; `pissa` and `olora` change its weights.
        lora: the recipe's section.
        seed: of the random numbers.
        source: what `loftq` and `eva` look at.
        kept: where `keep_beginning` wrote, if it did, this very beginning is taken from.
        new_ids: tokens whose rows are trained beside the adapter; the model has these rows.

    Raises:
        RecipeError: a name in `lora.targets` or `lora.modules_to_save` is not in the model, or
            the adapter cannot begin so.
    """
    again = kept is not None and (kept / CONFIG_FILE).is_file()
    if kept is not None and again:
        config = read_adapter_config(kept)
        config.inference_mode = False
    else:
        config = _new_config(model, lora, new_ids)
    _prepare_head(model, config)
    with torch.random.fork_rng(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        wrapped = _wrapped(model, config)
        if kept is not None and again:
            _put_weights(wrapped, read_adapter_weights(kept), kept)
            if beginnings.moves_base(lora.init_lora_weights):
                beginnings.take_out(wrapped)
        else:
            beginnings.begin(wrapped, lora, source)
    return wrapped


def _new_config(model: nn.Module, lora: LoraSection, new_ids: Collection[int]) -> Any:
    from peft import EvaConfig, LoraConfig

    targets, whole = _targets(model, lora), _modules_to_save(model, lora)
    if lora.use_dora and getattr(model, "quantization_method", None) is not None:
        from raytune_ft.model.nf4 import check_dora  # bitsandbytes takes seconds to import

        check_dora(model)
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=whole or None,
        init_lora_weights=beginnings.peft_init(lora),
        eva_config=EvaConfig() if lora.init_lora_weights == "eva" else None,
        trainable_token_indices=new_tokens.trained_rows(model, new_ids, targets, whole),
    )


def _wrapped(model: nn.Module, config: Any) -> PeftModel:
    from peft import get_peft_model

    wrapped = get_peft_model(cast(Any, model), config)
    for name, parameter in wrapped.named_parameters():
        if "trainable_tokens_delta" in name:  # as PEFT has it for A and B
            parameter.data = parameter.data.float()
    return wrapped


def linear_names(model: nn.Module) -> list[str]:
    """Return the full names of all linear layers but the output head, in the model's order."""
    from transformers.pytorch_utils import Conv1D

    head = getattr(model, "get_output_embeddings", lambda: None)()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    ]


def save_adapter(model: nn.Module, folder: Path, base: str) -> None:
    """Write the adapter as PEFT does; the configuration comes last and names `base`.

    Where a beginning moved the base's weights, what is written has twice the rank: the trained
    product less the first one, so that it is right on the base as it was.
    """
    config: dict[str, Any] = cast(Any, model).peft_config["default"].to_dict()
    first = beginnings.first_of(model)
    tensors = beginnings.on_base(_adapter_state(model), first)
    if first:
        r, alpha = config["r"], config["lora_alpha"]
        config |= {"r": 2 * r, "lora_alpha": 2 * alpha}
        if config["use_rslora"]:
            config |= {"use_rslora": False, "lora_alpha": 2 * alpha * math.sqrt(r)}
    _write(folder, tensors, {**config, "base_model_name_or_path": base, "inference_mode": True})


def keep_beginning(
    model: nn.Module, folder: Path, weights: dict[str, torch.Tensor] | None = None
) -> None:
    """Write what an adapter begins with, for `attach` in a later process.

    Args:
        model: has the adapter.
        folder: target.
        weights: to begin with instead of the adapter's own, under PEFT's names.
    """
    config = cast(Any, model).peft_config["default"].to_dict()
    _write(folder, weights or _adapter_state(model), config)


def _write(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {key: _plain(value) for key, value in config.items()}
    # how it began is no matter of who loads it: PEFT would begin anew, and change the base again
    content |= {"init_lora_weights": True, "eva_config": None, "loftq_config": {}}
    if isinstance(content["target_modules"], list):
        content["target_modules"] = sorted(content["target_modules"])
    save_tensors(
        {key: value.detach().cpu().contiguous() for key, value in tensors.items()},
        folder / WEIGHTS_FILE,
    )
    (folder / CONFIG_FILE).write_text(
        json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def load_adapter(model: nn.Module, folder: Path) -> PeftModel:
    """Put a saved adapter onto a model, for inference; strict in both directions.

    Its names may be the original network's (`W_pack`, `query_key_value` ...) or ours.

    Raises:
        CheckpointError: a file is missing, or saved tensors, targets and model do not match.
    """
    layout = getattr(type(model), "layout", IDENTITY)
    config, weights = read_adapter(folder, layout, widths_of(cast(Any, model).config))
    _check_targets(model, config, folder)
    _prepare_head(model, config)
    new_tokens.widen(model, _rows(model, config, weights))
    with torch.random.fork_rng(), quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config.inference_mode = True
        try:
            wrapped = _wrapped(model, config)
        except ValueError as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{folder}: adapter does not fit the model ({reason})") from None
        _put_weights(wrapped, weights, folder)
    wrapped.eval()
    return wrapped


def _put_weights(wrapped: PeftModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    from peft import set_peft_model_state_dict

    _check_same(folder, weights, _adapter_state(wrapped))
    set_peft_model_state_dict(wrapped, weights)


def _rows(model: Any, config: Any, weights: dict[str, torch.Tensor]) -> int:
    """Return the rows that an adapter's tokens need in the embedding."""
    found = config.trainable_token_indices or {}
    listed = found.values() if isinstance(found, dict) else [found]
    needed = [max(ids) + 1 for ids in listed if ids]
    for name, module in model.named_modules():
        if module in (model.get_input_embeddings(), model.get_output_embeddings()):
            saved = weights.get(f"{PEFT_PREFIX}{name}.weight")
            needed += [] if saved is None else [len(saved)]
    return max(needed, default=0)


def read_adapter(
    folder: Path, layout: Layout, widths: Widths
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return LoraConfig and tensors of an adapter folder under the network's names.

    Raises:
        CheckpointError: the folder holds no adapter, or one of another model.
    """
    config, weights = read_adapter_config(folder), read_adapter_weights(folder)
    return to_native(config, weights, layout, widths, str(folder))


def trains_head(lora: LoraSection) -> bool:
    """Tell whether an adapter of this shape changes the output head."""
    targets = [] if lora.targets == "all-linear" else lora.targets
    return _names_head([*targets, *lora.modules_to_save])


def has_head(folder: Path) -> bool:
    """Tell whether a saved adapter changes the output head."""
    return _names_head(_trained_names(read_adapter_config(folder)))


def read_adapter_config(folder: Path) -> Any:
    """Return the LoraConfig of an adapter folder; CheckpointError if there is none."""
    from peft import LoraConfig, PeftConfig

    try:
        content = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if content.get("peft_type") != "LORA":
            raise CheckpointError(
                f"{folder}: adapter of type '{content.get('peft_type')}'; only LORA is readable"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: cannot be read ({error}); give the folder of an adapter"
        ) from None
    if not isinstance(config, LoraConfig):
        raise CheckpointError(f"{folder}: not a LoRA adapter; only LORA is readable")
    return config


def read_adapter_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter folder; CheckpointError if they cannot be read."""
    file, pickled = folder / WEIGHTS_FILE, folder / PICKLED_FILE
    if not file.is_file() and pickled.is_file():
        try:
            return load_pickled(pickled)
        except ModelError as error:
            raise CheckpointError(str(error)) from None
    try:
        return load_tensors(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file}: cannot be read ({error}); export the adapter again"
        ) from None


def _adapter_state(model: nn.Module) -> dict[str, torch.Tensor]:
    from peft import get_peft_model_state_dict

    # "auto" would ask the hub whether the vocabulary was resized; here it never is
    state: dict[str, torch.Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return state


def _targets(model: nn.Module, lora: LoraSection) -> list[str]:
    names = linear_names(model)
    leaves = sorted({name.rpartition(".")[2] for name in names})
    if lora.targets == "all-linear":
        reached = [n for n, _ in model.named_modules() if n.rpartition(".")[2] in leaves]
        return leaves if set(reached) == set(names) else names
    modules = [name for name, _ in model.named_modules()]
    for target in lora.targets:
        if not any(_ends_with(name, target) for name in modules):
            here = getattr(type(model), "layout", IDENTITY).leaves_of(target)
            hint = f"'{target}' of its files is {', '.join(here)} here; " if here else ""
            raise RecipeError(
                f"lora.targets: the model has no layer '{target}'; {hint}its linear layers are "
                f"{', '.join(leaves)}"
            )
    return list(lora.targets)


def _modules_to_save(model: nn.Module, lora: LoraSection) -> list[str]:
    modules = [name for name, _ in model.named_modules()]
    for wanted in lora.modules_to_save:
        if not any(_ends_with(name, wanted) for name in modules):
            raise RecipeError(
                f"lora.modules_to_save: the model has no module '{wanted}'; "
                "embed_tokens and lm_head are the usual ones"
            )
    return list(lora.modules_to_save)


def _check_targets(model: nn.Module, config: Any, folder: Path) -> None:
    if isinstance(config.target_modules, str):  # a pattern; PEFT fails if nothing matches it
        return
    modules = [name for name, _ in model.named_modules()]
    for target in sorted(config.target_modules or ()):
        if not any(_ends_with(name, target) for name in modules):
            raise CheckpointError(
                f"{folder}: adapter target '{target}' is not in the model; "
                "load the adapter onto the base model that it was trained on"
            )


def _check_same(
    folder: Path, saved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]
) -> None:
    wrong = sorted(set(saved) ^ set(expected)) or sorted(
        name for name, tensor in saved.items() if tensor.shape != expected[name].shape
    )
    if wrong:
        where = "file" if wrong[0] in saved else "model"
        raise CheckpointError(
            f"{folder}: {len(wrong)} adapter tensors differ between file and model, first "
            f"'{wrong[0]}' of the {where}; load the adapter onto the base model that it was "
            "trained on"
        )


def _names_head(names: Iterable[str]) -> bool:
    return any(HEAD in name for name in names)


def _trained_names(config: Any) -> list[str]:
    """Return what a LoraConfig names: targets, or the pattern of targets, and whole modules."""
    targets = config.target_modules or ()
    named = [targets] if isinstance(targets, str) else list(targets)
    return [*named, *(config.modules_to_save or ())]


def _prepare_head(model: nn.Module, config: Any) -> None:
    """Give PEFT the layer for Baichuan2's head, whose update belongs inside its rows' lengths."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not hasattr(head, "fold"):
        return
    from raytune_ft.model.families.norm_head import LoraNormHead, NormHead

    config._register_custom_module({NormHead: LoraNormHead})
    if cast(Any, head).folded and _names_head(_trained_names(config)):
        raise ModelError("the head was loaded as frozen; load_model needs head_trained=True")


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _plain(value: Any) -> Any:
    """Turn sets into sorted lists and enums into texts: the same file at each run."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    return getattr(value, "value", value)
