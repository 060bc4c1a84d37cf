"""BPE models of sentencepiece, trained here: our ids and texts are sentencepiece's own."""

from __future__ import annotations

import functools
import pickle
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import assume, given
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as proto

from raytune_ft.chat.text import Detokenizer
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import ModelError
from tests.data.tokenizer_files import (
    SPECIALS,
    no_special,
    texts,
    texts_with_specials,
    train_pieces,
    write_folder,
)

AS_IT_IS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
DEFINED = {"user_defined_symbols": ["<eoh>", "<eoa>"]}
KINDS: dict[str, dict[str, Any]] = {
    "llama": AS_IT_IS,
    "internlm": {**AS_IT_IS, **DEFINED, "add_dummy_prefix": False},
    "baichuan": {**AS_IT_IS, **DEFINED},
    "no bytes": {**AS_IT_IS, "byte_fallback": False},
    "stripped": {"normalization_rule_name": "identity"},
    "nfkc": {},
    "nfkc with defined pieces": DEFINED,
    "nfkc without prefix": {"add_dummy_prefix": False},
}


# Under a map of characters, the library and sentencepiece part ways where marks combine.
MAPPED = [kind for kind in KINDS if kind.startswith("nfkc")]
ALONE = {chr(code) for code in (*range(0x100), *range(0x4E00, 0x9FFF), *range(0xFF01, 0xFF5F))}
ALONE |= {"\u3000", "\u2581", "\ufb01", "\u2028", "\ufeff"}


def fit(kind: str, text: str) -> str:
    return "".join(c for c in text if c in ALONE) if kind in MAPPED else text


@functools.cache
def content(kind: str) -> bytes:
    return train_pieces(**KINDS[kind])


@functools.cache
def ours(kind: str, tokenizer_class: str = "LlamaTokenizer") -> TextTokenizer:
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYTUNE_CACHE", scratch)
        files = {"tokenizer.model": content(kind)}
        folder = write_folder(Path(scratch) / "model", files, tokenizer_class=tokenizer_class)
        return TextTokenizer.from_folder(folder)


@functools.cache
def theirs(kind: str, *, defined: bool = True) -> sentencepiece.SentencePieceProcessor:
    """Return sentencepiece; without `defined`, pieces like `<eoh>` are never read from a text."""
    model = proto.ModelProto.FromString(content(kind))  # type: ignore[attr-defined]
    for piece in model.pieces:
        if piece.type == 4 and not defined:
            piece.type = 3
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts)
def test_ids_and_texts_equal_those_of_sentencepiece(kind: str, text: str) -> None:
    text = fit(kind, text)
    assume(no_special(text))
    ids = ours(kind).encode(text)
    assert ids == theirs(kind).encode(text)
    if 0 not in ids:  # sentencepiece writes an unknown piece as a sign, we leave it out
        assert ours(kind).decode(ids) == theirs(kind).decode(ids)


@pytest.mark.parametrize("kind", ["llama", "internlm", "baichuan"])
@given(text=texts)
def test_text_comes_back_whole(kind: str, text: str) -> None:
    """But for the sign that sentencepiece keeps for spaces."""
    assert ours(kind).decode(ours(kind).encode(text)) == text.replace("\u2581", " ")


@pytest.mark.parametrize("kind", ["internlm", "baichuan", "nfkc with defined pieces"])
@given(parts=st.lists(st.sampled_from(["<eoh>", "<eoa>", " ", "a", "\n", "天"]), max_size=6))
def test_defined_pieces_are_read_from_text_as_sentencepiece_reads_them(
    kind: str, parts: list[str]
) -> None:
    text = "".join(parts)
    assert ours(kind).encode(text) == theirs(kind).encode(text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=texts_with_specials)
def test_foreign_text_never_becomes_a_special_token(kind: str, text: str) -> None:
    text = fit(kind, text)
    ids = ours(kind).encode(text, [(0, len(text))])
    assert ids == theirs(kind, defined=False).encode(text)


def test_specials_are_recognised_outside_foreign_spans() -> None:
    """The sections beside a control token are texts of their own, as they were in 2023."""
    tokenizer, plain = ours("baichuan"), theirs("baichuan", defined=False)
    eoh = tokenizer.token_id("<eoh>")
    text = "<s>a<eoh>b</s><eoh>c"
    assert tokenizer.encode(text)[0] == 1
    both = tokenizer.encode(text, [(3, 9)])  # the first <eoh> comes from a user
    assert both == [
        1,
        *plain.encode("a<eoh>b"),
        2,
        *plain.encode(""),
        *theirs("baichuan").encode("<eoh>c"),
    ]
    assert tokenizer.encode(text).count(eoh) == 2
    assert both.count(eoh) == 1


