"""Whole turns are dropped, oldest first, and never more than needed."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.chat.history import Message, split_turns, trim_turns


def count(messages: list[Message]) -> int:
    return sum(len(m["content"]) for m in messages)


CONVERSATIONS = st.builds(
    lambda system, turns, last: [
        *([{"role": "system", "content": system}] if system else []),
        *(
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ),
        {"role": "user", "content": last},
    ],
    st.text("s", max_size=5),
    st.lists(st.tuples(st.text("q", max_size=9), st.text("a", max_size=9)), max_size=6),
    st.text("l", max_size=9),
)


@given(messages=CONVERSATIONS, limit=st.integers(0, 60))
def test_trimming_keeps_the_newest_whole_turns(messages: list[Message], limit: int) -> None:
    kept = trim_turns(messages, count, limit)
    system, turns = split_turns(messages)
    kept_system, kept_turns = split_turns(kept)
    assert kept_system == system
    assert kept_turns == turns[len(turns) - len(kept_turns) :]
    assert kept[-1] == messages[-1]
    assert count(kept) <= limit or len(kept_turns) == 1
    if len(kept_turns) < len(turns):
        one_more = turns[-len(kept_turns) - 1]
        assert count(kept) + count(one_more) > limit
