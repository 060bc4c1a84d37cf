"""Exported tokenizers: the same ids and the same texts, in transformers and when read back."""

from __future__ import annotations

import json
from pathlib import Path

import jinja2
import pytest
from transformers import AutoTokenizer

from raytune_ft.data.templating.templates import PROMPTS, get_template
from raytune_ft.data.tokenizing import hf_files
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from tests.conftest import make_tokenizer

CHAT = [
    {"role": "system", "content": "Sé {input}"},
    {"role": "user", "content": 'Q "1" \\n {system}'},
    {"role": "assistant", "content": "A1"},
    {"role": "user", "content": "Q2\n"},
]
TEXTS = ["red blue", "  two  spaces\n\tand more ", "石头 🙂", "<|im_start|>red"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    make_tokenizer(tmp_path)
    return TextTokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", PROMPTS)
def test_the_jinja_text_is_that_of_the_segments(name: str, tokenizer: TextTokenizer) -> None:
    segments = get_template(name, tokenizer).segments(CHAT, add_generation_prompt=True)
    expected = "".join(
        one.text if one.ids is None else tokenizer.decode(one.ids, skip_special_tokens=False)
        for one in segments
    )
    text = hf_files.chat_template(name, tokenizer)
    assert text is not None
    rendered = jinja2.Environment(autoescape=False).from_string(text).render(messages=CHAT)
    assert rendered == expected


def test_transformers_gives_the_same_ids(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    hf_files.write(tokenizer, out, hf_files.chat_template("zephyr", tokenizer))
    theirs = AutoTokenizer.from_pretrained(out)
    again = TextTokenizer.from_folder(out)
    for text in TEXTS:
        ids = [*tokenizer.bos_ids, *tokenizer.encode(text)]
        assert theirs(text).input_ids == ids
        assert [*again.bos_ids, *again.encode(text)] == ids
    assert theirs.eos_token_id == again.eos_id == tokenizer.eos_id
    rendered = theirs.apply_chat_template(CHAT, tokenize=False)
    assert '<|system|>\nSé {input}\n<|user|>\nQ "1"' in rendered


def test_several_opening_tokens_are_kept(tmp_path: Path) -> None:
    """As ChatGLM has them; `bos_token` can name one alone."""
    make_tokenizer(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    opening = ["<|im_end|>", "<|im_start|>"]
    file.write_text(json.dumps(json.loads(file.read_text()) | {"start_tokens": opening}))
    tokenizer = TextTokenizer.from_folder(tmp_path)
    assert tokenizer.bos_ids == (1, 0)
    hf_files.write(tokenizer, tmp_path, None)
    assert TextTokenizer.from_folder(tmp_path).bos_ids == (1, 0)
    assert AutoTokenizer.from_pretrained(tmp_path)("red").input_ids[:2] == [1, 0]


def test_the_models_own_template_is_passed_on(tokenizer: TextTokenizer) -> None:
    assert hf_files.chat_template("tokenizer", tokenizer) == tokenizer.chat_template
