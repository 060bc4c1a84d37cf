"""The terminal program: one-shot questions, turns, Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.chat import ChatModel, Piece, Sampling, open_chat, run_chat
from raytune_ft.chat.sides import Side
from raytune_ft.chat.terminal import Conversation
from raytune_ft.errors import CheckpointError

SAMPLING = Sampling(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=12, seed=1)


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatModel:
    return open_chat(str(tiny_model), device="cpu")


def lines(*typed: str) -> Iterator[str]:
    yield from (line + "\n" for line in typed)


def talk(chat: ChatModel, *typed: str) -> Conversation:
    """Type lines, then Ctrl-D."""
    typing = lines(*typed)
    conversation = Conversation([Side(chat.name, chat)], SAMPLING)

    def read() -> str:
        line = next(typing, None)
        if line is None:
            raise EOFError
        return line.strip()

    assert conversation.run(read) == 0
    return conversation


def test_ask_answers_each_question_on_its_own(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def answers(*questions: str) -> str:
        assert run_chat(str(tiny_model), ask=questions, max_new_tokens=8, seed=3) == 0
        return capsys.readouterr().out

    both, second = answers("who?", "why?"), answers("why?")
    assert both.startswith("> who?\n")
    assert both.endswith(second)


def test_turns_are_remembered_until_reset(chat: ChatModel) -> None:
    conversation = talk(chat, "one", "", "two")
    assert [m["role"] for m in conversation.messages] == ["user", "assistant"] * 2
    assert [m["content"] for m in conversation.messages[::2]] == ["one", "two"]
    assert talk(chat, "one", "/reset").messages == []


def test_commands(chat: ChatModel, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = talk(chat, "/help", "/nonsense", "/exit", "never read")
    assert conversation.messages == []
    shown = capsys.readouterr()
    assert "no command '/nonsense'" in shown.err
    assert "/reset" in shown.err
    assert shown.out == ""


def test_old_turns_are_forgotten_when_the_context_is_full(
    chat: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = talk(chat, *["river " * 60] * 12)
    assert "no longer fit" in capsys.readouterr().err
    assert conversation.turns == 12
    assert len(chat.encode(conversation.messages[:-1])) < chat.context


def test_an_over_long_question_is_not_asked(
    chat: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert talk(chat, "qx" * 3000).turns == 0
    assert f"the model reads {chat.context} tokens at most" in capsys.readouterr().err


class Interrupted(ChatModel):
    """Never ends an answer by itself; Ctrl-C is pressed after its third piece."""

    stop_ids = frozenset()  # type: ignore[assignment]

    def pieces(self, *args: Any, **options: Any) -> Iterator[Piece]:
        for number, piece in enumerate(super().pieces(*args, **options), start=1):
            yield piece
            if number == 3:
                os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_stops_the_answer_and_not_the_program(
    chat: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGINT)
    conversation = talk(Interrupted(**vars(chat)), "tell me")
    assert "[stopped]" in capsys.readouterr().out
    assert conversation.messages[0]["content"] == "tell me"
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_at_the_prompt_does_not_leave(
    chat: ChatModel, capsys: pytest.CaptureFixture[str]
) -> None:
    actions = iter([KeyboardInterrupt, EOFError])

    def read() -> str:
        raise next(actions)

    assert Conversation([Side(chat.name, chat)], SAMPLING).run(read) == 0
    assert "Ctrl-D or /exit leaves" in capsys.readouterr().err


def test_a_wrong_path_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        run_chat(str(tmp_path / "nothing"), ask=["x"])
