"""Fast path: a loaded model in, the same model computing by fewer and larger kernels, a report out.

Each module that can gets a form in front of its class: a decoder layer adds up and norms at once,
an attention block makes q, k and v in one step and needs no mask, an MLP makes gate and up in one
step, and a lone LoRA layer unpacks its base once. Parameters, names, state dict and PEFT's own
structure stay. A module that cannot keeps its own way and has one line in the report.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from raytune_ft.errors import ModelError
from raytune_ft.kernels.linear import Base, reserve
from raytune_ft.model.fastpath import attention, blocks, eighths, linears
from raytune_ft.model.fastpath.lane import turn_back, turn_into
from raytune_ft.model.fastpath.proof import differing, make_of
from raytune_ft.model.loss import causal_model

BLOCKS = ("self_attn", "attn")
"""What layers call their attention."""


@dataclass(frozen=True)
class Report:
    """What computes in its fast form, and what does not."""

    counts: dict[str, int] = field(default_factory=dict)
    """Modules by kind: layers, attention, mlp, norms, linear."""
    plain: tuple[str, ...] = ()
    """A line for each kind of module that keeps its own way."""
    packed: bool = False
    """All attention takes the bounds of segments, so that no mask is needed."""
    drops: bool = False
    """Adapters have dropout, which one seed per batch serves."""
    eighths: tuple[str, ...] = ()
    """Lines about what multiplies in float8."""

    @property
    def is_on(self) -> bool:
        """Whether anything computes in its fast form."""
        return any(self.counts.values())

    @property
    def takes_bounds(self) -> bool:
        """Whether layers or attention blocks look for the bounds of segments."""
        return bool(self.counts.get("layers") or self.counts.get("attention"))

    def lines(self) -> list[str]:
        """Return the report for a log; nothing if the fast path is off."""
        known = ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count)
        first = [f"fast path: {known}"] if known else []
        return [*first, *self.eighths, *(f"fast path: not {line}" for line in self.plain)]


OFF = Report()


def report_of(loss: nn.Module) -> Report:
    """Return what was installed under a `loss.TokenLoss`."""
    found: Report | None = getattr(loss, "fast", None)
    return OFF if found is None else found


def install(
    model: nn.Module,
    device: torch.device,
    wanted: bool | Literal["auto"] = "auto",
    *,
    sharded: bool = False,
    resident: bool = False,
    compute: str = "auto",
) -> Report:
    """Let a model's modules compute in their fast form where that is the same mathematics.

    Args:
        model: loaded and frozen or not, with its adapter if it gets one.
        device: where it computes; `auto` is a GPU.
        wanted: `model.fast_path` of the recipe.
        sharded: ZeRO-3 will part its weights.
        resident: keep NF4 weights unpacked beside the packed ones.
        compute: `model.compute` of the recipe; `fp8` wants the fast path on a CPU as well.

    Raises:
        ModelError: float8 is asked for and nothing of this model would multiply so.
    """
    in_fp8 = compute == "fp8"
    if not in_fp8 and not (device.type == "cuda" if wanted == "auto" else wanted):
        return OFF
    network = causal_model(model)
    refused = _refusal(network, sharded=sharded)
    if refused is not None and in_fp8:
        raise ModelError(f"model.compute 'fp8' does nothing here: {refused}; leave it out")
    if refused is not None:
        return Report(plain=(f"this model: {refused}",))
    installer = _Installer(network, resident=resident and not in_fp8)
    installer.run()
    bases = installer.bases()
    said: tuple[str, ...] = ()
    if in_fp8:  # behind the proof, whose bounds are those of the same mathematics
        said = eighths.into_fp8(bases, resident=resident, refused=installer.report().plain)
    reserve([base for base in bases if base.eighths is None])
    return installer.report(said)


def _refusal(network: Any, *, sharded: bool) -> str | None:
    if sharded:
        return "ZeRO-3 parts its weights among the workers"
    if any(parameter.dtype is torch.float64 for parameter in network.parameters()):
        return "float64 is for proofs"
    if not _layers(network.base_model):
        return "it has no list of decoder layers"
    return None


def _layers(body: nn.Module) -> list[Any]:
    """Return a network's decoder layers: its outermost list of modules."""
    lists = [child for child in body.children() if isinstance(child, nn.ModuleList)]
    return list(lists[0]) if lists else []


