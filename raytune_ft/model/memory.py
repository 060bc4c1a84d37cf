"""Memory planning: a recipe and a config.json in, predicted peak bytes per worker out.

Parameters are counted on a network without storage, so every family is counted exactly; what they
and the activations take is `config.estimates.peak`'s arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from raytune_ft.config.estimates.footprint import NOT_FAST, Counts, norm_widths, own_inputs
from raytune_ft.config.estimates.layout import Choice, Weighed, choose, weigh
from raytune_ft.config.estimates.pace import DEVICES, Device
from raytune_ft.config.estimates.peak import host_bytes, memory_bytes
from raytune_ft.config.estimates.proposal import Proposal, alternatives, proposals
from raytune_ft.config.schema import Recipe
from raytune_ft.model.adapter import linear_names
from raytune_ft.model.families import detect
from raytune_ft.model.silence import quiet

SHOWN = 5
"""Proposals that a plan keeps."""


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted peak memory of one worker."""

    parts: dict[str, int]
    """Bytes by part."""
    counts: Counts
    recipe: Recipe
    """What was planned for, in its layout."""
    choice: Choice | None = None
    """The automatic layout; None on a CPU, and where the recipe lays itself out."""
    host: dict[str, int] = field(default_factory=dict)
    """Bytes of the host's memory by part, with a GPU."""
    fits: bool | None = None
    """None where the device's memory is not given."""
    least: Weighed | None = None
    """The layout that takes the least memory; None where there is no automatic one."""
    proposals: list[Proposal] = field(default_factory=list)
    """The fastest settings that fit, of each way to store and spread; the first is the fastest.
    Empty where the device's memory is not given, or none fits."""

    @property
    def total(self) -> int:
        """Sum of all parts, in bytes."""
        return sum(self.parts.values())


def plan_memory(
    recipe: Recipe,
    config_json: Mapping[str, Any],
    device_bytes: int | None,
    device: Device | None = None,
    packs: float | None = None,
    *,
    free_bytes: int | None = None,
    kept: Choice | None = None,
) -> MemoryPlan:
    """Predict the peak memory of a training step.

    Args:
        recipe: the run.
        config_json: content of the model's config.json; weights are not needed.
        device_bytes: memory of one GPU; None: no comparison, and sizes are those of a CPU.
        device: whose rates decide which settings are the fastest; None: the H200's.
        packs: of an epoch, where they are known.
        free_bytes: of that memory, what no process holds; None: all.
        kept: the layout of a run that is to go on.

    Raises:
        ModelError: no family reads this config.json.
    """
    shape = Shape(config_json)
    counts = shape.counts(recipe)
    if device_bytes is None:
        return MemoryPlan(memory_bytes(recipe, counts, on_gpu=False), counts, recipe)
    device, choice, fixed = device or DEVICES["h200"], None, recipe
    if recipe.train.layout == "auto":
        choice = kept or choose(recipe, counts, free_bytes or device_bytes, device)
        fixed = choice.layout.applied(recipe, counts.layers)
    way: dict[str, Any] = {} if choice is None else choice.layout.way
    parts = memory_bytes(fixed, counts, on_gpu=True, **way)
    # of what is searched, only the method changes the numbers of parameters
    by_method = functools.cache(
        lambda method: shape.counts(
            recipe.model_copy(update={"model": recipe.model.model_copy(update={"method": method})})
        )
    )
    found = proposals(
        recipe,
        lambda changed: by_method(changed.model.method),
        device_bytes,
        device,
        packs,
    )
    return MemoryPlan(
        parts,
        counts,
        fixed,
        choice,
        host_bytes(fixed, counts, way.get("hosted", ())),
        sum(parts.values()) <= device_bytes,
        None if choice is None else _least(recipe, counts, device, choice),
        alternatives(found, SHOWN),
    )


def _least(recipe: Recipe, counts: Counts, device: Device, choice: Choice) -> Weighed:
    last = choice.smaller[-1] if choice.smaller else choice.layout
    return weigh(recipe, counts, device, last)


def trained_parameters(recipe: Recipe, config_json: Mapping[str, Any]) -> int:
    """Count the parameters that a recipe trains, from config values alone."""
    return Shape(config_json).counts(recipe).trained


class Shape:
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
        layers, full = self.config.num_hidden_layers, recipe.model.method == "full"
        mlp = getattr(self.config, "intermediate_size", None) or 4 * self.config.hidden_size
        queries, keys = self._attention_widths()
        return Counts(
            linear=sum(sizes),
            largest_linear=max(sizes),
            embedding=embedding.numel(),
            head=n_head,
            other=total - sum(sizes) - embedding.numel() - n_head,
            trained=self._trained(recipe, adapted, total),
            adapted=len(adapted) // layers,
            adapter_inputs=inputs // layers,
            own_inputs=own_inputs(
                (
                    (name.rpartition(".")[2], module.weight.shape[1])
                    for name, module in (linears if full else adapted).items()
                ),
                mlp,
            ),
            layers=layers,
            hidden=self.config.hidden_size,
            mlp=mlp,
            attention=queries + 2 * keys,
            queries=queries,
            norms=norm_widths(self.config.model_type, self.config.hidden_size, queries, keys),
            vocabulary=self.config.vocab_size,
            mask_heads=self.config.num_attention_heads if self._has_alibi() else 0,
            has_fast_form=self.config.model_type not in NOT_FAST,
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

    def _attention_widths(self) -> tuple[int, int]:
        """Return the widths of queries and of keys."""
        config = self.config
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return int(heads * head_dim), int(kv_heads * head_dim)


def _is_target(name: str, recipe: Recipe) -> bool:
    targets = recipe.lora.targets
    return targets == "all-linear" or any(_ends_with(name, target) for target in targets)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _bias_size(module: nn.Module) -> int:
    bias = getattr(module, "bias", None)
    return bias.numel() if isinstance(bias, torch.Tensor) else 0
