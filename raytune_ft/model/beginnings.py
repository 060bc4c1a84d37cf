"""Beginnings: a new adapter in, its first weights in place (PEFT's `init_lora_weights`).

`pissa` (arXiv 2404.02948) and `olora` (arXiv 2406.01775) take the adapter's first product out of
the base, so that nothing changes until it is trained; `first_of` then knows that product, and what
is saved is laid on the base as it was. `loftq` (arXiv 2310.08659) makes up for what NF4 lost, and
`eva` (arXiv 2410.07170) looks along what the first rows excite. `gaussian`, and the default, are
PEFT's own.

Shapes: W (out, in), A (r, in), B (out, r); the update is scale * B A.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from raytune_ft.config.schema import LoraSection
from raytune_ft.errors import ModelError, RecipeError
from raytune_ft.model.silence import quiet

Batch = Mapping[str, torch.Tensor]
Pair = tuple[torch.Tensor, torch.Tensor]
"""A and B of one layer."""

FIRST = "raytune_first"
"""Attribute of a wrapped model: the pairs whose product was taken out of its base."""
PEFT_PREFIX = "base_model.model."
ADAPTER = "default"
LOSS_INPUTS = (
    "input_ids", "labels", "position_ids", "segment_ids", "cu_seqlens", "max_seqlen",
)  # fmt: skip
EVA_PASSES = 60
"""Over the samples; directions that have not settled by then never will, on these rows."""


@dataclass(frozen=True)
class Source:
    """What a beginning may look at, beside the base's weights in memory."""

    folder: Path
    """Of the base model, whose files hold the weights before quantisation."""
    samples: Callable[[], Iterable[Batch]] | None = None
    """Gives the first micro-batches of training, the same ones on every rank."""


def peft_init(lora: LoraSection) -> bool | str:
    """Return what PEFT itself is to do when layers are made; `begin` does the rest."""
    init = lora.init_lora_weights
    return init if isinstance(init, bool) or init in ("gaussian", "eva") else True


def is_kept(init: bool | str) -> bool:
    """Tell whether a beginning is worth keeping: it takes long, or looks at data."""
    return isinstance(init, str) and init not in ("gaussian", "orthogonal")


def moves_base(init: bool | str) -> bool:
    """Tell whether a beginning takes the adapter's first product out of the base."""
    return isinstance(init, str) and init.startswith(("pissa", "olora"))


def begin(model: Any, lora: LoraSection, source: Source | None) -> None:
    """Give a new adapter's layers their first weights; random numbers are torch's.

    Raises:
        RecipeError: the beginning does not exist for these layers or rows.
    """
    init = lora.init_lora_weights
    if init == "orthogonal":
        for _, layer in layers_of(model):
            put(layer, orthogonal(layer.in_features, layer.out_features, layer.r[ADAPTER]))
    elif init == "eva":
        _begin_eva(model, lora, source)
    elif init == "loftq":
        _begin_loftq(model, source)
    elif moves_base(init):
        find = olora if init == "olora" else pissa(str(init))
        for name, layer in layers_of(model):
            _check_rank(name, layer, str(init))
            put(layer, find(layer.get_base_layer().weight.float(), layer.r[ADAPTER], _scale(layer)))
        take_out(model)


def take_out(model: Any) -> None:
    """Take the adapter's product out of the base and remember it, layer by layer."""
    first: dict[str, Pair] = {}
    for name, layer in layers_of(model):
        a, b = (matrix[ADAPTER].weight.detach() for matrix in (layer.lora_A, layer.lora_B))
        base = layer.get_base_layer().weight
        base.data = torch.addmm(base.float(), b.float(), a.float(), alpha=-_scale(layer)).to(base)
        first[name] = (a.cpu().clone(), b.cpu().clone())
    setattr(model, FIRST, first)


def first_of(model: Any) -> Mapping[str, Pair]:
    """Return the pairs that were taken out of a model's base, by PEFT's names of layers."""
    first: Mapping[str, Pair] = getattr(model, FIRST, {})
    return first


def on_base(tensors: Mapping[str, torch.Tensor], first: Mapping[str, Pair]) -> dict[str, Any]:
    """Return an adapter's tensors as they are right on the base as it was: of twice the rank.

    Args:
        tensors: by PEFT's names in files, trained.
        first: the pairs that were taken out of the base.
    """
    moved = dict(tensors)
    for name, (a, b) in first.items():
        for key, part, dim in (("lora_A", a, 0), ("lora_B", -b, 1)):
            trained = tensors[f"{name}.{key}.weight"]
            moved[f"{name}.{key}.weight"] = torch.cat([trained, part.to(trained)], dim)
    return moved


def pairs_in(tensors: Mapping[str, torch.Tensor]) -> dict[str, Pair]:
    """Return the A and B of each layer in an adapter's tensors."""
    end = ".lora_A.weight"
    names = [name.removesuffix(end) for name in tensors if name.endswith(end)]
    return {n: (tensors[f"{n}.lora_A.weight"], tensors[f"{n}.lora_B.weight"]) for n in names}


def layers_of(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, layer) of the adapted linear layers."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and ADAPTER in module.lora_A:
            yield name, module


def put(layer: Any, pair: Pair) -> None:
    """Write A and B into a layer."""
    with torch.no_grad():
        for matrix, content in zip((layer.lora_A, layer.lora_B), pair, strict=True):
            matrix[ADAPTER].weight.copy_(content)