class _Installer:
    """Goes through a network once and notes what becomes of each module."""

    def __init__(self, network: Any, *, resident: bool) -> None:
        self.network = network
        self.config = network.config.get_text_config()
        self.resident = resident
        self.layers = _layers(network.base_model)
        # transformers takes seconds to import, and the driver imports this as well
        from raytune_ft.model.families.alibi import AlibiLlamaModel, slopes

        self.slopes = None
        if isinstance(network.base_model, AlibiLlamaModel):
            self.slopes = slopes(self.config.num_attention_heads)
        self.fast: dict[nn.Module, str] = {}
        self.refused: Counter[tuple[str, str]] = Counter()
        self.seen: set[nn.Module] = set()

    def run(self) -> None:
        for norm in self.network.modules():
            form = blocks.norm_form(norm)
            if form is not None:
                self._take(
                    norm, "norms", None if form.centred else blocks.FastNorm, **{blocks.NORM: form}
                )
        for layer in self.layers:
            self._attention(layer)
            self._mlp(layer)
            self._layer(layer)
        self._lone_linears()
        self._prove()

    def bases(self) -> list[Base]:
        """Return the frozen weights that compute in their fast form."""
        return [module.__dict__[linears.PART].base for module in self._linears()]

    def report(self, in_fp8: tuple[str, ...] = ()) -> Report:
        counts = Counter(self.fast.values())
        kinds = ("layers", "attention", "mlp", "norms", "linear")
        packed = counts["attention"] == len(self.layers)
        drops = any(linears.has_dropout(module) for module in self._linears())
        found = {kind: counts[kind] for kind in kinds}
        return Report(found, tuple(self._plain_lines()), packed, drops, in_fp8)

    def _take(self, module: nn.Module, kind: str, form: type | None, **attributes: Any) -> None:
        for name, value in attributes.items():
            setattr(module, name, value)
        if form is not None:
            turn_into(module, form)
        self.fast[module] = kind

    def _attention(self, layer: Any) -> None:
        name = next((name for name in BLOCKS if hasattr(layer, name)), None)
        if name is None:
            self.refused["attention", f"{type(layer).__name__} has no fast form"] += 1
            return
        block = getattr(layer, name)
        form = attention.form_of(block, self.config, self.slopes)
        if isinstance(form, str):
            self.refused["attention", form] += 1
            return
        self._parts(block, attention.linears_of(block, form))
        self._take(block, "attention", attention.FastAttention, **{attention.FORM: form})

    def _mlp(self, layer: Any) -> None:
        mlp: Any = getattr(layer, "mlp", None)
        form = blocks.mlp_form(mlp)
        if isinstance(form, str):
            self.refused["mlp", form] += 1
            return
        self._parts(mlp, blocks.mlp_linears(mlp, form))
        self._take(mlp, "mlp", blocks.FastMlp, **{blocks.MLP: form})

    def _layer(self, layer: Any) -> None:
        form = blocks.layer_form(layer)
        if isinstance(form, str):
            self.refused["layer", form] += 1
            return
        self._take(layer, "layers", blocks.FastLayer, **{blocks.LAYER: form})

    def _parts(self, owner: nn.Module, layers: Sequence[nn.Module]) -> None:
        names = {module: name for name, module in owner.named_children()}
        for layer in layers:
            self._linear(names[layer], layer)

    def _linear(self, name: str, layer: nn.Module) -> None:
        self.seen.add(layer)
        refused = linears.refusal(layer)
        if refused is not None:
            self.refused[name, refused] += 1
            return
        part = linears.part_of(layer, resident=self.resident, stream=len(self.seen) - 1)
        form = linears.FastLora if linears.is_lora(layer) else None
        self._take(layer, "linear", form, **{linears.PART: part})

    def _lone_linears(self) -> None:
        """Take the LoRA layers that belong to no block in a fast form."""
        for name, module in self.network.named_modules():
            if linears.is_lora(module) and module not in self.seen:
                self._linear(name.rpartition(".")[2], module)

    def _linears(self) -> Iterator[nn.Module]:
        return (module for module in self.fast if linears.PART in module.__dict__)

    def _prove(self) -> None:
        wrong = differing(self.network, self.layers)
        for layer in self.layers:
            size = wrong.get(make_of(layer))
            if size is None:
                continue
            for module in layer.modules():
                if self.fast.pop(module, None) is not None:
                    self._put_back(module)
            self.refused[type(layer).__name__, f"its fast form differs by {size:.2g} here"] += 1

    def _put_back(self, module: nn.Module) -> None:
        names = (attention.FORM, blocks.LAYER, blocks.MLP, blocks.NORM, linears.PART)
        for name in names:
            module.__dict__.pop(name, None)
        turn_back(module)

    def _plain_lines(self) -> Iterator[str]:
        """Yield a line for each reason, with the names that have it."""
        together: dict[tuple[str, int], list[str]] = {}
        for (name, reason), count in self.refused.items():
            together.setdefault((reason, count), []).append(name)
        for (reason, count), names in together.items():
            where = f"{', '.join(names)} of {count} layer{'s' * (count != 1)}"
            yield f"{where}: {reason}; as transformers and PEFT compute it"
