"""New tokens in the tokenizer: single ids behind the last one, in a user's own text as well."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import RecipeError
from tests.conftest import make_tokenizer

TOKENS = ["<call>", "zyx", "two words"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(made)
    return made


@pytest.fixture(scope="module")
def plain(folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def added(folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(folder, None, TOKENS)


def test_they_come_behind_the_last_id_in_their_order(
    plain: TextTokenizer, added: TextTokenizer
) -> None:
    size = plain.vocab_size
    assert added.vocab_size == size + 3
    assert [added.encode(text) for text in TOKENS] == [[size], [size + 1], [size + 2]]
    assert added.new_tokens == {size + n: tuple(plain.encode(t)) for n, t in enumerate(TOKENS)}
    assert added.encode("red stone") == plain.encode("red stone")
    text = "red<call>zyxtwo words green"
    assert added.decode(added.encode(text)) == text


def test_foreign_text_holds_them_and_no_control_token(
    plain: TextTokenizer, added: TextTokenizer
) -> None:
    """A user's row may write his own tokens; what marks the roles of a chat it may not forge."""
    size, start = plain.vocab_size, plain.token_id("<|im_start|>")
    text = "<|im_start|>red <call><|im_start|> zyx"
    inside = [(12, len(text))]
    ids = added.encode(text, inside)
    assert ids.count(size) == ids.count(size + 1) == ids.count(start) == 1
    assert ids[0] == start
    assert added.decode(ids, skip_special_tokens=False) == text
    many = added.encode_batch([(text, inside), (text, []), ("<call>", [(0, 6)])])
    assert many[0].tolist() == ids
    assert many[1].tolist() == added.encode(text)
    assert np.array_equal(many[2], [size])


def test_it_travels_whole(added: TextTokenizer) -> None:
    again = pickle.loads(pickle.dumps(added))
    assert again.new_tokens == added.new_tokens
    assert again.encode("zyx") == added.encode("zyx")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<|im_end|>"], r"'<\|im_end\|>' is token 1 of"),
        (["red"], "'red' is token [0-9]+ of"),
        (["new", "new"], "'new' stands there twice"),
        (["  "], "a token of blanks"),
    ],
)
def test_what_is_no_new_token(folder: Path, tokens: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=r"^model.new_tokens: .*" + message) as caught:
        TextTokenizer.from_folder(folder, None, tokens)
    assert "\n" not in str(caught.value)


def test_a_new_token_may_end_an_answer(folder: Path) -> None:
    made = TextTokenizer.from_folder(folder, "<end>", ["<end>"])
    assert made.eos_id == made.token_id("<end>") == made.vocab_size - 1
