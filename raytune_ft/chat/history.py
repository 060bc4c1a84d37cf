"""A conversation's turns, kept inside the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Message = dict[str, str]


def trim_turns(
    messages: Sequence[Message], count_tokens: Callable[[list[Message]], int], limit: int
) -> list[Message]:
    """Drop the oldest whole turns until the conversation has at most `limit` tokens.

    A turn is a user message with the answers that follow it. System messages in front and the
    last turn always stay, so a single over-long question is returned over-long.
    """
    system, turns = split_turns(messages)
    while len(turns) > 1 and count_tokens(_join(system, turns)) > limit:
        turns = turns[1:]
    return _join(system, turns)


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """Split a conversation into its leading system messages and its turns."""
    system: list[Message] = []
    turns: list[list[Message]] = []
    for message in messages:
        if message["role"] == "system" and not turns:
            system.append(message)
        elif message["role"] == "user" or not turns:
            turns.append([message])
        else:
            turns[-1].append(message)
    return system, turns


def _join(system: list[Message], turns: list[list[Message]]) -> list[Message]:
    return system + [message for turn in turns for message in turn]