def orthogonal(n_in: int, n_out: int, r: int) -> Pair:
    """Draw A and B whose product is 0 though neither is: the rows between them are orthogonal."""
    basis = torch.linalg.qr(torch.randn(r, r)).Q
    a = basis[0::2].T @ torch.randn(r // 2, n_in)
    b = torch.randn(n_out, r // 2) @ basis[1::2]
    return a / 10, b / 10


def pissa(init: str) -> Callable[[torch.Tensor, int, float], Pair]:
    """Return what finds a weight's largest r directions; `pissa_niter_N` by N subspace steps."""
    steps = re.search(r"\d+$", init)

    def find(weight: torch.Tensor, r: int, scale: float) -> Pair:
        if steps is None:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        else:
            u, s, v = torch.svd_lowrank(weight, r, niter=int(steps.group()))
            vt = v.T
        root = (s[:r] / scale).sqrt()
        return root[:, None] * vt[:r], u[:, :r] * root

    return find


def olora(weight: torch.Tensor, r: int, _scale: float) -> Pair:
    """Return the first r parts of a weight's QR decomposition."""
    q, upper = torch.linalg.qr(weight)
    return upper[:r], q[:, :r]


def loftq(lost: torch.Tensor, r: int, scale: float) -> Pair:
    """Return the pair whose scaled product is the nearest of rank r to what was lost."""
    return pissa("pissa")(lost, r, scale)


def _begin_loftq(model: Any, source: Source | None) -> None:
    from raytune_ft.model.nf4 import dequantized
    from raytune_ft.model.original import Original

    if source is None:
        raise ModelError("loftq needs the folder of the base")
    waiting = {name.removeprefix(PEFT_PREFIX): layer for name, layer in layers_of(model)}

    def visit(name: str, weight: torch.Tensor) -> torch.Tensor:
        place = name.removesuffix(".weight")
        layer = waiting.pop(place, None)
        if layer is not None:
            _check_rank(place, layer, "loftq")
            stored = layer.get_base_layer().weight
            if not hasattr(stored, "quant_state"):
                raise RecipeError(
                    f"lora.targets: {place} is not quantised; loftq is for NF4 layers"
                )
            seen = dequantized(stored.data, stored.quant_state).float()
            put(layer, loftq(weight.to(seen) - seen, layer.r[ADAPTER], _scale(layer)))
            _renew_lengths(layer)
        return weight

    for _ in Original.of(source.folder).rewritten(visit, "native", untie=False):
        pass
    if waiting:
        raise ModelError(f"{source.folder}: no weights of {min(waiting)} in its files")


def _renew_lengths(layer: Any) -> None:
    """Let DoRA's lengths be those of the weights that the layer now has."""
    if ADAPTER in layer.lora_magnitude_vector:
        layer.lora_magnitude_vector[ADAPTER].update_layer(
            base_layer=layer.get_base_layer(),
            lora_A=layer.lora_A[ADAPTER].weight,
            lora_B=layer.lora_B[ADAPTER].weight,
            scaling=_scale(layer),
        )


def _begin_eva(model: Any, lora: LoraSection, source: Source | None) -> None:
    from peft import initialize_lora_eva_weights

    from raytune_ft.model.loss import TokenLoss

    if source is None or source.samples is None:
        raise ModelError("eva needs rows to look at")
    device = next(model.parameters()).device
    batches = list(source.samples())
    samples = [{key: _on(value, device) for key, value in batch.items()} for batch in batches]
    most = max(int(_looked_at(batch, None)[:, 0].numel()) for batch in samples)
    wanted = round(lora.r * _rho(model))
    if most < wanted:
        raise RecipeError(
            f"lora.init_lora_weights 'eva': the longest pack has {most} trained tokens and "
            f"{wanted} directions are looked for; lower lora.r or raise data.max_length"
        )
    model.peft_config[ADAPTER].eva_config.rho = _rho(model)
    loss, passes = TokenLoss(model), 0

    def forward(_model: nn.Module, inputs: Batch) -> None:
        nonlocal passes
        passes += 1
        if passes > EVA_PASSES * len(samples):
            raise RecipeError(
                "lora.init_lora_weights 'eva': the directions of the first rows do not settle; "
                "lower lora.r, raise train.accumulation or choose another beginning"
            )
        loss(**{key: inputs[key] for key in LOSS_INPUTS if key in inputs})

    chosen = [batch for batch in samples if len(_looked_at(batch, None)) >= wanted]
    with quiet():
        initialize_lora_eva_weights(
            model,
            chosen,
            forward_fn=forward,
            prepare_model_inputs_fn=_looked_at,
            prepare_layer_inputs_fn=_inputs_at,
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )


def _rho(model: Any) -> float:
    """Return how many times r directions each layer may get: PEFT's 2, or as many as it has."""
    most = [int(min(layer.in_features, layer.out_features)) for _, layer in layers_of(model)]
    return min(2.0, min(most) / int(model.peft_config[ADAPTER].r))


def _looked_at(batch: Batch, _config: Any) -> torch.Tensor:
    """Return the places (n, 2) of trained tokens."""
    return ((batch["segment_ids"] >= 0) & (batch["labels"] != -100)).nonzero()


def _inputs_at(layer_input: Any, places: torch.Tensor, _name: str) -> torch.Tensor:
    given: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    # the output head sees chosen tokens only
    return given if given.ndim == 2 else given[places.T.unbind()]


def _on(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    return value.to(device) if value.ndim else value


def _scale(layer: Any) -> float:
    return float(layer.scaling[ADAPTER])


def _check_rank(name: str, layer: Any, init: str) -> None:
    most, r = min(layer.in_features, layer.out_features), layer.r[ADAPTER]
    if r > most:
        raise RecipeError(
            f"lora.r: {name} is {layer.out_features} x {layer.in_features}, of rank {most}, and "
            f"'{init}' cannot find {r} directions in it; lower lora.r"
        )
