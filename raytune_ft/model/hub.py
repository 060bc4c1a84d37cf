"""Models of the Hugging Face hub: a name in, a local folder out. Weights and texts, no code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from raytune_ft.errors import ModelError

FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
]


def snapshot(name: str, log: Callable[[str], None]) -> Path:
    """Return the local copy of a hub model, fetched if it is not there yet.

    Raises:
        ModelError: the hub cannot be reached or has no such model for this account.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=FILES, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        log(f"{name}: fetching from the hub")
    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the client raises its own, httpx's and the system's errors
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ModelError(
            f"{name}: no such folder here, and the hub did not give it ({reason}); "
            "copy the model to this machine and set model.path to its folder"
        ) from None
