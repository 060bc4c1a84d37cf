"""Models of the Hugging Face hub: a name in, a local folder out.

Python files come along unread: a merged model in the original layout has to bring them for the
tools that knew the model. Nothing here ever imports one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raytune_ft.errors import ModelError

TEXTS = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.tiktoken",
    "*.jinja",
    "*.py",
]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
PICKLED = ["pytorch_model*.bin", "pytorch_model.bin.index.json"]
"""Fetched only where a model has no safetensors: many of 2023 have not."""


def snapshot(name: str, log: Callable[[str], None]) -> Path:
    """Return the local copy of a hub model, fetched if it is not there yet.

    Raises:
        ModelError: the hub cannot be reached or has no such model for this account.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(
            snapshot_download(
                name, allow_patterns=[*TEXTS, *WEIGHTS, *PICKLED], local_files_only=True
            )
        )
        if _has_weights(found):
            return found
    except (LocalEntryNotFoundError, ValueError):
        pass
    log(f"{name}: fetching from the hub")
    try:
        found = Path(snapshot_download(name, allow_patterns=[*TEXTS, *WEIGHTS]))
        if _has_weights(found):
            return found
        return Path(snapshot_download(name, allow_patterns=[*TEXTS, *PICKLED]))
    except Exception as error:  # the client raises its own, httpx's and the system's errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"{name}: no such folder here, and the hub did not give it ({reason}); "
            "copy the model to this machine and set model.path to its folder"
        ) from None


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in (WEIGHTS[0], PICKLED[0]))
