"""Chat: a trained result in, answers out, with the template and the base it was trained on.

`source` finds out what a path is, `model` generates, `text` keeps characters whole,
`history` keeps a conversation inside the context, `terminal` is the program. No ray.
"""

from raytune_ft.chat.model import ChatModel, Piece, Sampling, open_chat
from raytune_ft.chat.source import ChatSource, find_source
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
