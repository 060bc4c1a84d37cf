"""An answer's tokens in, its pieces out: whole characters, cut at stop strings, with chances.

Every engine writes its answers by this, so that they cannot differ in their texts.
"""

from __future__ import annotations

import builtins
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from raytune_ft.chat.text import REPLACEMENT, Detokenizer, StopStrings

if TYPE_CHECKING:
    from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
    from raytune_ft.model.sampling import Told

Finish = Literal["stop", "length"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
"""How sentencepiece writes a space inside a token."""


@dataclass(frozen=True)
class Chance:
    """How likely a token was: natural logarithms, of the model's own distribution.

    That is before temperature, penalties and cuts.
    """

    text: str
    """The token alone; with a replacement sign where it is part of a character."""
    bytes: builtins.bytes
    logprob: float
    top: tuple[tuple[str, builtins.bytes, float], ...] = ()
    """Text, bytes and logarithm of the likeliest tokens, the likeliest first."""


@dataclass(frozen=True)
class Piece:
    """A part of an answer: whole characters, and where the answer stands."""

    text: str
    n_tokens: int
    """Tokens generated so far, without the stop token."""
    finish: Finish | None = None
    """Set on the last piece only."""
    chances: tuple[Chance, ...] = ()
    """Of the tokens since the piece before, where `Sampling.logprobs` asks for them."""
    n_cached: int = 0
    """Tokens of the prompt whose keys and values were there from another request."""


class Writing:
    """One answer on its way from tokens to text."""

    def __init__(
        self, tokenizer: TextTokenizer, stop: Sequence[str] = (), n_cached: int = 0
    ) -> None:
        self._tokenizer, self.n_cached = tokenizer, n_cached
        self._detokenizer, self._stops = Detokenizer(tokenizer.decode), StopStrings(stop)
        self.n_tokens = 0

    def push(self, token: int, told: Told | None = None) -> Piece:
        """Return the piece that a token makes; its `finish` is set where a stop string ends it."""
        self.n_tokens += 1
        text = self._stops.push(self._detokenizer.push(token))
        chances = () if told is None else (_chance(self._tokenizer, told),)
        finish: Finish | None = "stop" if self._stops.found else None
        return Piece(text, self.n_tokens, finish, chances, self.n_cached)

    def end(self, finish: Finish) -> Piece:
        """Return the last piece: what was held back."""
        return Piece(self._stops.flush(), self.n_tokens, finish, (), self.n_cached)


def _chance(tokenizer: TextTokenizer, told: Told) -> Chance:
    top = tuple((*spelled(tokenizer, id_), logprob) for id_, logprob in told.top)
    return Chance(*spelled(tokenizer, told.id), told.logprob, top)


@lru_cache(maxsize=65_536)
def spelled(tokenizer: TextTokenizer, token: int) -> tuple[str, bytes]:
    """Return a token's text and its bytes, which may be part of a character."""
    written = tokenizer.written(token)
    byte = _BYTE.fullmatch(written)
    if byte:
        raw = bytes([int(byte[1], 16)])
    elif _SPACE in written:
        raw = written.replace(_SPACE, " ").encode()
    else:
        text = tokenizer.decode([token], skip_special_tokens=False)
        known = REPLACEMENT not in text or any(sign not in _bytes_of() for sign in written)
        raw = text.encode() if known else bytes(_bytes_of()[sign] for sign in written)
    return raw.decode("utf-8", "replace"), raw


@lru_cache(maxsize=1)
def _bytes_of() -> dict[str, int]:
    """Return the byte of each sign of byte-level BPE: printable ones as they are, then others."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    signs: dict[str, int] = {chr(byte): byte for byte in plain}
    return signs | {chr(256 + place): byte for place, byte in enumerate(others)}
