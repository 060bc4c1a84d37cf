"""Guard: a tokenizer whose special tokens have names that no text can spell.

Where a user's text holds a special token's words, the template's own special tokens are renamed
before encoding, and the user's are left as the plain text that they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Tokenizer

from raytune_ft.data.tokenizing.sentencepiece_file import SPACE, spare_from_prefix

Span = tuple[int, int]
"""Characters [start, end) of a text."""

# Private characters: no normaliser maps anything to them.
SIGN, END = "\ue000", "\ue001"
# HTML that Gemma's vocabulary holds as added tokens; it is text, not a mark of roles.
HTML = {
    "table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "h1", "h2", "h3", "h4", "h5",
    "h6", "blockquote", "strong", "em", "b", "i", "u", "sub", "sup", "code", "ul", "ol", "li",
}  # fmt: skip


def is_marker(token: AddedToken) -> bool:
    """Tell whether a token must not be made of a user's text.

    All special tokens are markers, and the added ones that are words of some kind (`<eoh>`); but
    not the runs of spaces and the HTML that some vocabularies have as added tokens.
    """
    if token.special:
        return True
    text = token.content.replace(SPACE, " ").strip()
    return bool(text) and text.strip("</>") not in HTML


class Guard:
    """Encodes texts that hold special tokens of both kinds: genuine, and a user's words."""

    def __init__(self, tokenizer_json: str, markers: Mapping[int, str]) -> None:
        self._json = tokenizer_json
        self._markers = markers
        self._built: dict[str, tuple[Tokenizer, dict[int, int]]] = {}

    def encode(self, text: str, genuine: Sequence[tuple[Span, int]]) -> list[int]:
        """Return the ids of `text` in which only the `genuine` special tokens count.

        Args:
            text: a whole text, as the tokenizer itself would take it.
            genuine: (span, id) of special tokens, ascending and apart.
        """
        longest = max(map(len, re.findall(f"{SIGN}+", text)), default=0)
        sign = SIGN * (longest + 1)
        if sign not in self._built:
            self._built = {sign: self._build(sign)}
        backend, real = self._built[sign]
        parts, done = [], 0
        for (start, end), id_ in genuine:
            parts += [text[done:start], _name(sign, id_)]
            done = end
        ids = backend.encode("".join([*parts, text[done:]]), add_special_tokens=False).ids
        return [real.get(id_, id_) for id_ in ids]

    def _build(self, sign: str) -> tuple[Tokenizer, dict[int, int]]:
        """Return the renamed tokenizer, and the real ids where its own differ."""
        parsed: dict[str, Any] = json.loads(self._json)
        tokens = {
            entry["id"]: _renamed(entry, sign, self._markers) for entry in parsed["added_tokens"]
        }
        spare_from_prefix(parsed, [t.content for t in tokens.values() if t.normalized])
        backend = Tokenizer.from_str(
            json.dumps(parsed | {"added_tokens": [], "post_processor": None})
        )
        backend.add_tokens([*_fillers(parsed["model"]["vocab"], sign), *tokens.values()])
        real = {}
        for id_, token in tokens.items():
            own = backend.token_to_id(token.content)
            if own is not None:
                real[own] = id_
        return backend, real


def _name(sign: str, number: int) -> str:
    return f"{sign}{number}{END}"


def _renamed(entry: Mapping[str, Any], sign: str, markers: Mapping[int, str]) -> AddedToken:
    text = _name(sign, entry["id"]) if entry["id"] in markers else entry["content"]
    keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return AddedToken(text, **{key: entry[key] for key in keys})


def _fillers(vocab: Mapping[str, int] | Sequence[Any], sign: str) -> list[str]:
    """Name tokens for the holes of a vocabulary: the library gives a new token id `len(vocab)`."""
    if not isinstance(vocab, Mapping):
        return []
    holes = max(vocab.values(), default=-1) + 1 - len(vocab)
    return [f"{sign}filler{number}{END}" for number in range(holes)]
