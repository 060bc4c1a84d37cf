"""The families, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.errors import ModelError
from raytune_ft.model.families import internlm, native
from raytune_ft.model.families.family import Family

FAMILIES: tuple[Family, ...] = (internlm.FAMILY, native.FAMILY)

# Types of 2023 that need a conversion of their own, which this version does not have.
PLANNED = ("baichuan", "chatglm", "internlm2", "qwen", "Yi")


def detect(config: Mapping[str, Any], where: str = "config.json") -> Family:
    """Return the family of a config.json.

    Args:
        config: content of the file.
        where: name of the file, for messages.

    Raises:
        ModelError: no family reads it, or its weights are quantised already.
    """
    if "quantization_config" in config:
        method = dict(config["quantization_config"]).get("quant_method", "unknown")
        raise ModelError(
            f"{where}: weights are quantised already ({method}); take the model in its original "
            "precision and set model.quantization"
        )
    for family in FAMILIES:
        if family.matches(config):
            return family
    kind = config.get("model_type")
    if kind in PLANNED:
        raise ModelError(
            f"{where}: model type '{kind}' is not supported yet by this version; "
            "use a release of the model in the llama or qwen2 format"
        )
    raise ModelError(
        f"{where}: no known model type '{kind}'; known are internlm and the causal language "
        "models of transformers, such as llama, mistral, qwen2, qwen3, gemma2 and phi3"
    )
