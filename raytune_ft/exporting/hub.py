"""Hub: an exported folder in, a repository of the Hugging Face hub out, private where it is new.

Uploads are huggingface_hub's own, at HF_ENDPOINT. The token is read from the environment for this
call alone: it is written nowhere, and cut out of what the client says when it fails. What names
folders of this machine stays here.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raytune_ft.errors import RecipeError
from raytune_ft.exporting.beside import MARKER
from raytune_ft.exporting.card import CARD

NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
ADAPTER_CONFIG = "adapter_config.json"


def check(name: str) -> None:
    """Refuse before anything is written what cannot be sent afterwards.

    Raises:
        RecipeError: `name` is none, or the environment holds no token.
    """
    if NAME.fullmatch(name) is None:
        raise RecipeError(f"--push-to-hub '{name}': no name of a repository; write org/model")
    _token()


def push(folder: Path, name: str, tell: Callable[[str], None]) -> str:
    """Send a folder's files as one commit; return the repository's address.

    Large files that the hub has already, of an upload that was cut off, are not sent again.

    Raises:
        RecipeError: the hub did not take it; the folder stands.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    check(name)
    disable_progress_bars()  # they would stand between the lines
    token = _token()
    api = HfApi(token=token)
    try:
        repository = api.create_repo(name, private=True, exist_ok=True)
        operations = [CommitOperationAdd(*file) for file in _files(folder, repository.repo_id)]
        tell(f"{repository.repo_id}: sending {len(operations)} files")
        api.create_commit(
            repository.repo_id, operations, commit_message=f"{folder.name}, raytune_ft"
        )
    except Exception as error:  # the client raises its own, httpx's and the system's errors
        reason = " ".join(str(error).split()).replace(token, "***") or type(error).__name__
        raise RecipeError(
            f"--push-to-hub {name}: the hub did not take it ({reason[:300]}); {folder} stands, and "
            "the same command goes on with what is missing"
        ) from None
    return str(repository)


def _token() -> str:
    token = next((value for key in VARIABLES if (value := os.environ.get(key))), None)
    if token is None:
        raise RecipeError(
            "--push-to-hub: no token; set HF_TOKEN in the environment to one that may write"
        )
    return token


def _files(folder: Path, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (name there, path or content) without what only this machine knows."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            yield path.name, _content(path, name)


def _content(path: Path, name: str) -> str | bytes:
    if path.name == CARD:
        text = path.read_text(encoding="utf-8")
        return re.sub(r'from_pretrained\("[^"]*"\)', f'from_pretrained("{name}")', text).encode()
    key = {MARKER: "base", ADAPTER_CONFIG: "base_model_name_or_path"}.get(path.name)
    if key is None:
        return str(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    base = content.get(key)
    if isinstance(base, str) and Path(base).is_absolute():
        content[key] = Path(base).name
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()
