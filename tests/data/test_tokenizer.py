"""The tokenizer reads a model folder by itself and agrees with transformers."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import ModelError


@pytest.fixture
def folder(tokenizer_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer_folder, tmp_path / "model"))


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_special_ids_come_from_the_configuration(tokenizer: TextTokenizer) -> None:
    assert tokenizer.bos_ids == (tokenizer.token_id("<|im_start|>"),)
    assert tokenizer.eos_id == tokenizer.token_id("<|im_end|>")
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_id]


@given(text=st.text(max_size=40))
def test_text_survives_encode_and_decode(tokenizer: TextTokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(text=st.text(max_size=40))
def test_pickle_keeps_ids_and_hash(tokenizer: TextTokenizer, text: str) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(text) == tokenizer.encode(text)
    assert copy.content_hash == tokenizer.content_hash


def test_ids_equal_those_of_transformers(tokenizer_folder: Path, tokenizer: TextTokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tokenizer_folder)
    for text in ("", "red stone", "a<|im_start|>b\n\n  c", "héllo 你好 🙂"):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_settings_of_the_last_call_in_the_file_are_ignored(
    folder: Path, tokenizer: TextTokenizer
) -> None:
    from tokenizers import Tokenizer

    file = str(folder / "tokenizer.json")
    backend = Tokenizer.from_file(file)
    backend.enable_truncation(2)
    backend.enable_padding(length=64)
    backend.save(file)
    text = "red blue stone river"
    assert TextTokenizer.from_folder(folder).encode(text) == tokenizer.encode(text)


def test_qwen_starts_with_nothing(folder: Path) -> None:
    change_config(folder, tokenizer_class="QWenTokenizer")
    assert TextTokenizer.from_folder(folder).bos_ids == ()


def test_chatglm_starts_with_its_two_marks(folder: Path, tokenizer: TextTokenizer) -> None:
    size = tokenizer.vocab_size
    added = {str(size): {"content": "sop"}, str(size + 1): {"content": "[gMASK]"}}
    change_config(folder, tokenizer_class="ChatGLMTokenizer", added_tokens_decoder=added)
    assert TextTokenizer.from_folder(folder).bos_ids == (size + 1, size)


def test_no_bos_token_means_no_start_ids(folder: Path) -> None:
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<|im_start|>"}')
    change_config(folder, bos_token=None)
    assert TextTokenizer.from_folder(folder).bos_ids == ()


def test_eos_falls_back_to_the_generation_config(folder: Path) -> None:
    change_config(folder, eos_token=None)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    found = TextTokenizer.from_folder(folder)
    assert (found.eos_id, found.extra_stop_ids) == (7, {9})


def test_template_file_wins_and_changes_the_hash(folder: Path, tokenizer: TextTokenizer) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = TextTokenizer.from_folder(folder)
    assert found.chat_template == "{{ messages[0]['content'] }}"
    assert found.content_hash != tokenizer.content_hash


def test_tokens_of_the_configuration_are_added(folder: Path, tokenizer: TextTokenizer) -> None:
    added = {str(tokenizer.vocab_size): {"content": "<eoa>", "special": True}}
    change_config(folder, added_tokens_decoder=added)
    found = TextTokenizer.from_folder(folder)
    assert found.encode("<eoa>") == [tokenizer.vocab_size]
    assert "<eoa>" in found.special_tokens


def test_a_token_without_a_row_at_its_id_is_refused(folder: Path) -> None:
    change_config(folder, added_tokens_decoder={"9000": {"content": "<eoa>", "special": True}})
    with pytest.raises(ModelError, match="'<eoa>' should have id 9000"):
        TextTokenizer.from_folder(folder)


def test_eos_of_the_recipe_goes_before_that_of_the_folder(folder: Path) -> None:
    found = TextTokenizer.from_folder(folder, eos_token="<|im_start|>")
    assert found.eos_id == found.token_id("<|im_start|>")
    with pytest.raises(ModelError, match=r"no token '<end>'; set model\.eos_token"):
        TextTokenizer.from_folder(folder, eos_token="<end>")


def test_each_missing_or_damaged_file_is_named(folder: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        TextTokenizer.from_folder(folder / "absent")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not valid JSON"):
        TextTokenizer.from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="no end-of-text token"):
        TextTokenizer.from_folder(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json: cannot be read"):
        TextTokenizer.from_folder(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        TextTokenizer.from_folder(folder)


def test_data_modules_import_neither_torch_nor_ray_nor_transformers() -> None:
    code = (
        "import sys, raytune_ft.data.windows, raytune_ft.data.sources\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'datasets') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
