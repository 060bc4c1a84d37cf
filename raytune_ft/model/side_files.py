"""What stands beside the weights: config.json, tokenizer files, the model's own Python files.

In the original layout they are the base's own, byte for byte, so that the tools that knew the
model open it. In the native layout config.json is written anew and files that only the original's
tools understand are left behind.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from raytune_ft.errors import ModelError
from raytune_ft.model.loading import read_config, weight_files
from raytune_ft.model.original import Original
from raytune_ft.model.silence import quiet
from raytune_ft.model.tensors import tensor_names

WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
SKIPPED_FILES = {"model.safetensors.index.json", "pytorch_model.bin.index.json", "README.md"}
ORIGINAL_ONLY_SUFFIXES = {".py", ".model", ".tiktoken"}
ORIGINAL_ONLY_FILES = {
    "config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
}  # fmt: skip
NOTHING = object()
MAX_SHARD_SIZE = "5GB"


def copy_side_files(
    original: Original, folder: Path, *, untied: bool = False, rows: int | None = None
) -> None:
    """Copy everything but weights from the base's folder.

    Args:
        original: the base.
        folder: target.
        untied: the head is its own now.
        rows: of the embedding, where tokens were added; the tokenizer is the caller's.
    """
    for file in _side_files(original.folder):
        shutil.copyfile(file, folder / file.name)
    _change_config(folder, _changes(untied=untied, rows=rows))


def is_native(original: Original) -> bool:
    """Tell whether a model's files are as transformers has the network."""
    return not original.family.layout.rules and original.family.name == "native"


def _changes(*, untied: bool, rows: int | None) -> dict[str, Any]:
    tied = {"tie_word_embeddings": False} if untied else {}
    return tied | ({"vocab_size": rows} if rows is not None else {})


def _change_config(folder: Path, changes: dict[str, Any]) -> None:
    if not changes:
        return
    config = read_config(folder)
    inner = config.get("text_config")
    if isinstance(inner, dict) and "vocab_size" in changes:
        config["text_config"] = inner | {"vocab_size": changes["vocab_size"]}
    _write_config(folder, config | changes)


def write_native_files(
    original: Original, folder: Path, *, untied: bool, rows: int | None = None
) -> None:
    """Write what describes the native network; the tokenizer is the caller's.

    A model whose files are native already keeps all of them. Arguments as for `copy_side_files`.
    """
    if is_native(original):
        copy_side_files(original, folder, untied=untied, rows=rows)
        return
    for file in _side_files(original.folder):
        left = file.suffix in ORIGINAL_ONLY_SUFFIXES or file.name in ORIGINAL_ONLY_FILES
        if not left:
            shutil.copyfile(file, folder / file.name)
    _write_config(folder, native_config(original) | _changes(untied=untied, rows=rows))


def native_config(original: Original) -> dict[str, Any]:
    """Return the config.json of the native network."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

    network = MODEL_FOR_CAUSAL_LM_MAPPING[type(original.config)]
    # what every configuration has says nothing about this network
    common = PreTrainedConfig().to_dict()
    content = original.config.to_dict() | {"architectures": [network.__name__]}
    return {key: value for key, value in content.items() if common.get(key, NOTHING) != value}


def save_full(model: Any, base_folder: Path, folder: Path) -> None:
    """Write a model that was trained in full, in the layout of the base that it came from.

    Args:
        model: as `load_model` gave it, trained.
        base_folder: the folder that it was loaded from.
        folder: target.

    Raises:
        ModelError: the written tensors are not those of the base.
    """
    original = Original.of(base_folder)
    rows = len(model.get_input_embeddings().weight)
    with quiet():
        model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE)
    for file in weight_files(folder):
        file.chmod(0o644)  # safetensors makes them private
    _check_names(original, folder)
    grown = rows != original.config.get_text_config().vocab_size
    copy_side_files(original, folder, rows=rows if grown else None)
    _state_dtype(folder, model.dtype)


def _check_names(original: Original, folder: Path) -> None:
    """Compare with the base: what transformers gives back must be what it took."""
    if not original.family.layout.rules:
        return
    files = tensor_names(weight_files(original.folder))
    wanted = {name: shape for name, shape in files.items() if not original.family.is_spare(name)}
    written = tensor_names(weight_files(folder))
    if wrong := sorted(set(wanted.items()) ^ set(written.items())):
        raise ModelError(
            f"{folder}: {len(wrong)} tensors differ from those of {original.folder}, first "
            f"'{wrong[0][0]}'; the base was changed while it was trained"
        )


def _state_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Let config.json name the type of the weights, if it names another."""
    config, written = read_config(folder), str(dtype).removeprefix("torch.")
    key = "dtype" if "dtype" in config else "torch_dtype"
    if config.get(key, "float32") != written:
        _write_config(folder, config | {key: written})


def _side_files(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.iterdir())
        if file.is_file()
        and file.suffix not in WEIGHT_SUFFIXES
        and file.name not in SKIPPED_FILES
        and not file.name.startswith(".")
    ]


def _write_config(folder: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    (folder / "config.json").write_text(text + "\n", encoding="utf-8")
