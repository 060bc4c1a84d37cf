"""Many texts at once: the ids and labels of rows are those that each row has alone."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, normalizers

from raytune_ft.config.schema import DataSection
from raytune_ft.data.encode import (
    Remembered,
    encode_conversation,
    encode_segments,
    texts_to_encode,
    written_segments,
)
from raytune_ft.data.examples import Encoder, encode_rows
from raytune_ft.data.segments import Conversation
from raytune_ft.data.sources import open_sources
from raytune_ft.data.templating.templates import PROMPTS, get_template
from raytune_ft.data.tokenizing import fast
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError, ModelError
from tests.data.conftest import chat, write_jsonl
from tests.data.tokenizer_files import (
    FRAGMENTS,
    SPECIALS,
    TEXTS,
    texts_with_specials,
    tiny_ranks,
    train_pieces,
    write_folder,
)

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'system' %}{{ m.content }}{% else %} {{ m.content | trim }} </s>{% endif %}"
    "{% endfor %}"
)


def _ranks(folder: Path) -> TextTokenizer:
    config = {"tokenizer_class": "QWenTokenizer", "chat_template": CHATML}
    return TextTokenizer.from_folder(write_folder(folder, {"q.tiktoken": tiny_ranks()}, **config))


def _pieces(folder: Path, name: str) -> TextTokenizer:
    config = {"tokenizer_class": name, "chat_template": LLAMA}
    marks = ["<eoh>"]
    content = train_pieces(user_defined_symbols=marks if name == "InternLMTokenizer" else [])
    return TextTokenizer.from_folder(write_folder(folder, {"tokenizer.model": content}, **config))


def _normalising(base: TextTokenizer) -> TextTokenizer:
    """A special token that texts become by normalisation, and one that takes blanks with it."""
    backend = Tokenizer.from_str(base.spec.tokenizer_json)
    backend.normalizer = normalizers.NFKC()
    backend.add_tokens([AddedToken("<eoh>", normalized=True)])
    backend.add_special_tokens([AddedToken("<|user|>", lstrip=True, rstrip=True)])
    return TextTokenizer(dataclasses.replace(base.spec, tokenizer_json=backend.to_str()))


KINDS: dict[str, Callable[[TextTokenizer, Path], TextTokenizer]] = {
    "byte-level": lambda base, folder: base,
    "normalising": lambda base, folder: _normalising(base),
    "tiktoken": lambda base, folder: _ranks(folder),
    "llama": lambda base, folder: _pieces(folder, "LlamaTokenizer"),
    "internlm": lambda base, folder: _pieces(folder, "InternLMTokenizer"),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(
    request: pytest.FixtureRequest,
    tokenizer: TextTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> TextTokenizer:
    return KINDS[request.param](tokenizer, tmp_path_factory.mktemp("kind"))


def at_once(
    conversations: list[Conversation], name: str, tokenizer: TextTokenizer, *, compat: bool
) -> list[tuple[list[int], list[int], int]]:
    template = get_template(name, tokenizer)
    written = [written_segments(each, template) for each in conversations]
    texts = [text for each in written for text in texts_to_encode(each, tokenizer, compat)]
    remembered = Remembered(tokenizer, texts)
    examples = [encode_segments(each, remembered, 40, compat) for each in written]
    return [(e.input_ids.tolist(), e.labels.tolist(), e.uncut_length) for e in examples]


def one_by_one(
    conversations: list[Conversation], name: str, tokenizer: TextTokenizer, *, compat: bool
) -> list[tuple[list[int], list[int], int]]:
    template = get_template(name, tokenizer)
    examples = [encode_conversation(c, template, tokenizer, 40, compat) for c in conversations]
    return [(e.input_ids.tolist(), e.labels.tolist(), e.uncut_length) for e in examples]


chats = st.lists(texts_with_specials, min_size=2, max_size=6).map(
    lambda texts: Conversation(chat(*texts[: len(texts) // 2 * 2]))
)


@pytest.mark.parametrize("name", ["tokenizer", *PROMPTS])
@settings(max_examples=12)
@given(conversations=st.lists(chats, max_size=4), compat=st.booleans())
def test_rows_at_once_are_rows_one_by_one(
    kind: TextTokenizer, name: str, conversations: list[Conversation], compat: bool
) -> None:
    got = at_once(conversations, name, kind, compat=compat)
    assert got == one_by_one(conversations, name, kind, compat=compat)


@given(texts=st.lists(texts_with_specials, min_size=1, max_size=5), data=st.data())
def test_texts_at_once_are_texts_one_by_one_whatever_is_foreign(
    kind: TextTokenizer, texts: list[str], data: st.DataObject
) -> None:
    """Foreign spans begin and end anywhere, inside special tokens too."""
    wanted = []
    for text in texts:
        edges = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6, unique=True)))
        wanted.append((text, tuple(zip(edges[::2], edges[1::2], strict=False))))
    got = [ids.tolist() for ids in kind.encode_batch(wanted)]
    assert got == [kind.encode(text, foreign) for text, foreign in wanted]


def test_a_special_token_that_a_text_becomes_by_normalisation_is_seen(
    tokenizer: TextTokenizer,
) -> None:
    normalising = _normalising(tokenizer)
    text = "a\uff1ceoh\uff1eb"
    assert normalising.token_id("<eoh>") in normalising.encode(text)
    (got,) = normalising.encode_batch([(text, ((0, len(text)),))])
    assert got.tolist() == normalising.encode(text, ((0, len(text)),))
    assert normalising.token_id("<eoh>") not in got.tolist()


def test_what_is_encoded_at_once_is_not_encoded_again(
    kind: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Harmless rows need no call of their own, behind the few that a tokenizer's kind needs."""
    template = get_template("tokenizer", kind)
    written = written_segments(Conversation(chat("red stone", "blue cloud", "a b", "c")), template)
    remembered = Remembered(kind, texts_to_encode(written, kind))
    asked: list[str] = []
    encode = TextTokenizer.encode

    def watched(self: TextTokenizer, text: str, foreign: object = ()) -> list[int]:
        asked.append(text)
        return encode(self, text, foreign)  # type: ignore[arg-type]

    monkeypatch.setattr(TextTokenizer, "encode", watched)
    encode_segments(written, remembered)
    assert set(asked) <= {"\n"}


