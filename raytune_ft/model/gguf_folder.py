"""From a Llama-type GGUF file to a model folder: bfloat16 safetensors, config and tokenizer.

Reads the file with `gguf` and writes what transformers' own importer would, in a fifth of the
time; one difference is on purpose: digits are split one by one, as `tokenizer.ggml.pre` says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from raytune_ft.errors import ModelError
from raytune_ft.model.tensors import save_tensors

if TYPE_CHECKING:
    from gguf import GGUFReader

CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of special tokens."""

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def write_model_folder(gguf_file: Path, folder: Path) -> None:
    """Write `folder` from a GGUF file; config.json comes last, so it marks a whole folder.

    Raises:
        ModelError: the file is not a Llama with a byte-level tokenizer.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_file)
    values = Fields(reader)
    if (
        values.text("general.architecture") != "llama"
        or values.get("tokenizer.ggml.pre") != "smollm"
    ):
        raise ModelError(f"{gguf_file}: only Llama with the smollm tokenizer is readable")
    folder.mkdir(parents=True)
    tensors = read_tensors(reader, values)
    save_tensors(tensors, folder / "model.safetensors")
    write_tokenizer(values, folder)
    ids = special_ids(values)
    _write_json(folder / "generation_config.json", ids)
    config = {**model_config(values, tied="lm_head.weight" not in tensors), **ids}
    _write_json(folder / "config.json", config)


class Fields:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields

    def get(self, name: str) -> Any:
        """Return a value, None if the file lacks it."""
        field = self._fields.get(name)
        return None if field is None else field.contents()

    def text(self, name: str) -> str:
        """Return a text."""
        return str(self.get(name))

    def number(self, name: str) -> int:
        """Return an integer of the `llama.` group."""
        return int(self.get(f"llama.{name}"))


def read_tensors(reader: GGUFReader, values: Fields) -> dict[str, torch.Tensor]:
    """Return all weights, dequantised, under their Hugging Face names, in bfloat16."""
    from gguf import dequantize

    heads = {
        "attn_q": values.number("attention.head_count"),
        "attn_k": values.number("attention.head_count_kv"),
    }
    tensors = {}
    for entry in reader.tensors:
        # a copy, because the file is mapped read-only
        weight = torch.tensor(dequantize(entry.data, entry.tensor_type))
        part = entry.name.split(".")[-2]
        if part in heads:
            weight = unpermute(weight, heads[part])
        tensors[tensor_name(entry.name)] = weight.to(torch.bfloat16).contiguous()
    return tensors


def tensor_name(name: str) -> str:
    """Return the Hugging Face name of `blk.0.attn_q.weight` and the like."""
    *block, part, leaf = name.split(".")
    if block:
        return f"model.layers.{block[1]}.{LAYER_NAMES[part]}.{leaf}"
    return f"{OUTER_NAMES[part]}.{leaf}"


def unpermute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Bring rotary pairs from GGUF's order (0, 1), (2, 3) ... back to halves; weight (out, in)."""
    half = weight.shape[0] // n_heads // 2
    return weight.view(n_heads, half, 2, -1).transpose(1, 2).reshape(weight.shape)


def model_config(values: Fields, *, tied: bool) -> dict[str, Any]:
    """Return the content of config.json, without the special ids."""
    hidden, heads = values.number("embedding_length"), values.number("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": values.number("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": values.number("feed_forward_length"),
        "num_hidden_layers": values.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": values.number("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": values.number("context_length"),
        # stored as float32: 9.9999997e-06 is meant to be 1e-05
        "rms_norm_eps": float(f"{values.get('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(values.get("llama.rope.freq_base")),
        },
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tied,
    }


def special_ids(values: Fields) -> dict[str, int]:
    """Return bos, eos and pad ids."""
    return {
        "bos_token_id": int(values.get("tokenizer.ggml.bos_token_id")),
        "eos_token_id": int(values.get("tokenizer.ggml.eos_token_id")),
        "pad_token_id": int(values.get("tokenizer.ggml.padding_token_id")),
    }


def write_tokenizer(values: Fields, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens: list[str] = values.get("tokenizer.ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in values.get("tokenizer.ggml.merges")]
    vocabulary = {token: id_ for id_, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = values.get("tokenizer.ggml.token_type")
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {f"{k.removesuffix('_id')}": tokens[v] for k, v in special_ids(values).items()}
    unknown = tokens[int(values.get("tokenizer.ggml.unknown_token_id"))]
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **names,
            "unk_token": unknown,
            "model_max_length": values.number("context_length"),
            "clean_up_tokenization_spaces": False,
        },
    )
    template = values.text("tokenizer.chat_template")
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
