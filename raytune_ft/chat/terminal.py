"""`raytune-ft chat`: talk to a model in the terminal.

Answers go to stdout, everything else to stderr. Ctrl-C stops an answer, not the program.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TextIO

from raytune_ft.chat.source import find_source, with_adapter
from raytune_ft.chat.text import printable

if TYPE_CHECKING:
    from raytune_ft.chat.history import Message
    from raytune_ft.chat.model import ChatModel, Sampling

HELP = """\
/reset   forget the conversation        /exit, Ctrl-D   leave
/help    show this                      Ctrl-C          stop the answer"""


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

    Raises:
        RaytuneError: the path or an option cannot be used; one line, before torch is loaded.
    """
    source = with_adapter(path, adapter, bits) if adapter else find_source(path, bits)
    if template is not None:
        source = replace(source, template=template)
    from raytune_ft.chat.model import Sampling, load_source

    chat = load_source(source, log=_say)
    if system is not None:
        chat = replace(chat, system=system)
    sampling = Sampling(temperature, top_p, top_k, max_new_tokens, seed)
    if ask:
        return _answer_all(chat, ask, sampling)
    return Conversation(chat, sampling).run(_reader())


def _answer_all(chat: ChatModel, questions: Sequence[str], sampling: Sampling) -> int:
    for question in questions:
        print(f"> {question}")
        stopped = _stream(chat, [{"role": "user", "content": question}], sampling, sys.stdout)[1]
        print(flush=True)
        if stopped:
            return 130
    return 0


@dataclass
class Conversation:
    """One interactive conversation."""

    chat: ChatModel
    sampling: Sampling
    messages: list[Message] = field(default_factory=list)
    turns: int = 0

    def run(self, read: Callable[[], str]) -> int:
        """Answer what `read` returns until it raises EOFError or the user leaves."""
        _say(f"{self.chat.name} is ready. /help lists commands, Ctrl-D leaves.")
        while True:
            try:
                line = read().strip()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                _say("Ctrl-D or /exit leaves.")
                continue
            if line in ("/exit", "/quit"):
                return 0
            if line.startswith("/"):
                self._command(line)
            elif line:
                self._answer(line)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self.messages.clear()
            _say("The conversation is forgotten.")
        elif line == "/help":
            _say(HELP)
        else:
            _say(f"no command '{line}'\n{HELP}")

    def _answer(self, line: str) -> None:
        asked: list[Message] = [*self.messages, {"role": "user", "content": line}]
        kept = self.chat.trim(asked, self.sampling.max_new_tokens)
        if len(kept) < len(asked):
            _say(f"({len(asked) - len(kept)} oldest messages no longer fit and are forgotten)")
        if len(self.chat.encode(kept)) >= self.chat.context:
            _say(f"too long: the model reads {self.chat.context} tokens at most; ask in parts")
            return
        sampling = replace(self.sampling, seed=self.sampling.seed + self.turns)
        answer, stopped = _stream(self.chat, kept, sampling, sys.stdout)
        self.turns += 1
        self.messages = [*kept, {"role": "assistant", "content": answer}]
        print(" [stopped]\n" if stopped else "\n", flush=True)


def _stream(
    chat: ChatModel, messages: list[Message], sampling: Sampling, out: TextIO
) -> tuple[str, bool]:
    """Write an answer while it is generated; return it and whether Ctrl-C stopped it."""
    answer = ""
    with _interruptible() as stopped:
        for piece in chat.pieces(chat.encode(messages), sampling, stopped.is_set):
            answer += piece.text
            out.write(printable(piece.text))
            out.flush()
        out.write("\n")
    return answer, stopped.is_set()


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn Ctrl-C into an event, so that it never breaks into the middle of a forward pass."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGINT, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, before)


def _reader() -> Callable[[], str]:
    """Return a function that reads one line, with editing and history on a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return _read_plain
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    return lambda: session.prompt("you> ")


def _read_plain() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