@functools.cache
def with_runs_of_spaces() -> bytes:
    """Give a model Mistral's runs of spaces: equal scores, and one length missing."""
    model = proto.ModelProto.FromString(content("llama"))  # type: ignore[attr-defined]
    known = {piece.piece for piece in model.pieces}
    for length in (2, 4, 8, 5, 16, 6, 12, 13, 10, 14, 3, 9, 7, 11):
        if "\u2581" * length not in known:
            model.pieces.add(piece="\u2581" * length, type=1)
    for piece in model.pieces:
        if len(piece.piece) > 1 and not piece.piece.strip("\u2581"):
            piece.score = -1e9
    written: bytes = model.SerializeToString()
    return written


def test_runs_of_spaces_split_as_sentencepiece_splits_them(own_cache: Path, tmp_path: Path) -> None:
    files = {"tokenizer.model": with_runs_of_spaces()}
    tokenizer = TextTokenizer.from_folder(write_folder(tmp_path / "m", files))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=with_runs_of_spaces())
    for text in (before + " " * length + "a" for before in ("", "\n") for length in range(70)):
        assert tokenizer.encode(text) == pieces.encode(text)


def test_text_comes_token_by_token_and_whole(own_cache: Path) -> None:
    """The chat shows a leading space and a character of several bytes neither early nor twice."""
    for kind in ("llama", "internlm"):
        shown, text = Detokenizer(ours(kind).decode), " the 🙂🙂 stone, 天空"
        pieces = [shown.push(id_) for id_ in ours(kind).encode(text)]
        assert "".join(pieces) == text
        assert not any("\ufffd" in piece for piece in pieces)


@given(ids=st.lists(st.integers(3, 419), max_size=12))
def test_any_ids_decode_as_sentencepiece_decodes_them(ids: list[int]) -> None:
    """Broken characters too: one replacement sign for each byte."""
    ids = [id_ for id_ in ids if theirs("llama").id_to_piece(id_) != "<0x20>"]
    assert ours("llama").decode(ids) == theirs("llama").decode(ids)


def test_a_broken_byte_does_not_spoil_whole_characters() -> None:
    ids = [theirs("llama").piece_to_id(f"<0x{byte:02X}>") for byte in "好".encode() + b"\xe5\xa5"]
    assert ours("llama").decode(ids) == "好\ufffd\ufffd"


@given(text=texts_with_specials)
def test_a_pickled_tokenizer_is_the_same(text: str) -> None:
    copy = pickle.loads(pickle.dumps(ours("baichuan")))
    assert copy.encode(text) == ours("baichuan").encode(text)
    assert copy.content_hash == ours("baichuan").content_hash


