"""GGUF: what is written is read back by transformers, by gguf and, where it is there, llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import ModelError, RecipeError
from raytune_ft.exporting import gguf_file, gguf_vocabulary, quantizer
from raytune_ft.exporting.gguf_network import Network, llama3_factors
from raytune_ft.exporting.targets import Target
from raytune_ft.model.gguf_folder import unpermute
from raytune_ft.model.merge import as_it_is
from tests.conftest import make_tokenizer
from tests.families import vocabularies
from tests.model.families import make

IDS = torch.arange(3, 60)[None]
TEXTS = ["red blue stone? 12 345 Ünï 中文 \n\n x", "<|im_start|>user\nhi<|im_end|>\n", "  two  "]
SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "llama": lambda **more: LlamaConfig(**SMALL, **more),
    "llama, tied": lambda **more: LlamaConfig(**SMALL, tie_word_embeddings=True, **more),
    "mistral": lambda **more: MistralConfig(**SMALL, sliding_window=None, **more),
    "qwen2, biases": lambda **more: Qwen2Config(**SMALL, **more),
    "qwen3, wide heads": lambda **more: Qwen3Config(**SMALL, head_dim=128, **more),
}


def model_of(folder: Path, kind: str, **more: Any) -> gguf_file.Model:
    """A random model whose biases are not 0."""
    folder.mkdir()
    config = CONFIGS[kind](vocab_size=make_tokenizer(folder), **more)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(3)
            assert "rotary" not in name
    network.save_pretrained(folder)
    return bound(folder)


def bound(folder: Path, template: str = "tokenizer") -> gguf_file.Model:
    merge = as_it_is(folder)
    return gguf_file.Model(
        "it", folder, Network(merge.original.config, str(folder)), lambda: merge.shapes("native"),
        lambda: merge.tensors("native"), TextTokenizer.from_folder(folder), template,
    )  # fmt: skip


def logits(folder: Path, **more: Any) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **more)
    with torch.no_grad():
        return torch.as_tensor(model(IDS).logits)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(k, marks=pytest.mark.exact if k in ("llama", "mistral") else ())
        for k in CONFIGS
    ],
)
def test_transformers_reads_the_same_model(tmp_path: Path, kind: str) -> None:
    """float16 keeps eleven bits, q8_0 a block's numbers to a 254th of its largest."""
    model = model_of(tmp_path / "it", kind)
    wanted = logits(tmp_path / "it")
    for name, bound_of_error in (("f32", 1e-5), ("f16", 2e-3), ("q8_0", 3e-2)):
        gguf_file.write(model, tmp_path / f"{name}.gguf", name)
        found = logits(tmp_path, gguf_file=f"{name}.gguf")
        error = float((found - wanted).norm() / wanted.norm())
        assert error < bound_of_error, name
        assert (error > bound_of_error / 1000) is (name != "f32"), "it is that type"


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model = model_of(tmp_path / "it", "llama")
    gguf_file.write(model, tmp_path / "it.gguf", "f16")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="it.gguf")
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False).input_ids == model.tokenizer.encode(text)
    fields = gguf.GGUFReader(tmp_path / "it.gguf").fields
    said = {name: field.contents() for name, field in fields.items()}
    assert said["tokenizer.ggml.model"] == "gpt2"
    assert said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.ggml.eos_token_id"] == model.tokenizer.eos_id
    assert said["tokenizer.chat_template"] == model.tokenizer.chat_template
    assert said["tokenizer.ggml.token_type"][:3] == [3, 3, 1]
    assert said["general.file_type"] == 1
    assert said["llama.attention.head_count_kv"] == 2


def tensors_of(file: Path) -> dict[str, torch.Tensor]:
    return {
        entry.name: torch.tensor(gguf.dequantize(entry.data, entry.tensor_type))
        for entry in gguf.GGUFReader(file).tensors
    }


