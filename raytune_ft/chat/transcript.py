"""A conversation in a file: saved by /save, taken up again by /load."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raytune_ft.chat.history import Message
from raytune_ft.errors import DataError
from raytune_ft.training.run_folder import write_json

KIND = "raytune_ft chat"
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Transcript:
    """What is kept of a conversation."""

    model: str
    system: str
    messages: list[Message]
    params: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write the file; DataError if it is there and is no saved conversation."""
        if path.exists() and not _is_ours(path):
            raise DataError(f"{path}: exists and is no saved conversation; choose another name")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {"kind": KIND, **asdict(self)})
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None

    @classmethod
    def load(cls, path: Path) -> Transcript:
        """Read a file that `save` wrote; DataError says what is wrong with another one."""
        content = _read(path)
        if content.get("kind") != KIND:
            raise DataError(f"{path}: no saved conversation; /save writes them")
        model, system, params = (content.get(key) for key in ("model", "system", "params"))
        messages = content.get("messages")
        texts = isinstance(model, str) and isinstance(system, str)
        if not texts or not isinstance(params, dict) or not _messages(messages):
            raise DataError(f"{path}: damaged; it was changed after it was saved")
        return cls(str(model), str(system), list(messages or ()), params)


def _messages(found: Any) -> bool:
    return isinstance(found, list) and all(
        isinstance(one, dict)
        and one.keys() == {"role", "content"}
        and one["role"] in ROLES
        and isinstance(one["content"], str)
        for one in found
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError as error:
        raise DataError(f"{path}: no saved conversation ({error})") from None
    return content if isinstance(content, dict) else {}


def _is_ours(path: Path) -> bool:
    try:
        return _read(path).get("kind") == KIND
    except DataError:
        return False
