"""The families, in the order in which they are tried, and what is said about the others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.errors import ModelError
from raytune_ft.model.families import baichuan, chatglm, internlm, native, qwen, yi
from raytune_ft.model.families.family import ConfigJson, ContradictionError, Family
from raytune_ft.model.silence import quiet

FAMILIES: tuple[Family, ...] = (
    internlm.FAMILY,
    chatglm.FAMILY,
    qwen.FAMILY,
    *baichuan.FAMILIES,
    yi.FAMILY,
    native.FAMILY,
)

SUPPORTED = (
    "known are internlm, chatglm (2 and 3), qwen, baichuan, Yi and the causal language models of "
    "transformers, such as llama, mistral, qwen2, qwen3, gemma2, phi3 and gpt_bigcode"
)
ADD_ONE = "docs/models.md says how to add a model card"

REFUSED: Mapping[str, str] = {
    "internlm2": (
        "its queries, keys and values are interleaved in one tensor (wqkv), which is not read; "
        "take the release in the llama format (internlm2-chat-7b-llama)"
    ),
}
"""Model types with more to say about them than that they are unknown."""


def detect(config: ConfigJson, where: str = "config.json") -> Family:
    """Return the family of a config.json, after checking that its network computes the same.

    Args:
        config: content of the file.
        where: name of the file, for messages.

    Raises:
        ModelError: no family reads it, its fields contradict each other, or one of them asks for
            what the network does not compute. One line with file and field.
    """
    if config.get("quantization_config") is not None:
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise ModelError(
            f"{where}: quantization_config: the weights are quantised already ({method}); take the "
            "model in its original precision and set model.quantization"
        )
    try:
        family = next((family for family in FAMILIES if family.matches(config)), None)
    except ContradictionError as error:
        raise ModelError(f"{where}: {error}") from None
    if family is None:
        raise ModelError(f"{where}: {_unknown(config)}")
    for problem in family.problems(config):
        raise ModelError(f"{where}: {problem}")
    return family


def translate(config: ConfigJson, where: str = "config.json") -> Any:
    """Return the configuration of the network that reads a config.json, whatever its family.

    Its fields have transformers' names, so whoever needs a model's shape or its context asks here.

    Raises:
        ModelError: see `detect`; or a value has the wrong type.
    """
    from huggingface_hub.errors import StrictDataclassError

    family = detect(config, where)
    try:
        with quiet():
            return family.translate(config)
    except (StrictDataclassError, TypeError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"{where}: cannot be understood ({reason}); copy the file again") from None


def _unknown(config: ConfigJson) -> str:
    kind = str(config.get("model_type"))
    if kind in REFUSED:
        return f"model_type '{kind}': {REFUSED[kind]}"
    if config.get("auto_map"):
        return (
            f"model_type '{kind}' exists only as Python code beside its weights (auto_map), and "
            f"code of a model folder is never run; {SUPPORTED}; {ADD_ONE}"
        )
    return f"no known model type '{kind}' (model_type); {SUPPORTED}; {ADD_ONE}"