def test_an_original_layout_is_written_part_by_part(tmp_path: Path) -> None:
    """InternLM's biases lie in the file as its rows do; transformers itself would drop them."""
    base = make("internlm", tmp_path / "it")
    vocabularies.internlm(base)
    config = json.loads((base / "config.json").read_text())
    gguf_file.write(bound(base, "internlm_chat"), tmp_path / "it.gguf", "f32")
    found, original = tensors_of(tmp_path / "it.gguf"), dict(as_it_is(base).tensors("native"))
    heads = config["num_attention_heads"]
    for kind in ("weight", "bias"):
        for part in ("q", "k"):
            wanted = original[f"model.layers.1.self_attn.{part}_proj.{kind}"]
            there = found[f"blk.1.attn_{part}.{kind}"]
            assert not torch.equal(there, wanted)
            assert torch.equal(unpermute(there, heads).reshape(wanted.shape), wanted)
        wanted = original[f"model.layers.1.self_attn.v_proj.{kind}"]
        assert torch.equal(found[f"blk.1.attn_v.{kind}"], wanted)
    assert len(found) == len(original)
    said = gguf.GGUFReader(tmp_path / "it.gguf").fields
    assert said["tokenizer.ggml.model"].contents() == "llama"


def test_sentencepiece_keeps_scores_and_types(tmp_path: Path) -> None:
    folder = tmp_path / "it"
    folder.mkdir()
    size = vocabularies.llama(folder)
    tokenizer = TextTokenizer.from_folder(folder)
    with_file = gguf_vocabulary.read(tokenizer, folder, size + 3)
    without = gguf_vocabulary.read(tokenizer, tmp_path, size + 3)
    assert (with_file.model, with_file.pre, with_file.merges) == ("llama", "default", [])
    assert len(with_file.tokens) == size + 3
    assert with_file.types[-3:] == [gguf_vocabulary.UNUSED] * 3
    assert with_file.types[tokenizer.eos_id] == gguf_vocabulary.CONTROL
    assert with_file.types[with_file.tokens.index("<0x0A>")] == gguf_vocabulary.BYTE
    # made-up scores put the pieces into the same order
    pieces = [i for i, kind in enumerate(with_file.types) if kind == gguf_vocabulary.NORMAL]
    merged = [i for i in pieces if len(with_file.tokens[i]) > 1]
    ranks = [sorted(merged, key=lambda i: -v.scores[i]) for v in (with_file, without)]
    assert ranks[0] == ranks[1]


def test_llama3_positions_are_transformers_own() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(**SMALL, rope_parameters=ROPE)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head_dim = SMALL["hidden_size"] // SMALL["num_attention_heads"]
    plain = 1.0 / 1e4 ** (torch.arange(0, head_dim, 2) / head_dim)
    torch.testing.assert_close(plain / llama3_factors(ROPE, head_dim), scaled)


def test_positions_are_written_as_they_are(tmp_path: Path) -> None:
    gguf_file.write(
        model_of(tmp_path / "a", "llama", rope_parameters=ROPE), tmp_path / "a.gguf", "f16"
    )
    assert gguf_file_tensor(tmp_path / "a.gguf", "rope_freqs.weight").shape == (8,)
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
            "original_max_position_embeddings": 64}  # fmt: skip
    gguf_file.write(
        model_of(tmp_path / "b", "llama", rope_parameters=yarn), tmp_path / "b.gguf", "f16"
    )
    fields = gguf.GGUFReader(tmp_path / "b.gguf").fields
    assert fields["llama.rope.scaling.type"].contents() == "yarn"
    assert fields["llama.rope.scaling.original_context_length"].contents() == 64


def gguf_file_tensor(file: Path, name: str) -> torch.Tensor:
    return tensors_of(file)[name]


def test_what_has_no_place_is_refused_in_one_line(tmp_path: Path) -> None:
    other = make("starcoder", tmp_path / "other")
    with pytest.raises(ModelError, match=r"no GGUF for networks of type 'gpt_bigcode'"):
        Network(as_it_is(other).original.config, "other")
    longrope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match=r"positions of type 'dynamic'"):
        Network(LlamaConfig(**SMALL, rope_parameters=longrope), "it")
    folder = tmp_path / "it"
    folder.mkdir()
    make_tokenizer(folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="whose way to cut texts has no known name"):
        gguf_vocabulary.read(TextTokenizer.from_folder(folder), folder, 300)


