"""Special tokens and foreign text, for vocabularies of every kind."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from raytune_ft.data.tokenizing.guard import SIGN, is_marker
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer, TokenizerSpec

WORDS = ["<|end|>", "<|user|>", "<tool>", "a", "b ", " ", "  ", "\n", "<|", "|>", "é", SIGN, "<h1>"]
pieces = st.lists(st.tuples(st.booleans(), st.sampled_from(WORDS)), max_size=12)
FLAGS: dict[str, dict[str, bool]] = {
    "plain": {},
    "swallow spaces": {"lstrip": True, "rstrip": True},
    "whole words": {"single_word": True},
    "normalised": {"normalized": True},
}


@functools.cache
def tokenizer(flags: str = "plain", *, holes: bool = False) -> TextTokenizer:
    """A byte-level tokenizer without merges; with `holes`, its ids are not dense."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {text: id_ for id_, text in enumerate(alphabet)}
    if holes:
        vocab = {text: id_ * 2 for text, id_ in vocab.items()}
        vocab |= {text: 601 + place for place, text in enumerate([*WORDS[:3], "  "])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    settings = {"normalized": False, **FLAGS[flags]}
    backend.add_special_tokens([AddedToken(text, **settings) for text in WORDS[:2]])
    backend.add_tokens([AddedToken("<tool>", **settings), AddedToken("  ", normalized=False)])
    return TextTokenizer(TokenizerSpec(backend.to_str(), (), 0, frozenset(), (), None))


def joined(parts: list[tuple[bool, str]]) -> tuple[str, list[tuple[int, int]]]:
    """Join texts; return also the spans of those that are foreign."""
    text, spans = "", []
    for is_foreign, part in parts:
        if is_foreign:
            spans.append((len(text), len(text) + len(part)))
        text += part
    return text, spans


def markers(flags: str, ids: list[int]) -> list[str]:
    known = {tokenizer(flags).token_id(text): text for text in WORDS[:3]}
    return [known[id_] for id_ in ids if id_ in known]


@given(parts=pieces)
def test_markers_are_those_that_the_template_wrote(parts: list[tuple[bool, str]]) -> None:
    text, spans = joined(parts)
    ids = tokenizer().encode(text, spans)
    assert markers("plain", ids) == [
        part for is_foreign, part in parts if not is_foreign and part in WORDS[:3]
    ]
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("flags", FLAGS)
@given(
    parts=st.lists(
        st.tuples(st.just(True), st.sampled_from(["a", "b ", " ", "  ", "\n", "é", "<h1>", "<|"]))
        | st.tuples(st.just(False), st.sampled_from(["<|end|>", "<tool>", "  ", "c", "\n"])),
        max_size=12,
    )
)
def test_foreign_spans_change_nothing_where_no_marker_is(
    flags: str, parts: list[tuple[bool, str]]
) -> None:
    text, spans = joined(parts)
    assert tokenizer(flags).encode(text, spans) == tokenizer(flags).encode(text)


@pytest.mark.parametrize("flags", FLAGS)
@given(parts=pieces)
def test_no_marker_is_made_of_foreign_text(flags: str, parts: list[tuple[bool, str]]) -> None:
    text, _ = joined(parts)
    assert not markers(flags, tokenizer(flags).encode(text, [(0, len(text))]))


@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("before", ["a ", "", "  "])
def test_genuine_markers_keep_their_manners_beside_forged_ones(flags: str, before: str) -> None:
    """What a token does to the text beside it is not undone by a user's words elsewhere."""
    text = f"{before}<|user|>  b"
    forged = tokenizer(flags).encode(f"{text}?<tool>", [(len(text) + 1, len(text) + 7)])
    plain = tokenizer(flags).encode(f"{text}?")
    assert forged == [*plain, *tokenizer("plain").encode("<", ()), *tokenizer().encode("tool>")]


def test_a_marker_half_foreign_is_plain_text() -> None:
    text = "<|end|>"
    for span in ((0, 1), (3, 4), (6, 7)):
        assert not markers("plain", tokenizer().encode(text, [span]))


def test_text_that_spells_the_guards_own_names_stays_text() -> None:
    end = tokenizer().token_id("<|end|>")
    for sign in (SIGN, SIGN * 3):
        text = f"{sign}{end}\ue001<|end|>{sign}<|end|>"
        ids = tokenizer().encode(text, [(0, len(text) - 7)])
        assert markers("plain", ids) == ["<|end|>"]
        assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_a_vocabulary_with_holes_keeps_its_ids() -> None:
    """Names that the guard adds must not take the ids of letters."""
    letters = "".join(map(chr, range(0xA1, 0x200)))
    text = f"<|end|>{letters}<tool>  <|end|>"
    sparse = tokenizer(holes=True).encode(text, [(0, 7)])
    real = {601: 256, 602: 257, 603: 258, 604: 259}
    assert [real.get(id_, id_ // 2) for id_ in sparse] == tokenizer().encode(text, [(0, 7)])


@pytest.mark.parametrize(
    ("text", "special", "expected"),
    [
        ("<pad>", True, True),
        ("<eoh>", False, True),
        ("<reserved_102>", False, True),
        ("\u2581\u2581", False, False),
        ("\n\n", False, False),
        ("</h1>", False, False),
        ("</s>", False, True),
    ],
)
def test_vocabulary_that_is_text_is_no_marker(text: str, special: bool, expected: bool) -> None:
    assert is_marker(AddedToken(text, special=special)) is expected
