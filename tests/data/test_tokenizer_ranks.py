"""Rank files: our ids are tiktoken's own, on a tiny file made here."""

from __future__ import annotations

import base64
import functools
import tempfile
import unicodedata
from pathlib import Path

import pytest
import tiktoken
from hypothesis import given

from raytune_ft.data.tokenizing.tiktoken_file import QWEN_PATTERN, QWEN_SPECIAL, read_ranks
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import ModelError
from tests.data.tokenizer_files import texts, texts_with_specials, tiny_ranks, write_folder


@functools.cache
def ours() -> TextTokenizer:
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYTUNE_CACHE", scratch)
        files = {"qwen.tiktoken": tiny_ranks()}
        folder = write_folder(Path(scratch) / "m", files, tokenizer_class="QWenTokenizer")
        return TextTokenizer.from_folder(folder)


@functools.cache
def theirs() -> tiktoken.Encoding:
    ranks = read_ranks(tiny_ranks(), Path("tiny"))
    special = {text: len(ranks) + place for place, text in enumerate(QWEN_SPECIAL)}
    return tiktoken.Encoding(
        "tiny", pat_str=QWEN_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@given(text=texts)
def test_ids_equal_those_of_tiktoken_and_text_comes_back(text: str) -> None:
    ids = ours().encode(text)
    assert ids == theirs().encode_ordinary(nfc(text))
    assert ours().decode(ids) == nfc(text)


@given(text=texts_with_specials)
def test_specials_count_unless_the_text_is_foreign(text: str) -> None:
    assert ours().encode(text) == theirs().encode(nfc(text), allowed_special="all")
    assert ours().encode(text, [(0, len(text))]) == theirs().encode_ordinary(nfc(text))


@pytest.mark.parametrize("text", [" qzj", "a qzj qzjx qzj", " qz j"])
def test_a_whole_word_is_looked_up_before_anything_is_merged(text: str) -> None:
    assert ours().encode(text) == theirs().encode_ordinary(text)


def test_specials_follow_the_ranks_in_qwens_order() -> None:
    size = theirs().n_vocab - len(QWEN_SPECIAL)
    ids = [ours().token_id(f"<|{name}|>") for name in ("endoftext", "im_start", "im_end")]
    assert ids == [size, size + 1, size + 2]
    assert ours().token_id("<|extra_204|>") == size + 207 == ours().vocab_size - 1
    assert (ours().bos_ids, ours().eos_id) == ((), size)


def test_a_chat_model_ends_its_answers_otherwise(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path, {"qwen.tiktoken": tiny_ranks()}, tokenizer_class="QWenTokenizer"
    )
    (folder / "generation_config.json").write_text('{"chat_format": "chatml"}')
    assert TextTokenizer.from_folder(folder).eos_id == ours().token_id("<|im_end|>")
    base = TextTokenizer.from_folder(folder, eos_token="<|endoftext|>")
    assert base.eos_id == ours().token_id("<|endoftext|>")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"IQ== 0\nnonsense\n", ":2: not 'base64 rank'"),
        (b"IQ== 0\nI!== 1\n", ":2: not 'base64 rank'"),
        (b"IQ== 0\n", ": ranks are not 0, 1, 2 and so on"),
        (tiny_ranks().replace(b" 300\n", b" 900\n"), ": ranks are not 0, 1, 2 and so on"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, problem: str) -> None:
    with pytest.raises(ModelError, match=f"file{problem}"):
        read_ranks(content, Path("file"))


def test_lines_may_stand_in_any_order() -> None:
    lines = tiny_ranks().splitlines()
    ranks = read_ranks(b"\n".join(reversed(lines)), Path("file"))
    assert list(ranks) == [base64.b64decode(line.split()[0]) for line in lines]
