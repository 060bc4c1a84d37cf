"""The model classes of families whose files transformers does not read by itself.

Thin subclasses with names of their own: transformers finds a conversion of tensor names by the
name of the class. Importing this module registers all of them, in whatever process it happens, so
a worker that gets one of these classes can load and save with it.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import GlmForCausalLM, LlamaForCausalLM, Qwen2ForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from raytune_ft.model.families import layouts
from raytune_ft.model.families.alibi import AlibiLlamaModel
from raytune_ft.model.families.layout import Layout, conversions
from raytune_ft.model.families.norm_head import NormHead


def _registered(cls: Any) -> Any:
    register_checkpoint_conversion_mapping(cls.__name__, conversions(cls.layout), overwrite=True)
    return cls


@_registered
class ChatGLMNetwork(GlmForCausalLM):  # type: ignore[misc]
    """ChatGLM2 and 3: GLM."""

    layout: ClassVar[Layout] = layouts.CHATGLM


@_registered
class QwenNetwork(Qwen2ForCausalLM):  # type: ignore[misc]
    """Qwen, first generation: Qwen2 with as many key heads as query heads."""

    layout: ClassVar[Layout] = layouts.QWEN


@_registered
class YiNetwork(LlamaForCausalLM):  # type: ignore[misc]
    """Yi, first release: Llama with other names for the norms."""

    layout: ClassVar[Layout] = layouts.YI


@_registered
class BaichuanNetwork(LlamaForCausalLM):  # type: ignore[misc]
    """Baichuan-7B: Llama."""

    layout: ClassVar[Layout] = layouts.BAICHUAN


@_registered
class Baichuan2Network(BaichuanNetwork):
    """Baichuan2-7B: Llama with a NormHead."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@_registered
class BaichuanAlibiNetwork(BaichuanNetwork):
    """Baichuan-13B: Llama with ALiBi."""

    _supports_flash_attn = False
    _supports_flex_attn = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = AlibiLlamaModel(config)
        self.post_init()


@_registered
class Baichuan2AlibiNetwork(BaichuanAlibiNetwork):
    """Baichuan2-13B: Llama with ALiBi and a NormHead."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.lm_head = NormHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
