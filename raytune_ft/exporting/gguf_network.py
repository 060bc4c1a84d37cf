"""GGUF, the network: a configuration in, architecture fields and the file's tensors out.

Names are gguf's own (`get_tensor_name_map`); the format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The llama architecture rotates pairs of
neighbours, so rows of queries and keys lie in another order there than in transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from raytune_ft.errors import ModelError

ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
"""transformers' model type -> gguf's architecture."""
ROPE_FACTORS = "rope_freqs.weight"
ENDS = (".weight", ".bias")


@dataclass(frozen=True)
class Network:
    """A native network as a GGUF file has it."""

    config: Any
    """transformers' own."""
    where: str
    """The model's folder, for messages."""

    def __post_init__(self) -> None:
        """Refuse what the architectures here do not compute."""
        kind, rope = self.config.model_type, self._rope
        if kind not in ARCHITECTURES:
            raise ModelError(
                f"{self.where}: no GGUF for networks of type '{kind}'; {', '.join(ARCHITECTURES)} "
                "have it, others by llama.cpp's convert_hf_to_gguf.py from the merged folder"
            )
        if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
            raise ModelError(
                f"{self.where}: no GGUF for positions of type '{rope['rope_type']}'; take "
                "llama.cpp's convert_hf_to_gguf.py on the merged folder"
            )

    @property
    def architecture(self) -> str:
        """Its name in gguf."""
        return ARCHITECTURES[self.config.model_type].lower()

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        given = getattr(self.config, "head_dim", None)
        return int(given or self.config.hidden_size // self.config.num_attention_heads)

    @property
    def _rope(self) -> dict[str, Any]:
        found = dict(getattr(self.config, "rope_parameters", None) or {})
        return {"rope_type": "default", "rope_theta": 10000.0, **found}

    def write_fields(self, writer: Any, rows: int) -> None:
        """Give a GGUFWriter the architecture's fields; `rows` are those of the embedding."""
        config = self.config
        writer.add_context_length(int(config.max_position_embeddings))
        writer.add_embedding_length(int(config.hidden_size))
        writer.add_block_count(int(config.num_hidden_layers))
        writer.add_feed_forward_length(int(config.intermediate_size))
        writer.add_head_count(int(config.num_attention_heads))
        writer.add_head_count_kv(int(config.num_key_value_heads))
        writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_key_length(self.head_dim)
        writer.add_value_length(self.head_dim)
        writer.add_vocab_size(rows)
        self._write_rope(writer)

    def _write_rope(self, writer: Any) -> None:
        from gguf import RopeScalingType

        rope = self._rope
        writer.add_rope_freq_base(float(rope["rope_theta"]))
        if rope["rope_type"] in ("linear", "yarn"):
            kind = RopeScalingType.LINEAR if rope["rope_type"] == "linear" else RopeScalingType.YARN
            writer.add_rope_scaling_type(kind)
            writer.add_rope_scaling_factor(float(rope["factor"]))
        if rope["rope_type"] == "yarn":
            before = rope.get("original_max_position_embeddings")
            writer.add_rope_scaling_orig_ctx_len(int(before or self.config.max_position_embeddings))

    def own_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield tensors that are not in the model's files."""
        if self._rope["rope_type"] == "llama3":
            yield ROPE_FACTORS, llama3_factors(self._rope, self.head_dim)

    def names(self) -> Any:
        """Return what translates names of tensors."""
        import gguf

        arch = gguf.MODEL_ARCH[ARCHITECTURES[self.config.model_type]]
        names = gguf.get_tensor_name_map(arch, int(self.config.num_hidden_layers))

        def translate(name: str) -> str:
            found: str | None = names.get_name(name, try_suffixes=ENDS)
            if found is None:
                raise ModelError(f"{self.where}: tensor '{name}' has no name in a GGUF file")
            return found

        return translate

    def arranged(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return a native tensor with its rows in the file's order."""
        heads = {
            "q_proj": int(self.config.num_attention_heads),
            "k_proj": int(self.config.num_key_value_heads),
        }
        module = name.split(".")[-2]
        if self.architecture != "llama" or module not in heads:
            return tensor
        half = tensor.shape[0] // heads[module] // 2
        pairs = tensor.reshape(heads[module], 2, half, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)


def llama3_factors(rope: dict[str, Any], head_dim: int) -> torch.Tensor:
    """Return what each frequency is divided by in Llama 3.1's positions, float32 (head_dim/2,).

    Source: the rule of transformers' `_compute_llama3_parameters`.
    """
    factor, low, high = (
        float(rope[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")
    )
    before = float(rope["original_max_position_embeddings"])
    found = []
    for place in range(0, head_dim, 2):
        length = 2 * math.pi * float(rope["rope_theta"]) ** (place / head_dim)
        smooth = (before / length - low) / (high - low)
        if length < before / high:
            found.append(1.0)
        elif length > before / low:
            found.append(factor)
        else:
            found.append(1.0 / ((1 - smooth) / factor + smooth))
    return torch.tensor(found, dtype=torch.float32)
