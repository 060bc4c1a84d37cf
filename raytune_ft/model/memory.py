"""Memory planning: a recipe and a config.json in, predicted peak bytes per worker out.

Parameters are counted on a network without storage, so every family is counted exactly; what they
and the activations take is `config.footprint`'s arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raytune_ft.config.footprint import Counts, memory_bytes
from raytune_ft.config.schema import Recipe
from raytune_ft.model.adapter import linear_names
from raytune_ft.model.families import detect
from raytune_ft.model.silence import quiet

Change = tuple[str, dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak memory of one worker."""

    parts: dict[str, int]
    """Bytes by part."""
    counts: Counts
    fits: bool | None
    """None where the device's memory is not given."""
    advice: list[str] = field(default_factory=list)
    """Settings that would fit, if this recipe does not."""

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return sum(self.parts.values())


def plan_memory(
    recipe: Recipe, config_json: Mapping[str, Any], device_bytes: int | None
) -> MemoryPlan:
    """Predict the peak memory of a training step.

    Args:
        recipe: the run.
        config_json: content of the model's config.json; weights are not needed.
        device_bytes: memory of one GPU; None: no comparison, and sizes are those of a GPU only
            where there is one.

    Raises:
        ModelError: no family reads this config.json.
    """
    on_gpu = device_bytes is not None or torch.cuda.is_available()
    shape = _Shape(config_json)
    counts = shape.counts(recipe)
    parts = memory_bytes(recipe, counts, on_gpu=on_gpu)
    if device_bytes is None:
        return MemoryPlan(parts, counts, None)
    fits = sum(parts.values()) <= device_bytes

    def would_fit(changed: Recipe) -> bool:
        needed = memory_bytes(changed, shape.counts(changed), on_gpu=on_gpu)
        return sum(needed.values()) <= device_bytes

    return MemoryPlan(parts, counts, fits, [] if fits else _advice(recipe, would_fit))


def trained_parameters(recipe: Recipe, config_json: Mapping[str, Any]) -> int:
    """Count the parameters that a recipe trains, from config values alone."""
    return _Shape(config_json).counts(recipe).trained


class _Shape:
    """The network of a config.json without storage, and what is counted on it."""

    def __init__(self, config_json: Mapping[str, Any]) -> None:
        family = detect(config_json)
        config = family.translate(config_json)
        with torch.device("meta"), quiet():
            self.model: Any = family.network(config)(config)
        self.config = config.get_text_config()

    def counts(self, recipe: Recipe) -> Counts:
        """Count parameters by kind."""
        modules = dict(self.model.named_modules())
        linears = {name: modules[name] for name in linear_names(self.model)}
        sizes = [module.weight.numel() for module in linears.values()]
        embedding = self.model.get_input_embeddings().weight
        head = self.model.get_output_embeddings().weight
        tied = head is embedding or bool(self.config.tie_word_embeddings)
        total = sum(p.numel() for p in self.model.parameters())
        n_head = 0 if tied else head.numel()
        if tied and head is not embedding:
            total -= head.numel()
        adapted = {n: m for n, m in linears.items() if _is_target(n, recipe)}
        inputs = sum(m.weight.shape[1] for m in adapted.values())
        return Counts(
            linear=sum(sizes),
            largest_linear=max(sizes),
            embedding=embedding.numel(),
            head=n_head,
            other=total - sum(sizes) - embedding.numel() - n_head,
            trained=self._trained(recipe, adapted, total),
            adapter_inputs=inputs // self.config.num_hidden_layers,
            layers=self.config.num_hidden_layers,
            hidden=self.config.hidden_size,
            mlp=getattr(self.config, "intermediate_size", None) or 4 * self.config.hidden_size,
            attention=self._attention_width(),
            vocabulary=self.config.vocab_size,
            mask_heads=self.config.num_attention_heads if self._has_alibi() else 0,
        )

    def _has_alibi(self) -> bool:
        """Tell ALiBi by the network of a folder, or by the word of a model card."""
        from raytune_ft.model.families.alibi import AlibiLlamaModel

        card = bool(getattr(self.config, "alibi", False))
        return card or isinstance(self.model.base_model, AlibiLlamaModel)

    def _trained(self, recipe: Recipe, adapted: Mapping[str, nn.Module], total: int) -> int:
        if recipe.model.method == "full":
            return total
        lora = recipe.lora
        count = 0
        for module in adapted.values():
            n_out, n_in = module.weight.shape  # type: ignore[misc]
            count += lora.r * (n_in + n_out) + (n_out if lora.use_dora else 0)
        if lora.bias != "none":
            biased = adapted.values() if lora.bias == "lora_only" else self.model.modules()
            count += sum(_bias_size(module) for module in biased)
        for name, module in self.model.named_modules():
            if any(_ends_with(name, wanted) for wanted in lora.modules_to_save):
                count += sum(p.numel() for p in module.parameters())
        return count

    def _attention_width(self) -> int:
        config = self.config
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return int((heads + 2 * kv_heads) * head_dim)


def _advice(recipe: Recipe, would_fit: Callable[[Recipe], bool]) -> list[str]:
    """Name each change that is enough alone; else the fewest, in order, that are together."""
    changes = list(_changes(recipe))
    alone = [text for text, update in changes if would_fit(_changed(recipe, update))]
    if alone:
        return list({_key(text): text for text in reversed(alone)}.values())[::-1]
    together: dict[str, str] = {}
    for text, update in changes:
        recipe = _changed(recipe, update)
        together[_key(text)] = text
        if would_fit(recipe):
            return [" and ".join(together.values())]
    return []


def _key(text: str) -> str:
    return text.partition(":")[0]


def _changes(recipe: Recipe) -> Iterator[Change]:
    model, train, data = recipe.model, recipe.train, recipe.data
    if model.gradient_checkpointing is False:
        yield (
            "model.gradient_checkpointing: true",
            {"model": {"gradient_checkpointing": True}},
        )
    if train.micro_batch_size > 1:
        steps = train.accumulation * train.micro_batch_size
        yield (
            f"train.micro_batch_size: 1 with train.accumulation: {steps}",
            {"train": {"micro_batch_size": 1, "accumulation": steps}},
        )
    if model.method == "full":
        yield (
            "model.method: lora with model.quantization: nf4",
            {"model": {"method": "lora", "quantization": "nf4"}},
        )
    elif model.quantization != "nf4":
        yield "model.quantization: nf4", {"model": {"quantization": "nf4"}}
    if train.optimizer == "adamw":
        yield (
            "train.optimizer: paged_adamw_32bit",
            {"train": {"optimizer": "paged_adamw_32bit"}},
        )
    length = data.max_length // 2
    while length >= 256:
        yield f"data.max_length: {length}", {"data": {"max_length": length}}
        length //= 2


def _changed(recipe: Recipe, update: dict[str, dict[str, Any]]) -> Recipe:
    sections = {
        name: getattr(recipe, name).model_copy(update=values) for name, values in update.items()
    }
    return recipe.model_copy(update=sections)


def _is_target(name: str, recipe: Recipe) -> bool:
    targets = recipe.lora.targets
    return targets == "all-linear" or any(_ends_with(name, target) for target in targets)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _bias_size(module: nn.Module) -> int:
    bias = getattr(module, "bias", None)
    return bias.numel() if isinstance(bias, torch.Tensor) else 0
