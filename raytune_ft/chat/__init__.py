"""Chat: a trained result in, answers out, with the template and the base it was trained on.

`source` finds out what a path is, `model` generates, `text` keeps characters whole,
`history` keeps a conversation inside the context, `terminal` is the program. No ray.

`model` is imported when it is first asked for, so that a wrong path is reported before torch
is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raytune_ft.chat.source import ChatSource, find_source

if TYPE_CHECKING:
    from raytune_ft.chat.model import ChatModel, Piece, Sampling, open_chat
    from raytune_ft.chat.terminal import run_chat

__all__ = [
    "ChatModel",
    "ChatSource",
    "Piece",
    "Sampling",
    "find_source",
    "open_chat",
    "run_chat",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in ("ChatModel", "Piece", "Sampling", "open_chat"):
        return getattr(import_module("raytune_ft.chat.model"), name)
    if name == "run_chat":
        return import_module("raytune_ft.chat.terminal").run_chat
    raise AttributeError(f"module 'raytune_ft.chat' has no attribute '{name}'")
