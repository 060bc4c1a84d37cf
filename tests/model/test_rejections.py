"""What is refused: one line with the file and the field, before any weight is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.errors import ModelError
from raytune_ft.model.families import FAMILIES, detect, translate
from raytune_ft.model.loading import prepare_folder
from tests.model.families import CONFIGS, make

REJECTED: list[tuple[str, dict[str, Any], str]] = [
    ("chatglm", {"quantization_bit": 4}, "quantization_bit is 4: the weights are quantised"),
    ("chatglm", {"pre_seq_len": 128}, "pre_seq_len is 128: a trained prefix"),
    ("chatglm", {"position_encoding_2d": True}, "position_encoding_2d is True: .*first generation"),
    ("chatglm", {"inner_hidden_size": 16384}, "inner_hidden_size is 16384: .*first generation"),
    ("chatglm", {"add_bias_linear": True}, "add_bias_linear is True: such a block"),
    ("chatglm", {"rmsnorm": False}, "rmsnorm is False: such a block"),
    ("chatglm", {"post_layer_norm": False}, "post_layer_norm is False"),
    (
        "chatglm",
        {"apply_residual_connection_post_layernorm": True},
        "apply_residual_connection_post_layernorm is True",
    ),
    ("chatglm", {"multi_query_attention": False}, "multi_query_attention is False"),
    ("chatglm", {"padded_vocab_size": 151552}, "padded_vocab_size is 151552: this is GLM-4"),
    ("chatglm", {"vision_config": {"layers": 2}}, "vision_config is .*: the model sees pictures"),
    ("qwen", {"rotary_pct": 0.5}, r"rotary_pct is 0\.5: such a block"),
    ("qwen", {"no_bias": False}, "no_bias is False"),
    ("qwen", {"visual": {"width": 1664}}, "visual is .*: the model sees pictures"),
    ("qwen", {"audio": {"n_mels": 80}}, "audio is .*: the model sees pictures or hears"),
    ("baichuan-7b", {"quantizer": {"bits": 4}}, "quantizer is .*: the weights are quantised"),
    (
        "qwen",
        {"quantization_config": {"quant_method": "gptq"}},
        r"quantization_config: the weights are quantised already \(gptq\)",
    ),
    ("baichuan-13b", {"vocab_size": 70000}, "vocab_size: 70000 is neither Baichuan's 64000"),
    (
        "baichuan-7b",
        {"vocab_size": 125696},
        "vocab_size: 125696 is Baichuan2's, but architectures names BaiChuanForCausalLM",
    ),
    (
        "baichuan2-13b",
        {"hidden_size": 4096, "num_attention_heads": 32},
        "max_position_embeddings: absent, as in a 13B, but hidden_size 4096",
    ),
    (
        "baichuan2-7b",
        {"hidden_size": 5120, "num_attention_heads": 40},
        "max_position_embeddings: present, as in a 7B, but hidden_size 5120",
    ),
    ("yi", {"model_type": "internlm2"}, r"model_type 'internlm2': .*wqkv.*llama format"),
    ("yi", {"model_type": "nope"}, r"no known model type 'nope' .*docs/models.md says how to add"),
    (
        "yi",
        {"model_type": "nope", "auto_map": {"AutoModel": "modeling_nope.Nope"}},
        r"model_type 'nope' exists only as Python code .*never run.*chatglm .*docs/models.md",
    ),
    ("internlm", {"hidden_size": "wide"}, r"cannot be understood \(.*hidden_size"),
    ("yi", {"rope_theta": "high"}, r"cannot be understood \(.*high"),
]


@pytest.mark.parametrize(
    "name, change, message", REJECTED, ids=[f"{r[0]}-{min(r[1])}" for r in REJECTED]
)
def test_what_the_network_would_compute_otherwise_is_refused(
    name: str, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make("yi", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name] | change))
    with pytest.raises(ModelError, match=message) as caught:
        prepare_folder(str(tmp_path))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'config.json'}: ")
    assert "\n" not in text


@pytest.mark.parametrize("name", CONFIGS)
def test_the_families_of_the_checkpoints_are_found(name: str) -> None:
    expected = {"qwen-aug": "qwen", "starcoder": "native"}.get(name, name)
    assert detect(CONFIGS[name]).name == expected
    assert [f.name for f in FAMILIES if f.matches(CONFIGS[name])] == [expected]


@pytest.mark.parametrize(
    "name, context", [("baichuan-13b", 128), ("chatglm", 128), ("qwen", 128), ("qwen-aug", 128)]
)
def test_the_context_is_the_models_own(name: str, context: int) -> None:
    """Its field is model_max_length or seq_length; Qwen's max_position_embeddings is not it."""
    config = CONFIGS[name] | ({"max_position_embeddings": 32768} if name == "qwen" else {})
    assert translate(config).max_position_embeddings == context


def test_widths_of_the_released_models() -> None:
    """Qwen counts gate and up together; the 32k ChatGLM3 stretches its rotary base."""
    qwen = translate({"model_type": "qwen", "intermediate_size": 22016})
    assert (qwen.intermediate_size, qwen.vocab_size, qwen.head_dim) == (11008, 151936, 128)
    glm = translate({"model_type": "chatglm", "rope_ratio": 50})
    assert glm.rope_parameters["rope_theta"] == 500_000
    assert (glm.num_key_value_heads, glm.pad_token_id, glm.eos_token_id) == (2, 0, 2)
    assert glm.rms_norm_eps == 1e-5
    old = translate({"model_type": "qwen", "n_embd": 64, "n_head": 4, "ffn_hidden_size": 352})
    assert (old.hidden_size, old.intermediate_size, old.head_dim) == (64, 176, 16)


def test_a_fresh_process_knows_the_names(tmp_path: Path) -> None:
    """A worker imports the package and loads; nothing else registers the conversions."""
    make("chatglm", tmp_path)
    program = (
        "import sys, torch; from pathlib import Path;"
        "from raytune_ft.config.schema import ModelSection;"
        "from raytune_ft.model.loading import load_model;"
        "model = load_model(Path(sys.argv[1]), ModelSection(path='x'), torch.device('cpu'));"
        "print(tuple(model.model.layers[0].self_attn.k_proj.weight.shape))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("(16, 32)")