@pytest.mark.parametrize("threads", ["1", "3"])
def test_ids_do_not_depend_on_threads(
    kind: TextTokenizer, monkeypatch: pytest.MonkeyPatch, threads: str
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv(fast.SWITCH, "0")
    exact = TextTokenizer(kind.spec)
    texts = [f"{number} {text} {fragment}" for number in range(6) for text in TEXTS
             for fragment in FRAGMENTS[:12]]  # fmt: skip
    got = [ids.tolist() for ids in exact.encode_batch([(text, ()) for text in texts])]
    assert got == [exact.encode(text) for text in texts]


def test_a_forked_process_neither_warns_nor_hangs(tokenizer_folder: Path) -> None:
    script = (
        "import os, sys\n"
        "from raytune_ft.data.tokenizing.tokenizer import TextTokenizer\n"
        "t = TextTokenizer.from_folder(sys.argv[1])\n"
        "texts = [(f'red stone {i}', ()) for i in range(400)]\n"
        "t.encode_batch(texts)\n"
        "child = os.fork()\n"
        "t.encode_batch(texts)\n"
        "os._exit(0) if child == 0 else os.waitpid(child, 0)\n"
    )
    environment = {**os.environ, fast.SWITCH: "0", "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(tokenizer_folder)],
        capture_output=True, text=True, check=True, timeout=60, env=environment,
    )  # fmt: skip
    assert done.stdout == done.stderr == ""


def test_wrong_rows_stay_in_their_places(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    rows = [
        {"messages": chat("Q", "A")},
        {"messages": chat("Q", "")},
        {"messages": [{"role": "assistant", "content": "x"}, {"role": "robot", "content": "y"}]},
        {"texts": "x"},
        {"messages": chat("Q", "B")},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    data = DataSection.model_validate({"sources": [{"path": str(path)}], "max_length": 64})
    source, encoder = open_sources(data, 1), Encoder(tokenizer, "tokenizer", data)
    found = encode_rows(source, encoder, range(5))
    assert [type(each).__name__ for each in found] == [
        "Example", "NoneType", "DataError", "DataError", "Example",
    ]  # fmt: skip
    alone = encode_rows(source, encoder, [4])[0]
    assert not isinstance(alone, DataError) and alone is not None
    assert found[4].input_ids.tolist() == alone.input_ids.tolist()  # type: ignore[union-attr]
    places = [str(found[number]).split(": ")[0] for number in (2, 3)]
    assert places == [f"{path}:3", f"{path}:4"]


needs_fast = pytest.mark.skipif(
    find_spec("gigatoken") is None,
    reason="gigatoken is not installed; pip install 'raytune_ft[fast]'",
)


@needs_fast
def test_the_fast_tokenizer_is_used_where_it_reads_the_vocabulary(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TextTokenizer(tokenizer.spec).engine == "gigatoken"
    monkeypatch.setenv(fast.SWITCH, "0")
    assert TextTokenizer(tokenizer.spec).engine == "tokenizers"


@needs_fast
def test_a_vocabulary_that_it_refuses_is_left_to_the_exact_one(tmp_path: Path) -> None:
    assert _pieces(tmp_path, "InternLMTokenizer").engine == "tokenizers"


@needs_fast
@pytest.mark.parametrize("name", ["byte-level", "tiktoken"])
@given(texts=st.lists(texts_with_specials, min_size=1, max_size=20))
def test_both_give_the_same_ids(
    name: str, texts: list[str], tokenizer: TextTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    kind = KINDS[name](tokenizer, _folder(tmp_path_factory, name))
    assert kind.engine == "gigatoken"
    got = [ids.tolist() for ids in kind.encode_batch([(text, ()) for text in texts])]
    assert got == [kind.encode(text) for text in texts]


def _folder(factory: pytest.TempPathFactory, name: str) -> Path:
    folder = factory.getbasetemp() / f"both-{name}"
    folder.mkdir(exist_ok=True)
    return folder


class Wrong:
    """A fast library that differs from the exact one for texts with a certain character."""

    def __init__(self, exact: Tokenizer, character: str) -> None:
        self._exact, self._character = exact, character

    def encode(self, text: str) -> np.ndarray:
        ids = self._exact.encode(text.replace(self._character, "?"), add_special_tokens=False).ids
        return np.array(ids, np.uint32)


@pytest.mark.parametrize(
    "character", ["天", "🙂", "\u0301", "\x00", "\u2028", "\u00a0", "٢", "न", "\ufeff", "\r"]
)
def test_a_library_that_differs_does_not_agree_on_the_probes(
    tokenizer: TextTokenizer, character: str
) -> None:
    exact = Tokenizer.from_str(tokenizer.spec.tokenizer_json)
    texts = fast.probes(exact)
    assert fast.agrees(Wrong(exact, "\ue123"), exact, texts)
    assert not fast.agrees(Wrong(exact, character), exact, texts)


@pytest.mark.parametrize("special", ["<|im_start|>", "<|im_end|>"])
def test_special_tokens_are_among_the_probes(tokenizer: TextTokenizer, special: str) -> None:
    exact = Tokenizer.from_str(tokenizer.spec.tokenizer_json)
    assert special in SPECIALS
    assert f"a{special}b" in fast.probes(exact)


def test_a_difference_in_a_run_stops_it_whatever_the_order(tokenizer: TextTokenizer) -> None:
    """The sample is chosen by content: each text alone tells whether it is looked at."""
    exact = Tokenizer.from_str(tokenizer.spec.tokenizer_json)
    quick = fast.FastTokenizer(Wrong(exact, "ß"), exact)
    texts = [f"stone {number} ß" for number in range(2000)]
    seen = []
    for text in texts:
        try:
            quick.encode_all([text])
        except ModelError as error:
            seen.append(text)
            assert str(error).endswith(f"start the run again with {fast.SWITCH}=0")
            assert "\n" not in str(error) and repr(text) in str(error)
    assert 1 <= len(seen) < 40
    with pytest.raises(ModelError, match=seen[-1]):
        quick.encode_all(reversed(texts))
    assert len(quick.encode_all([text.replace("ß", "s") for text in texts])) == 2000