def test_formats_that_are_made_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(quantizer, "PACKAGE", "no_such_package")
    for name, says in (
        ("gguf-q4_k_m", r"nothing here; pip install 'raytune_ft\[gguf\]' or put"),
        ("gguf-q2_k", r"nothing here; put its llama-quantize on PATH, or take gguf-q8_0"),
        ("awq", "needs a calibration set, by llm-compressor"),
        ("onnx", "no format 'onnx'; choose: safetensors, fp8"),
    ):
        with pytest.raises(RecipeError, match=says) as caught:
            Target.of(name)
        assert "\n" not in str(caught.value)


def test_the_installed_program_makes_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words, and its last one where it fails."""
    program = tmp_path / quantizer.PROGRAM
    program.write_text(
        '#!/bin/sh\n[ "$3" = Q2_K ] || { echo no such type >&2; exit 1; }\ncp "$1" "$2"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "in").write_bytes(b"GGUF")
    quantizer.by_program(tmp_path / "in", tmp_path / "out", "q2_k")
    assert (tmp_path / "out").read_bytes() == b"GGUF"
    with pytest.raises(RecipeError, match=r"llama-quantize failed \(no such type\)"):
        quantizer.by_program(tmp_path / "in", tmp_path / "out2", "q3_k_s")


def test_the_mixture_of_types() -> None:
    """As llama.cpp has it: more bits for the head, and for values and down in some layers."""

    def of(name: str, *, tied: bool = False) -> str:
        return quantizer.type_of(name, "q4_k_m", 16, tied=tied)

    assert of("output.weight") == "Q6_K"
    assert (of("token_embd.weight"), of("token_embd.weight", tied=True)) == ("Q4_K", "Q6_K")
    assert of("blk.3.attn_q.weight") == "Q4_K"
    finer = [i for i in range(16) if of(f"blk.{i}.ffn_down.weight") == "Q6_K"]
    assert finer == [0, 1, 4, 7, 10, 13, 14, 15]


LLAMA_CPP = pytest.mark.skipif(not quantizer.has_package(), reason="needs xllamacpp")


@LLAMA_CPP
def test_k_quants_are_near_the_weights(tmp_path: Path) -> None:
    """Read back by gguf's own Python, which has no part in writing them."""
    rows = np.random.default_rng(0).normal(size=(6, 512)).astype(np.float32)
    for name, most in (("Q4_K", 0.09), ("Q5_K", 0.045), ("Q6_K", 0.025)):
        kind = gguf.GGMLQuantizationType[name]
        found = gguf.dequantize(quantizer.packed(rows, name), kind)
        error = np.linalg.norm(found - rows) / np.linalg.norm(rows)
        assert most / 4 < error < most, name


@LLAMA_CPP
@pytest.mark.parametrize("kind", ["llama, tied", "qwen2, biases"])
def test_llama_cpp_answers_the_same(tmp_path: Path, kind: str) -> None:
    import xllamacpp

    model = model_of(tmp_path / "it", kind)
    wanted = torch.log_softmax(logits(tmp_path / "it")[0, -1], -1)
    for name, most in (("f16", 0.01), ("q8_0", 0.2), ("q4_k_m", 2.0)):
        gguf_file.write(model, tmp_path / f"{name}.gguf", name)
        asked = xllamacpp.CommonParams()
        asked.model.path, asked.n_ctx, asked.warmup = str(tmp_path / f"{name}.gguf"), 256, False
        server = xllamacpp.Server(asked)
        said = server.handle_completions(
            {"prompt": IDS[0].tolist(), "n_predict": 1, "n_probs": 5, "temperature": 0}
        )
        top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        assert len(top) == 5
        assert max(abs(one["logprob"] - float(wanted[one["id"]])) for one in top) < most, name
        if name == "f16":
            assert [one["id"] for one in top] == wanted.topk(5).indices.tolist()
