"""Chat rows: rows that are conversations already, in three common shapes, with roles checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.data.columns import list_in, text_in
from raytune_ft.data.segments import Message
from raytune_ft.errors import DataError

ROLES = ("system", "user", "assistant")
SENDERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def from_messages(value: Any, where: str) -> list[Message]:
    """Read [{role, content}, ...]."""
    items = list_in(value, where)
    messages = []
    for place, item in enumerate(items, start=1):
        role = field(item, "role", f"{where}, message {place}")
        content = field(item, "content", f"{where}, message {place}")
        messages.append({"role": role, "content": content})
    return check_roles(messages, where)


def from_senders(value: Any, where: str) -> list[Message]:
    """Read [{from, value}, ...], senders human/user, gpt/assistant and system."""
    items = list_in(value, where)
    messages = []
    for place, item in enumerate(items, start=1):
        sender = field(item, "from", f"{where}, message {place}")
        content = field(item, "value", f"{where}, message {place}")
        messages.append({"role": SENDERS.get(sender, sender), "content": content})
    return check_roles(messages, where)


def from_conversation(value: Any, where: str) -> list[Message]:
    """Read XTuner's standard form [{system, input, output}, ...].

    One turn with an empty input and no system is text to pre-train on.
    """
    messages: list[Message] = []
    items = list_in(value, where)
    for place, item in enumerate(items, start=1):
        at = f"{where}, turn {place}"
        system = text_in(item.get("system") or "", f"{at}, 'system'")
        user = text_in(item.get("input") or "", f"{at}, 'input'")
        if system:
            messages.append({"role": "system", "content": system})
        if user or system or len(items) > 1:
            messages.append({"role": "user", "content": user})
        messages.append({"role": "assistant", "content": field(item, "output", at)})
    return messages


def field(item: Mapping[str, Any], key: str, where: str) -> str:
    """Return a text field of one message; DataError if it is missing or no text."""
    if key not in item:
        raise DataError(
            f"{where} has no '{key}'; it has: {', '.join(map(str, item)) or 'nothing'}; "
            "correct the row, or leave it out with data.on_bad_row: skip"
        )
    return text_in(item[key], f"{where}, '{key}'")


def check_roles(messages: list[Message], where: str) -> list[Message]:
    """Return the messages if their roles are in order.

    In order is: system first if at all, then user and assistant in turn, assistant last; or a lone
    assistant message (text to pre-train on). DataError otherwise.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return messages
    for place, message in enumerate(turns):
        role, expected = message["role"], ("user", "assistant")[place % 2]
        if role != expected:
            number = place + 1 + len(messages) - len(turns)
            found = f"role '{role}'" if role in ROLES else f"unknown role '{role}'"
            raise DataError(
                f"{where}, message {number} has {found} where '{expected}' is due; order is "
                "system (optional), then user and assistant in turn; "
                "correct the row, or leave it out with data.on_bad_row: skip"
            )
    if messages and messages[-1]["role"] != "assistant":
        raise DataError(
            f"{where} ends with role '{messages[-1]['role']}', not with an answer; "
            "add the assistant's message, or leave the row out with data.on_bad_row: skip"
        )
    return messages
