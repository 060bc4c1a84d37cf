"""GGUF, the vocabulary: the pipeline that training used in, the file's tokenizer fields out.

Two kinds have a form there: byte-level BPE (`gpt2`), with the name of a known way to cut texts
before it, and sentencepiece's BPE (`llama`), whose pieces have scores. Others are refused: a
tokenizer that almost fits gives other ids without a word.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from raytune_ft.data.tokenizing import sentencepiece_file
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import ModelError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"
LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITS = {LETTERS % "{1,3}": "llama-bpe", LETTERS % "": "qwen2"}
"""Pattern of a pipeline's first cut -> llama.cpp's name for it."""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float]
    """Of sentencepiece's pieces; empty for byte-level BPE."""
    merges: list[str]
    """Of byte-level BPE; empty for sentencepiece."""
    space_first: bool

    def write_fields(self, writer: Any) -> None:
        """Give them to a GGUFWriter."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.scores:
            writer.add_token_scores(self.scores)
        if self.merges:
            writer.add_token_merges(self.merges)
        writer.add_add_space_prefix(self.space_first)


def read(tokenizer: TextTokenizer, folder: Path, rows: int) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        tokenizer: as training had it.
        folder: of the base; a tokenizer.model in it gives pieces their scores.
        rows: of the embedding; tokens that it has beyond the vocabulary are unused.

    Raises:
        ModelError: no GGUF file can describe it.
    """
    content = json.loads(tokenizer.spec.tokenizer_json)
    model, backend = content["model"], Tokenizer.from_str(tokenizer.spec.tokenizer_json)
    if model.get("type") != "BPE":
        raise ModelError(
            f"{folder}: no GGUF for a tokenizer of type '{model.get('type')}'; take llama.cpp's "
            "convert_hf_to_gguf.py on the merged folder"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    pieces = bool(model.get("byte_fallback"))
    tokens = _tokens(backend, rows)
    types = list(_types(content, tokens, pieces=pieces))
    if not pieces:
        return Vocabulary("gpt2", _pre(content, folder), tokens, types, [], merges, False)
    scores = _scores(tokens, merges, folder)
    first = backend.encode("a", add_special_tokens=False).tokens
    return Vocabulary("llama", "default", tokens, types, scores, [], first[0].startswith(SPACE))


def _tokens(backend: Tokenizer, rows: int) -> list[str]:
    known = {id_: text for text, id_ in backend.get_vocab(with_added_tokens=True).items()}
    return [known.get(id_, f"[PAD{id_}]") for id_ in range(max(rows, max(known) + 1))]


def _types(content: Mapping[str, Any], tokens: list[str], *, pieces: bool) -> Iterator[int]:
    added = {token["content"]: bool(token["special"]) for token in content["added_tokens"]}
    unknown, words = content["model"].get("unk_token"), content["model"]["vocab"]
    for text in tokens:
        if pieces and text == unknown:
            yield UNKNOWN
        elif text in added:
            yield CONTROL if added[text] else USER_DEFINED
        elif text not in words:
            yield UNUSED
        elif pieces and len(text) == 6 and text.startswith("<0x"):
            yield BYTE
        else:
            yield NORMAL


def _pre(content: Mapping[str, Any], folder: Path) -> str:
    """Name the way in which a byte-level pipeline cuts texts before it merges."""
    stated = content["pre_tokenizer"] or {}
    steps = stated.get("pretokenizers", [stated])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True):
            name = SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
            if name is not None:
                return name
    raise ModelError(
        f"{folder}: no GGUF for this tokenizer, whose way to cut texts has no known name; take "
        "llama.cpp's convert_hf_to_gguf.py on the merged folder"
    )


def _scores(tokens: list[str], merges: list[str], folder: Path) -> list[float]:
    """Return sentencepiece's scores, or ones by which the same pairs are merged first."""
    file = folder / "tokenizer.model"
    if file.is_file():
        read_pieces = sentencepiece_file.read_model(file.read_bytes(), file).pieces
        known = {piece.piece: float(piece.score) for piece in read_pieces}
    else:
        known = {}
        for rank, pair in enumerate(merges):
            known.setdefault(pair.replace(" ", ""), -float(rank))
    return [known.get(text, 0.0) for text in tokens]
