"""Where each linear layer of the loaded network stands in the original file, written by hand.

In: a family and its config.json. Out: layer name -> (original tensor, first row, last row + 1).
"""

from __future__ import annotations

import re

from tests.families.checkpoints import Config

Place = tuple[str, int | None, int | None]
WHOLE = (None, None)


def place_of(family: str, config: Config, layer: str) -> Place:
    """Return the original tensor and its rows that hold a layer's weight.

    Args:
        family: a key of SPECS.
        config: its config.json.
        layer: full name in the loaded network, such as `model.layers.0.self_attn.q_proj`.
    """
    group = re.sub(r"_?\d.*|_aug", "", family)
    if group not in ("baichuan", "chatglm", "qwen"):
        return f"{layer}.weight", *WHOLE
    number, part = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", layer).groups()  # type: ignore[union-attr]
    width = config.get("hidden_size", config.get("n_embd"))
    if group == "baichuan":
        return _thirds(part, width, f"model.layers.{number}.", "self_attn.W_pack", {})
    if group == "qwen":
        names = {
            "self_attn.o_proj": "attn.c_proj", "mlp.gate_proj": "mlp.w2", "mlp.up_proj": "mlp.w1",
            "mlp.down_proj": "mlp.c_proj",
        }  # fmt: skip
        return _thirds(part, width, f"transformer.h.{number}.", "attn.c_attn", names)
    at = f"transformer.encoder.layers.{number}."
    few = config["multi_query_group_num"] * config["kv_channels"]
    fused = {"q": (0, width), "k": (width, width + few), "v": (width + few, width + 2 * few)}
    if part[-6:] in ("q_proj", "k_proj", "v_proj"):
        return f"{at}self_attention.query_key_value.weight", *fused[part[-6]]
    names = {
        "self_attn.o_proj": "self_attention.dense", "mlp.gate_up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    }  # fmt: skip
    return f"{at}{names[part]}.weight", *WHOLE


def _thirds(part: str, width: int, at: str, fused: str, names: dict[str, str]) -> Place:
    if part[-6:] in ("q_proj", "k_proj", "v_proj"):
        start = "qkv".index(part[-6]) * width
        return f"{at}{fused}.weight", start, start + width
    return f"{at}{names.get(part, part)}.weight", *WHOLE