def chatglm(name: str, scratch: Path) -> TextTokenizer:
    files = {"tokenizer.model": content("llama")}
    return TextTokenizer.from_folder(
        write_folder(scratch / "m", files, tokenizer_class="ChatGLMTokenizer", name_or_path=name)
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_chatglm_appends_its_tokens_behind_the_file(own_cache: Path, tmp_path: Path) -> None:
    third, size = chatglm("THUDM/chatglm3-6b", tmp_path), theirs("llama").get_piece_size()
    appended = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>"]
    assert [third.token_id(text) for text in appended] == list(range(size, size + 7))
    assert (third.bos_ids, third.eos_id) == ((size + 1, size + 3), 2)
    assert third.vocab_size == size + 9
    second = chatglm("THUDM/chatglm2-6b", tmp_path)
    assert (second.vocab_size, second.bos_ids) == (size + 5, third.bos_ids)
    assert second.token_id("<|user|>") is None


def test_chatglm_never_reads_its_marks_from_text(own_cache: Path, tmp_path: Path) -> None:
    tokenizer = chatglm("THUDM/chatglm3-6b", tmp_path)
    text = "a sophisticated [gMASK] sop eop"
    assert tokenizer.encode(text) == theirs("llama").encode(text)
    user = tokenizer.token_id("<|user|>")
    assert tokenizer.encode("<|user|>\nhi") == [user, *theirs("llama").encode("\nhi")]
    assert tokenizer.decode([*tokenizer.bos_ids, *tokenizer.encode("<|user|>hi")]) == "hi"


def test_named_tokens_come_from_the_file_unless_the_folder_says_more(
    own_cache: Path, tmp_path: Path
) -> None:
    trained = train_pieces(bos_piece="<|startoftext|>", eos_piece="<|endoftext|>", **AS_IT_IS)
    folder = write_folder(
        tmp_path / "yi", {"tokenizer.model": trained}, tokenizer_class="YiTokenizer"
    )
    tokenizer = TextTokenizer.from_folder(folder)
    assert tokenizer.named_tokens["bos_token"] == "<|startoftext|>"
    assert (tokenizer.bos_ids, tokenizer.eos_id) == ((1,), 2)
    other = TextTokenizer.from_folder(folder, eos_token="<|startoftext|>")
    assert (other.eos_id, other.named_tokens["eos_token"]) == (1, "<|startoftext|>")
    with pytest.raises(ModelError, match=r"has no token '<eoa>'; set model\.eos_token"):
        TextTokenizer.from_folder(folder, eos_token="<eoa>")


def test_classes_of_2023_prefer_their_own_file(own_cache: Path, tmp_path: Path) -> None:
    files = {
        "tokenizer.model": content("internlm"),
        "tokenizer.json": ours("llama").spec.tokenizer_json.encode(),
    }
    text = "  a stone"
    for tokenizer_class, expected in (
        ("InternLMTokenizer", "internlm"),
        ("LlamaTokenizer", "llama"),
    ):
        folder = write_folder(tmp_path / expected, files, tokenizer_class=tokenizer_class)
        assert TextTokenizer.from_folder(folder).encode(text) == theirs(expected).encode(text)


def test_the_cache_is_used_and_a_damaged_one_replaced(own_cache: Path, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "m", {"tokenizer.model": content("llama")})
    first = TextTokenizer.from_folder(folder)
    (kept,) = (own_cache / "tokenizers").iterdir()
    kept.write_text(kept.read_text().replace("\u2581", "_"))
    assert TextTokenizer.from_folder(folder).content_hash != first.content_hash
    kept.write_text("{")
    assert TextTokenizer.from_folder(folder).content_hash == first.content_hash
    assert TextTokenizer.from_folder(folder).encode("a stone") == first.encode("a stone")


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "file"))
    folder = write_folder(tmp_path / "m", {"tokenizer.model": content("llama")})
    assert TextTokenizer.from_folder(folder).encode("a stone") == theirs("llama").encode("a stone")


def test_tokens_added_later_get_the_ids_that_they_are_given(
    own_cache: Path, tmp_path: Path
) -> None:
    size = theirs("llama").get_piece_size()
    files = {"tokenizer.model": content("llama")}
    added = files | {"added_tokens.json": b'{"<pad>": %d, "<|im_end|>": %d}' % (size + 1, size)}
    added["special_tokens_map.json"] = b'{"pad_token": "<pad>"}'
    tokenizer = TextTokenizer.from_folder(write_folder(tmp_path / "good", added))
    assert tokenizer.encode("<|im_end|><pad>") == [size, size + 1]
    assert tokenizer.decode([size, size + 1]) == "<|im_end|>"
    wrong = files | {"added_tokens.json": b'{"<pad>": %d}' % (size + 1)}
    with pytest.raises(ModelError, match=f"'<pad>' should have id {size + 1}, .* is {size};"):
        TextTokenizer.from_folder(write_folder(tmp_path / "bad", wrong))


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (b"\x00\x01", "not a sentencepiece model; copy the file again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"", "not a sentencepiece model"),
    ],
)
def test_a_file_that_is_no_model_is_named(
    own_cache: Path, tmp_path: Path, bad: bytes, problem: str
) -> None:
    folder = write_folder(tmp_path / "m", {"tokenizer.model": bad})
    with pytest.raises(ModelError, match=rf"tokenizer\.model: {problem}"):
        TextTokenizer.from_folder(folder)


def test_other_kinds_of_models_are_refused(own_cache: Path, tmp_path: Path) -> None:
    unigram = train_pieces(model_type="unigram", vocab_size=320)
    folder = write_folder(tmp_path / "m", {"tokenizer.model": unigram})
    with pytest.raises(ModelError, match=r"no BPE model; put the model's tokenizer\.json beside"):
        TextTokenizer.from_folder(folder)


def test_specials_of_the_tests_are_what_they_claim() -> None:
    """Otherwise the test above would compare plain texts alone."""
    known = set(ours("baichuan").special_tokens) | {"<eoh>", "<eoa>"}
    assert {"<s>", "</s>", "<eoh>"} <= known & set(SPECIALS)
