"""Thoughts in an answer's text: pieces of text in, what is thought and what is said out.

Models that reason write `<think>...</think>` in front of what they say; the chat templates of
some open the thought themselves, so that the answer begins inside it. Clients know the thought as
`reasoning_content`, the name by which DeepSeek's API tells it and templates take it back.
"""

from __future__ import annotations

from dataclasses import dataclass

from raytune_ft.serving.tool_calls import CallReader, Read

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Told:
    """What one more piece adds."""

    said: str = ""
    thought: str = ""


class ThoughtReader:
    """Parts one answer as it is written.

    Text passes at once, but what may be the beginning of a mark is held back until it is known.
    White space beside the marks belongs to the template and is left out. Only the first thought
    is one, and only at the answer's beginning: marks elsewhere are text.
    """

    def __init__(self, *, reads: bool, opened: bool = False) -> None:
        """Begin an answer.

        Args:
            reads: whether the model's template has words for thoughts; else everything is said.
            opened: whether the prompt ends inside a thought.
        """
        self._held = ""
        self._place = "said" if not reads else "thought" if opened else "start"
        self._begun = not reads  # white space in front is left out until something stands there

    def push(self, text: str) -> Told:
        """Take the next piece."""
        self._held += text
        return self._read(final=False)

    def flush(self) -> Told:
        """Return what was held back, at the end of the answer."""
        return self._read(final=True)

    def _read(self, *, final: bool) -> Told:
        if self._place == "start":
            self._open(final=final)
        thought = self._thought(final=final) if self._place == "thought" else ""
        return Told(self._passed() if self._place == "said" else "", thought)

    def _open(self, *, final: bool) -> None:
        """Leave the start, where it is known what the answer begins with."""
        shown = self._held.lstrip()
        if shown.startswith(OPEN):
            self._place, self._held = "thought", shown.removeprefix(OPEN)
        elif final or not OPEN.startswith(shown):
            self._place, self._begun = "said", True

    def _thought(self, *, final: bool) -> str:
        """Take what is thought for certain; behind its end the rest is said."""
        end = self._held.find(CLOSE)
        if end >= 0:
            inner, self._held = self._held[:end], self._held[end + len(CLOSE) :]
            self._place = "said"
            thought, self._begun = self._trimmed(inner.rstrip()), False
            return thought
        keep = 0 if final else _unsure(self._held)
        inner = self._held[: len(self._held) - keep]
        self._held = self._held[len(inner) :]
        return self._trimmed(inner.rstrip() if final else inner)

    def _passed(self) -> str:
        text, self._held = self._held, ""
        return self._trimmed(text)

    def _trimmed(self, text: str) -> str:
        """Leave out white space in front of the first word."""
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        return text


class Reading:
    """Parts an answer's text into what is thought, what is said, and calls."""

    def __init__(self, thoughts: ThoughtReader, calls: CallReader) -> None:
        self._thoughts, self._calls = thoughts, calls

    @property
    def found(self) -> int:
        """Calls so far."""
        return self._calls.found

    def push(self, text: str, *, final: bool) -> tuple[Read, str]:
        """Take the next piece; return what is said and called with it, and what is thought."""
        told = self._thoughts.push(text)
        read, thought = self._calls.push(told.said), told.thought
        if final:
            rest = self._thoughts.flush()
            for last in (self._calls.push(rest.said), self._calls.flush()):
                read = Read(read.text + last.text, read.calls + last.calls)
            thought += rest.thought
        return read, thought


def _unsure(text: str) -> int:
    """Return the length of the tail that may belong to the closing mark: its start, white space."""
    for size in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if CLOSE.startswith(text[-size:]):
            return size + _blank(text[:-size])
    return _blank(text)


def _blank(text: str) -> int:
    return len(text) - len(text.rstrip())
