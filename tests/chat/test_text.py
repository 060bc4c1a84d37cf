"""Detokenising: whole characters only, nothing lost, whatever the tokens are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from raytune_ft.chat.text import Detokenizer, StopStrings, printable
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from tests.conftest import make_tokenizer

TEXTS = st.text(
    st.characters(exclude_categories=("Cs",), exclude_characters="\ufffd"), max_size=40
) | st.sampled_from(
    ["你好，世界", "naïve café", "👩‍👩‍👧 ok", "red river  stone", "日本語 と English"]
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return TextTokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """Llama's kind: pieces with a leading space sign, unknown characters as byte tokens."""
    pieces = ["▁red", "▁river", "▁", *"abcdefghijklmnopqrstuvwxyz.,!?好"]
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {p: 256 + i for i, p in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, merges=[], byte_fallback=True, unk_token="<0x00>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def pushed(decode: object, ids: Sequence[int]) -> list[str]:
    detokenizer = Detokenizer(decode)  # type: ignore[arg-type]
    return [detokenizer.push(i) for i in ids]


@given(text=TEXTS)
def test_pieces_of_any_text_join_to_the_text(byte_level: TextTokenizer, text: str) -> None:
    pieces = pushed(byte_level.decode, byte_level.encode(text))
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@given(text=TEXTS)
def test_byte_fallback_keeps_characters_and_spaces(byte_fallback: Tokenizer, text: str) -> None:
    ids = byte_fallback.encode(text, add_special_tokens=False).ids
    pieces = pushed(lambda i: byte_fallback.decode(list(i)), ids)
    assert "".join(pieces) == byte_fallback.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(2, 299), max_size=60))
def test_random_tokens_lose_nothing_but_an_unfinished_tail(
    byte_level: TextTokenizer, ids: list[int]
) -> None:
    """A random model writes invalid bytes; what can be decided is shown all the same."""
    whole, joined = byte_level.decode(ids), "".join(pushed(byte_level.decode, ids))
    assert whole.startswith(joined)
    assert len(whole) - len(joined) <= 3
    assert set(whole[len(joined) :]) <= {"\ufffd"}


@given(text=TEXTS, sizes=st.lists(st.integers(1, 5), min_size=1, max_size=20))
def test_tokens_may_end_anywhere_in_a_character(text: str, sizes: list[int]) -> None:
    """Tokens of any bytes, such as the end of one character with the start of the next."""
    data, chunks = text.encode(), []
    while data:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(data[:size])
        data = data[size:]
    pieces = pushed(
        lambda ids: b"".join(chunks[i] for i in ids).decode("utf-8", "replace"), range(len(chunks))
    )
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_appears_with_its_last_byte(byte_level: TextTokenizer) -> None:
    ids = byte_level.encode("好")
    assert len(ids) == 3  # three byte tokens: the case this is about
    assert pushed(byte_level.decode, ids) == ["", "", "好"]


def test_the_window_does_not_grow(byte_level: TextTokenizer) -> None:
    longest = 0

    def decode(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return byte_level.decode(ids)

    ids = byte_level.encode("red river stone 你好 " * 50)
    assert "".join(pushed(decode, ids)) == "red river stone 你好 " * 50
    assert longest <= 8 < len(ids)


STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


@given(pieces=st.lists(st.text("ab\n", max_size=5), max_size=12), stops=STOPS)
def test_stop_strings_cut_where_the_whole_text_would_be_cut(
    pieces: list[str], stops: list[str]
) -> None:
    matcher, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += matcher.push(piece)
        if matcher.found:
            break
    else:
        shown += matcher.flush()
    text = "".join(pieces)
    hits = [at for stop in stops if (at := text.find(stop)) >= 0]
    if matcher.found:
        # a longer stop string may begin earlier but end later than the one that was complete
        assert shown == text[: len(shown)]
        assert min(hits) <= len(shown)
        assert any(text.startswith(stop, len(shown)) for stop in stops)
    else:
        assert not hits
        assert shown == text


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    matcher = StopStrings(["STOP"])
    assert [matcher.push(part) for part in ("go S", "T", "ART S", "TOP rest")] == [
        "go ",
        "",
        "START ",
        "",
    ]
    assert matcher.found


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert printable("a\x1b[2Jb\r\x07\x9bc\td\n你") == "a[2Jbc\td\n你"


def test_the_tiny_tokenizer_is_real(byte_level: TextTokenizer, tmp_path: Path) -> None:
    assert byte_level.decode(byte_level.encode("red blue")) == "red blue"
    assert len(byte_level.encode("red")) == 1
