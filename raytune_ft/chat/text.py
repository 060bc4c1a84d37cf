"""Tokens in, text out, without ever showing half a character."""

from __future__ import annotations

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"
LONGEST_TAIL = 3
"""Bytes, and so tokens, of an unfinished UTF-8 character; replacement signs it decodes to."""


class Detokenizer:
    """Turn token ids into text piece by piece.

    One token may hold part of a character, and a token's text may depend on its left neighbour
    (SentencePiece's leading space). So the tail since the last but one safe point is decoded
    again, and what may still change is held back. A character that never ends is never shown.

    Cost: O(tokens of one word) per token for valid text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._safe = 0  # tokens of `_ids` that end with a whole character
        self._shown = 0  # characters of decode(_ids) given out

    def push(self, token: int) -> str:
        """Return the text that `token` completes; empty inside a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        tail = len(text) - len(text.rstrip(REPLACEMENT))
        if tail and len(self._ids) - self._safe <= LONGEST_TAIL:
            return ""
        # beyond that the bytes are broken, or characters begin and end in the middle of tokens
        end = len(text) - min(tail, LONGEST_TAIL)
        new = text[self._shown : end]
        self._shown = max(self._shown, end)
        if not tail:
            self._move_window(text)
        return new

    def _move_window(self, text: str) -> None:
        """Forget all before the last safe point, which becomes the left context."""
        if self._safe:
            self._ids = self._ids[self._safe :]
            text = self._decode(self._ids)
        self._shown = len(text)
        self._safe = len(self._ids)


class StopStrings:
    """Cut a text stream before the first of some stop strings.

    What could be the beginning of a stop string is held back until it is known to be none.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """Return the text that is safe to show; sets `found` when a stop string is complete."""
        self._held += text
        hits = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if hits:
            self.found = True
            return self._take(min(hits), drop_rest=True)
        return self._take(len(self._held) - self._unsure())

    def flush(self) -> str:
        """Return what was held back, at the end of the stream."""
        return self._take(len(self._held))

    def _take(self, end: int, *, drop_rest: bool = False) -> str:
        text, rest = self._held[:end], self._held[end:]
        self._held = "" if drop_rest else rest
        return text

    def _unsure(self) -> int:
        """Return the length of the longest tail that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0


def printable(text: str) -> str:
    """Drop control characters, so that an answer cannot steer the terminal it is shown on."""
    return "".join(c for c in text if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160))
