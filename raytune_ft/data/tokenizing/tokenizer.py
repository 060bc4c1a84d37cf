"""Tokenizer: text in, token ids out, and back. Special tokens are never made of a user's text.

Runs on the `tokenizers` library; many texts at once go through `fast` where that gives the same
ids. `tokenizer_spec` reads the files of a model folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Encoding, Tokenizer

from raytune_ft import host
from raytune_ft.data.tokenizing.fast import FastTokenizer, fast_tokenizer
from raytune_ft.data.tokenizing.guard import Guard, Span, is_marker
from raytune_ft.data.tokenizing.tokenizer_spec import TokenizerSpec, read_spec

__all__ = ["TextTokenizer", "TokenizerSpec"]

REPLACEMENT = "\ufffd"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
LONE_BYTE = re.compile(r"[\udc80-\udcff]")
TEXTS_PER_THREAD = 64
"""With fewer texts, a thread costs more than it gains."""

# The library's own thread pool would start a thread per core in every data task, and warns in, or
# hangs, each process that is forked from one which has used it. Threads are ours: see `_threads`.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class TextTokenizer:
    """One model's tokenizer; it pickles as its spec, and a process builds each spec once."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._backend, self.content_hash = _built(spec)
        self.bos_ids = spec.bos_ids
        self.text_start_ids = spec.bos_ids if spec.adds_bos else ()
        self.eos_id = spec.eos_id
        self.extra_stop_ids = spec.extra_stop_ids
        self.chat_template = spec.chat_template
        self.named_tokens = dict(spec.named_tokens)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        added: dict[int, AddedToken] = self._backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: id_ for id_, token in added.items() if token.special}
        self.new_tokens = {
            id_: former
            for text, former in spec.new_tokens
            if (id_ := self.token_id(text)) is not None
        }
        self._markers = {
            id_: token.content
            for id_, token in added.items()
            if is_marker(token) and id_ not in self.new_tokens
        }
        self._shy = {id_ for id_, token in added.items() if self._needs_company(token)}
        self._spelled = _spelled([added[id_] for id_ in self._markers], self._backend)

    @classmethod
    def from_folder(
        cls, path: str | Path, eos_token: str | None = None, new_tokens: Sequence[str] = ()
    ) -> TextTokenizer:
        """Read a model folder; ModelError, one line, if that is impossible.

        Args:
            path: the folder.
            eos_token: ends an answer, whatever the folder says; a recipe's `model.eos_token`.
            new_tokens: added behind the folder's own; a recipe's `model.new_tokens`.
        """
        return cls(read_spec(Path(path), eos_token, new_tokens))

    def encode(self, text: str, foreign: Sequence[Span] = ()) -> list[int]:
        """Return the ids of `text`; adds nothing. Special tokens in the text count as such.

        Args:
            text: encoded as a whole, so that nothing depends on where spans begin.
            foreign: character spans [start, end), ascending and apart, in which no special token
                is recognised, nor one that only ends or begins there: it stays plain text.
        """
        if not text:
            return []
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if not foreign or self._markers.keys().isdisjoint(ids):
            return self._in_company(text, ids)
        found = self._found(text, encoding)
        genuine = [marker for marker in found if not _touches(marker[0], foreign)]
        if len(genuine) < len(found):
            return self._guard.encode(text, genuine)
        return self._in_company(text, ids)

    def encode_batch(
        self, texts: Sequence[tuple[str, Sequence[Span]]]
    ) -> list[npt.NDArray[np.int32]]:
        """Return the ids of many texts, int32 (n,) each, exactly as `encode` gives them.

        Args:
            texts: (text, foreign spans), as the arguments of `encode`.

        Raises:
            ModelError: the fast tokenizer was found to give other ids.
        """
        found = self._encode_all([text for text, _ in texts])
        return [
            ids
            if len(ids) != 1 and not self._may_be_forged(text, foreign, ids)
            else np.array(self.encode(text, foreign), np.int32)
            for (text, foreign), ids in zip(texts, found, strict=True)
        ]

    @property
    def engine(self) -> Literal["gigatoken", "tokenizers"]:
        """Which library encodes many texts; the ids are the same."""
        return "tokenizers" if self._fast is None else "gigatoken"

    def _encode_all(self, texts: Sequence[str]) -> list[npt.NDArray[np.int32]]:
        if self._fast is not None:
            return self._fast.encode_all(texts)
        threads = min(_threads(), len(texts) // TEXTS_PER_THREAD)
        if threads < 2:
            return list(self._encode_part(texts))
        with ThreadPoolExecutor(threads) as pool:
            # text by text in turn: neighbours are alike in length where rows are sorted
            parts = list(pool.map(self._encode_part, (texts[i::threads] for i in range(threads))))
        return [next(parts[number % threads]) for number in range(len(texts))]

    def _encode_part(self, texts: Sequence[str]) -> Iterator[npt.NDArray[np.int32]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return (np.array(encoding.ids, np.int32) for encoding in encodings)

    @cached_property
    def _fast(self) -> FastTokenizer | None:
        return fast_tokenizer(self.spec.tokenizer_json, self._backend)

    def _may_be_forged(
        self, text: str, foreign: Sequence[Span], ids: npt.NDArray[np.int32]
    ) -> bool:
        """Tell whether a special token may have been made of a foreign span; in doubt, yes."""
        if not foreign or self._spelled is None:
            return bool(foreign) and not self._markers.keys().isdisjoint(ids.tolist())
        pattern, longest = self._spelled
        for start, end in foreign:
            place = max(0, start - longest + 1)
            while found := pattern.search(text, place, end + longest - 1):
                if found.start() >= end:
                    break
                if found.end() > start:
                    return True
                place = found.start() + 1
        return False

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`; U+FFFD for bytes that are no UTF-8."""
        if skip_special_tokens and self.spec.silent_ids:
            ids = [id_ for id_ in ids if id_ not in self.spec.silent_ids]
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        if REPLACEMENT in text and self._falls_back_to_bytes:
            return self._decode_broken(ids, skip_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """Return the id of a single token by its text, None if there is no such token."""
        id_: int | None = self._backend.token_to_id(text)
        return id_

    def written(self, token: int) -> str:
        """Return a token as the vocabulary writes it; empty if there is no such token."""
        return self._backend.id_to_token(token) or ""

    def _found(self, text: str, encoding: Encoding) -> list[tuple[Span, int]]:
        """List the special tokens that the library recognised: where they are written, id."""
        found = []
        for id_, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id_ in self._markers:
                # a token may swallow spaces beside it, and those may well be foreign
                content = self._markers[id_]
                at = text.find(content, start, end)
                span = (start, end) if at < 0 else (at, at + len(content))
                found.append((span, id_))
        return found

    def _needs_company(self, token: AddedToken) -> bool:
        """Tell whether a text of this token alone lacks sentencepiece's leading space.

        See `sentencepiece_file.prefix`: it spares such a text, but not the same text twice.
        """
        normalizer = self._backend.normalizer
        if normalizer is None or token.special or not token.normalized:
            return False
        return bool(normalizer.normalize_str(token.content) == token.content)

    def _in_company(self, text: str, ids: list[int]) -> list[int]:
        """Return the ids of `text` with the space that a token alone lacks."""
        if len(ids) != 1 or ids[0] not in self._shy:
            return ids
        twice: list[int] = self._backend.encode(text * 2, add_special_tokens=False).ids
        return twice[: twice.index(ids[0]) + 1]

    @cached_property
    def _guard(self) -> Guard:
        return Guard(self.spec.tokenizer_json, self._markers)

    @cached_property
    def _falls_back_to_bytes(self) -> bool:
        known = self._backend.token_to_id("<0x00>") is not None
        return known and self._backend.decoder is not None

    def _decode_broken(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Decode byte pieces as sentencepiece does: each byte that is no UTF-8 is one U+FFFD.

        The library loses the whole run of bytes, whole characters before the broken one too.
        """
        special = set(self.special_tokens.values()) if skip_special_tokens else set()
        tokens: list[str] = []
        run = bytearray()
        for id_ in ids:
            token = self._backend.id_to_token(id_)
            if token is not None and BYTE.fullmatch(token):
                run.append(int(token[3:5], 16))
                continue
            tokens += _characters(run)
            run.clear()
            if token is not None and id_ not in special:
                tokens.append(token)
        text: str = self._backend.decoder.decode([*tokens, *_characters(run)])
        return text

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[TokenizerSpec]]:
        return TextTokenizer, (self.spec,)


@lru_cache(maxsize=8)
def _built(spec: TokenizerSpec) -> tuple[Tokenizer, str]:
    """Return the pipeline and the content hash; large vocabularies take most of a second."""
    parts = [spec.tokenizer_json, list(spec.bos_ids), spec.eos_id, spec.chat_template]
    parts.append(sorted(spec.named_tokens))
    content_hash = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return Tokenizer.from_str(spec.tokenizer_json), content_hash


def _threads() -> int:
    """Return how many threads may encode.

    Ray sets OMP_NUM_THREADS to the cores of a task, so that data tasks, of which there are as many
    as cores, take one each and leave the others to training; elsewhere every core may help.
    """
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else host.cores()


def _spelled(
    markers: Sequence[AddedToken], backend: Tokenizer
) -> tuple[re.Pattern[str], int] | None:
    """Return a pattern of all special tokens and the longest one's length.

    None where a token may also be written otherwise, as text that is normalised to it.
    """
    if not markers or (backend.normalizer is not None and any(t.normalized for t in markers)):
        return None
    texts = sorted({token.content for token in markers}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, texts))), len(texts[0])


def _characters(run: bytes | bytearray) -> list[str]:
    """Return the text of a run of bytes as one token, none if the run is empty."""
    text = run.decode("utf-8", "surrogateescape")
    return [LONE_BYTE.sub(REPLACEMENT, text)] if run else []


def _touches(span: Span, foreign: Sequence[Span]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in foreign)
