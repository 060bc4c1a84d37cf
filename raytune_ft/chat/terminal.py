"""`raytune-ft chat`: talk to a model in the terminal, or to two beside each other.

Answers go to stdout, everything else to stderr. Ctrl-C stops an answer, not the program.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft.chat.feedback import Feedback
from raytune_ft.chat.source import find_source, with_adapter
from raytune_ft.errors import RaytuneError, RecipeError

if TYPE_CHECKING:
    from raytune_ft.chat.history import Message
    from raytune_ft.chat.model import ChatModel, Sampling
    from raytune_ft.chat.reading import Read
    from raytune_ft.chat.sides import Side

ROWS = "chat_rows"
"""Folder of what /good and /bad keep."""


def run_chat(
    path: str,
    *,
    ask: Sequence[str] = (),
    bits: int | None = None,
    system: str | None = None,
    temperature: float = 0.1,
    top_p: float = 0.75,
    top_k: int = 40,
    max_new_tokens: int = 512,
    seed: int = 0,
    adapter: str | None = None,
    template: str | None = None,
    compare: str | None = None,
    rows: str = ROWS,
    plain: bool = False,
) -> int:
    """Chat with the model at `path` until the user leaves; return the exit code.

    Args:
        path: a run folder, adapter, model folder, or `smollm2-135m-instruct`.
        ask: questions to answer, each on its own, instead of reading from the terminal.
        bits: 4, 8, 16 or 32; none: the precision that training saw.
        system: system text; none: that of the training rows; empty: none at all.
        temperature: 0 answers greedily.
        top_p: nucleus, 0 to 1.
        top_k: candidates per token.
        max_new_tokens: longest answer.
        seed: of the first answer; each later one takes the next number.
        adapter: an adapter folder, put onto the model at `path`.
        template: prompt template; none: that of the training rows.
        compare: `base`: the model without its adapter answers as well; or another path.
        rows: folder of the training rows that /good and /bad write.
        plain: text as it comes instead of markdown.

    Raises:
        RaytuneError: the path or an option cannot be used; one line, before torch is loaded.
    """
    source = with_adapter(path, adapter, bits) if adapter else find_source(path, bits)
    if template is not None:
        source = replace(source, template=template)
    _check_comparison(compare, has_adapter=source.adapter is not None, bits=bits)
    from raytune_ft.chat.model import Sampling, load_source
    from raytune_ft.chat.sides import Side

    chat = load_source(source, log=_say)
    sides = [Side(chat.name, chat)]
    if compare is not None:
        other = _compared(compare, chat, bits)
        sides.append(Side(other.name, other))
    talk = Conversation(
        sides, Sampling(temperature, top_p, top_k, max_new_tokens, seed),
        Feedback(Path(rows).expanduser()), plain=plain,
    )  # fmt: skip
    if system is not None:
        talk.set_system(system)
    if ask:
        return _answer_all(talk, ask)
    from raytune_ft.chat.commands import COMMANDS, LEAVE
    from raytune_ft.chat.reading import reader

    return talk.run(reader([*COMMANDS, *LEAVE]))


def _check_comparison(compare: str | None, *, has_adapter: bool, bits: int | None) -> None:
    if compare == "base" and not has_adapter:
        raise RecipeError(
            "--compare base: there is no adapter that could be taken off; "
            "name the model to compare with: --compare PATH"
        )
    if compare not in (None, "base"):
        find_source(compare or "", bits)


def _compared(compare: str, chat: ChatModel, bits: int | None) -> ChatModel:
    from raytune_ft.chat.model import load_source
    from raytune_ft.chat.sides import BASE, without_adapter

    if compare == BASE:
        return without_adapter(chat)
    return load_source(find_source(compare, bits), log=_say)


def _answer_all(talk: Conversation, questions: Sequence[str]) -> int:
    for question in questions:
        print(f"> {question}")
        for side in talk.sides:
            side.messages = []
        talk.turns = 0
        talk.answer(question)
        if talk.stopped:
            return 130
    return 0


@dataclass
class Conversation:
    """One conversation with one side, or with two that are asked the same."""

    sides: list[Side]
    sampling: Sampling
    feedback: Feedback = field(default_factory=lambda: Feedback(Path(ROWS)))
    plain: bool = False
    turns: int = 0
    """Answers given so far; the next one's seed is that much higher."""
    stopped: bool = field(default=False, init=False)
    """Whether the last answer was stopped."""

    def run(self, read: Read) -> int:
        """Answer what `read` returns until it raises EOFError or the user leaves."""
        from raytune_ft.chat.commands import LEAVE

        names = " and ".join(side.label for side in self.sides)
        _say(f"{names} {'is' if len(self.sides) == 1 else 'are'} ready. "
             "/help lists commands, Ctrl-D leaves.")  # fmt: skip
        while True:
            try:
                text = read()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                _say("Ctrl-D or /exit leaves.")
                continue
            if text in LEAVE:
                return 0
            if text.startswith("/"):
                self._command(text)
            elif text:
                self.answer(text)

    @property
    def messages(self) -> list[Message]:
        """The conversation with the first side."""
        return self.sides[0].messages

    def set_system(self, system: str) -> None:
        """Start every conversation with this text; empty: with none."""
        for side in self.sides:
            side.chat = replace(side.chat, system=system)

    def last_question(self) -> str:
        """Return the last question; RecipeError if nothing was asked."""
        asked = [one["content"] for one in self.messages if one["role"] == "user"]
        if not asked:
            raise RecipeError("nothing was asked yet")
        return asked[-1]

    def last_answers(self) -> list[tuple[list[Message], str]]:
        """Return for each side the messages that its last answer answers, and that answer."""
        self.last_question()
        return [
            (side.chat.with_system(side.messages[:-1]), side.messages[-1]["content"])
            for side in self.sides
        ]

    def replace_answers(self, answer: str) -> None:
        """Let all sides go on as if they had said this."""
        for side in self.sides:
            side.messages[-1] = {"role": "assistant", "content": answer}

    def answer(self, question: str) -> bool:
        """Ask all sides; return whether it could be asked."""
        asked = [self._fitted(side, question) for side in self.sides]
        fitting = [messages for messages in asked if messages is not None]
        if len(fitting) < len(self.sides):
            return False
        answers = self._show(fitting)
        self.turns += 1
        for side, messages, answer in zip(self.sides, fitting, answers, strict=True):
            side.messages = [*messages, {"role": "assistant", "content": answer}]
        return True

    def _fitted(self, side: Side, question: str) -> list[Message] | None:
        """Return the messages to ask, without turns that no longer fit; None if nothing does."""
        asked: list[Message] = [*side.messages, {"role": "user", "content": question}]
        kept = side.chat.trim(asked, self.sampling.max_new_tokens)
        if len(kept) < len(asked):
            _say(f"({len(asked) - len(kept)} oldest messages no longer fit and are forgotten)")
        if len(side.chat.encode(kept)) >= side.chat.context:
            _say(f"too long: the model reads {side.chat.context} tokens at most; ask in parts")
            return None
        return kept

    def _show(self, asked: Sequence[list[Message]]) -> list[str]:
        """Write the answers while they are generated; Ctrl-C ends all of them."""
        from raytune_ft.chat.rendering import writer_for
        from raytune_ft.chat.sides import in_turn

        sampling = replace(self.sampling, seed=self.sampling.seed + self.turns)
        labels = [side.label for side in self.sides]
        texts, counts, began = [""] * len(labels), [0] * len(labels), time.monotonic()
        with _interruptible() as stopped:
            streams = [
                side.chat.pieces(side.chat.encode(messages), sampling, stopped.is_set)
                for side, messages in zip(self.sides, asked, strict=True)
            ]
            writer = writer_for(sys.stdout, labels, plain=self.plain)
            try:
                for number, piece in in_turn(streams):
                    texts[number] += piece.text
                    counts[number] = piece.n_tokens
                    writer.push(number, piece.text)
            finally:
                self.stopped = stopped.is_set()
                writer.end("stopped" if self.stopped else "")
        if sys.stdout.isatty():
            _say(_speed(sum(counts), time.monotonic() - began))
        return texts

    def _command(self, line: str) -> None:
        from raytune_ft.chat.commands import COMMANDS, HELP

        name, _, rest = line.partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            _say(f"no command '{name}'\n{HELP}")
            return
        try:
            said = command.run(self, rest.strip())
        except RaytuneError as error:
            said = str(error)
        if said:
            _say(said)


def _speed(n_tokens: int, seconds: float) -> str:
    return f"({n_tokens} tokens, {n_tokens / max(seconds, 1e-6):.1f} tokens/s)"


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, so that it never breaks into the middle of a forward pass."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return

    def stop(*_: Any) -> None:
        event.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
