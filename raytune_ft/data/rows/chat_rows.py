"""Chat rows: lists of messages in three common shapes in, one shape with checked roles out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.data.rows.columns import OR_SKIP, describe, list_in, names, shown, text_in
from raytune_ft.data.rows.tool_rows import calls_in
from raytune_ft.data.segments import Message
from raytune_ft.errors import DataError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
}
"""Roles of OpenAI's messages, today's and earlier ones, and what they are here."""
SENDERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
    "function": "tool",
}
"""Senders of ShareGPT's messages; a `function_call` is an answer that calls tools."""
_CALLS = ("function_call", "tool_call")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_FOLLOWS: Mapping[str, tuple[str, ...]] = {
    "": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}
"""Role -> roles that may come next."""


def from_messages(value: Any, where: str) -> list[Message]:
    """Read OpenAI's [{role, content}, ...], with tool calls and reasoning.

    Raises:
        DataError: a message lacks a part, holds more than text, or stands in the wrong place.
    """
    return check_roles(read_messages(value, where), where)


def read_messages(value: Any, where: str) -> list[Message]:
    """Read messages as `from_messages`, in any order of roles: part of a conversation."""
    messages = []
    for place, item in enumerate(list_in(value, where), start=1):
        at = f"{where}, message {place}"
        role = field(item, "role", at)
        if item.get("weight") == 0:
            raise DataError(
                f"{at} has 'weight' 0, and messages are not left out one by one; "
                f"set data.sources[].loss, {OR_SKIP}"
            )
        message: Message = {"role": ROLES.get(role, role), **_answer_parts(item, at)}
        message["content"] = _content(item, at, optional="tool_calls" in message)
        for key in ("name", "tool_call_id"):
            if message["role"] == "tool" and item.get(key) is not None:
                message[key] = text_in(item[key], f"{at}, '{key}'")
        messages.append(message)
    return messages


def _answer_parts(item: Mapping[str, Any], where: str) -> Message:
    """Read what an answer has beside its content: reasoning and tool calls."""
    parts: Message = {}
    for key in _REASONING:
        if item.get(key) is not None:
            parts["reasoning_content"] = text_in(item[key], f"{where}, '{key}'")
            break
    for key in ("tool_calls", "function_call"):
        if item.get(key):
            parts["tool_calls"] = calls_in(item[key], f"{where}, '{key}'")
            break
    return parts


def _content(item: Mapping[str, Any], where: str, *, optional: bool) -> str:
    """Read a message's text, which may be a list of parts."""
    content = item.get("content")
    if content is None and optional:
        return ""
    if not isinstance(content, list):
        return field(item, "content", where)
    texts = []
    for part in content:
        if not isinstance(part, Mapping):
            raise DataError(
                f"{where} holds a part that is {describe(part)}, not an object; "
                f"correct the row, {OR_SKIP}"
            )
        kind = part.get("type", "text")
        if kind != "text":
            kind = f"'{shown(kind)}'" if isinstance(kind, str) else describe(kind)
            raise DataError(
                f"{where} holds a part of type {kind}, and only text is learned; "
                f"correct the row, {OR_SKIP}"
            )
        texts.append(field(part, "text", where))
    return "".join(texts)


def from_senders(value: Any, where: str) -> list[Message]:
    """Read ShareGPT's [{from, value}, ...], tool calls and their results among them.

    Raises:
        DataError: as `from_messages`.
    """
    return check_roles(read_senders(value, where), where)


def read_senders(value: Any, where: str) -> list[Message]:
    """Read messages as `from_senders`, in any order of roles: part of a conversation."""
    messages = []
    for place, item in enumerate(list_in(value, where), start=1):
        at = f"{where}, message {place}"
        sender, content = field(item, "from", at), field(item, "value", at)
        message: Message = {"role": SENDERS.get(sender, sender), "content": content}
        if sender in _CALLS:
            message = {"role": "assistant", "content": "", "tool_calls": calls_in(content, at)}
        messages.append(message)
    return messages


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
            f"{where} has no '{key}'; it has: {names(item)}; correct the row, {OR_SKIP}"
        )
    return text_in(item[key], f"{where}, '{key}'")


def check_roles(messages: list[Message], where: str) -> list[Message]:
    """Return the messages if their roles are in order.

    In order is: system first if at all, then user and assistant in turn, between two answers any
    number of tool results, assistant last; or a lone assistant message (text to pre-train on).
    DataError otherwise.
    """
    if len(messages) == 1 and messages[0]["role"] == "assistant":
        return messages
    last = ""
    for number, message in enumerate(messages, start=1):
        role = message["role"]
        if role == "system" and number == 1:
            continue
        if role not in _FOLLOWS[last]:
            due = " or ".join(f"'{expected}'" for expected in _FOLLOWS[last])
            found = f"role '{role}'" if role in ROLES.values() else f"unknown role '{shown(role)}'"
            raise DataError(
                f"{where}, message {number} has {found} where {due} is due; order is "
                "system (optional), then user and assistant in turn; "
                "correct the row, or leave it out with data.on_error: skip"
            )
        last = role
    if messages and last != "assistant":
        raise DataError(
            f"{where} ends with role '{messages[-1]['role']}', not with an answer; "
            "add the assistant's message, or leave the row out with data.on_error: skip"
        )
    return messages
