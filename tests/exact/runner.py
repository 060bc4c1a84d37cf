"""Runs a cell on this rank: samples through packing, batching, loss and engine, step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from raytune_ft.config.schema import LoraSection, Recipe
from raytune_ft.data.packing import Pieces, Position, WindowTokens, divide_rows, pack_pieces
from raytune_ft.data.places import Placed
from raytune_ft.data.report import new_report
from raytune_ft.model import adapter
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training import presets
from raytune_ft.training.batching import steps
from raytune_ft.training.engine import Engine, State, TorchEngine, ZeroEngine, rank
from tests.exact import oracle
from tests.exact.cells import BUCKETS, MAX_LENGTH, Cell, samples

CPU = torch.device("cpu")
LR, BETAS, DECAY, EPSILON = 1e-2, (0.0, 0.99), 0.01, 1e-8
"""Without an average of gradients, AdamW keeps the gradient of the last step as it got it."""
CLIPPED_NORM, FREE_NORM = 0.01, 1e9
RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Outcome:
    """The worst of all steps, relative."""

    gradient: float
    """Against the oracle at the same weights."""
    norm: float
    step: float
    """Weights behind a step, against AdamW's formula in float64, over the learning rate."""
    steps: int


def recipe_of(cell: Cell, folder: Path) -> Recipe:
    """Write the DeepSpeed file of a cell and name it in a recipe."""
    size = BUCKETS[cell.bucket]
    zero = {
        "stage": cell.stage, "reduce_bucket_size": size, "allgather_bucket_size": size,
        "stage3_prefetch_bucket_size": size, "stage3_param_persistence_threshold": 100,
        "overlap_comm": False,
    }  # fmt: skip
    file = folder / f"zero_{cell.stage}_{cell.bucket}.json"
    if rank() == 0:
        file.write_text(json.dumps({"zero_optimization": zero}))
    return Recipe.model_validate({
        "model": {"path": str(folder), "method": cell.method},
        "data": {"sources": [{"path": "none.jsonl"}], "max_length": MAX_LENGTH,
                 "pack": cell.packing},
        "train": {
            "micro_batch_size": cell.micro, "accumulation": cell.accumulation, "lr": LR,
            "betas": BETAS, "weight_decay": DECAY, "deepspeed": str(file),
            "max_norm": CLIPPED_NORM if cell.clipped else FREE_NORM,
        },
        "run": {"workers": cell.world},
    })  # fmt: skip


def build(cell: Cell, recipe: Recipe) -> tuple[Engine, State]:
    """Make the cell's engine on the matrix's network; return what it begins with as well."""
    dtype = getattr(torch, cell.dtype)
    model: Any = oracle.build_network(dtype)
    if cell.method == "lora":
        model.requires_grad_(False)
        model = adapter.attach(model, LoraSection(r=RANK, alpha=ALPHA, dropout=0.0), 1)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:  # B is not zero, so that every gradient counts
                    parameter.copy_((0.1 * torch.randn(parameter.shape)).bfloat16())
        for parameter in model.parameters():  # as DeepSpeed does
            parameter.data = parameter.data.to(dtype)
    if cell.checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    module = TokenLoss(model)
    start = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    if cell.dtype == "bfloat16":
        start = {name: weight.float() for name, weight in start.items()}
    config = presets.resolve(
        recipe, torch.float32 if cell.dtype == "float64" else dtype, on_gpu=False
    )
    if config is None:
        return TorchEngine(module, CPU, recipe.train, dtype), start
    return ZeroEngine(module, CPU, recipe.train, config), start


def placed(cell: Cell, recipe: Recipe) -> tuple[list[Placed], Pieces]:
    """Pack the samples as the data stream does, in the cell's order."""
    rows = samples(cell.packing)
    tokens = WindowTokens.of(rows)
    laid = pack_pieces(
        divide_rows(tokens.lengths, recipe.data), recipe.data, np.random.default_rng(cell.order)
    )
    packs = tokens.packs(laid, np.arange(len(rows)))
    found = [
        Placed(pack, Position(0, 0, i + 1) if i + 1 < len(packs) else Position(1, 0, 0),
               (i + 1) / len(packs), new_report(1))
        for i, pack in enumerate(packs)
    ]  # fmt: skip
    return found, laid


def run(cell: Cell, folder: Path, meet: Callable[[], None]) -> Outcome | None:
    """Train one epoch; every rank calls it, rank 0 gets the outcome.

    Args:
        cell: what to run.
        folder: for DeepSpeed's file.
        meet: a barrier.
    """
    recipe = recipe_of(cell, folder)
    meet()
    engine, weights = build(cell, recipe)
    start = weights
    packs, laid = placed(cell, recipe)
    network = oracle.build_network(torch.float64)
    rows, done, found = samples(cell.packing), 0, []
    seconds = State()
    for number, data in enumerate(steps(packs, recipe.train, rank=rank(), workers=cell.world), 1):
        if cell.dtype == "bfloat16":  # its rounding is compared at the same weights
            engine.load(start, {})
            weights, seconds, number = start, {}, 1  # noqa: PLW2901
        for batch in data.micro_batches:
            engine.forward_backward(batch, data.n_targets)
        norm = engine.step(LR)
        after, state = engine.weights(), engine.optimizer_state()
        pieces = [p for i in range(done, done + data.n_packs) for p in laid.pack(i).tolist()]
        done += data.n_packs
        if rank() == 0:
            stretches = [(rows[r].input_ids[a:b], rows[r].labels[a:b]) for r, a, b in pieces]
            scale = ALPHA / RANK if cell.method == "lora" else None
            expected = oracle.gradient(network, weights, stretches, scale)
            found.append(_judge(expected, norm, cell, state, weights, after, seconds, number))
        weights = after
    assert done == len(packs)
    if rank() != 0:
        return None
    return Outcome(*(max(column) for column in zip(*found, strict=True)), steps=len(found))


def _judge(
    expected: State,
    norm: float | None,
    cell: Cell,
    state: State,
    before: State,
    after: State,
    seconds: State,
    number: int,
) -> tuple[float, float, float]:
    """Compare one step with the oracle's; `seconds` are AdamW's averages of squares so far."""
    assert norm is not None
    whole = oracle.norm(expected)
    limit = CLIPPED_NORM if cell.clipped else FREE_NORM
    assert (whole > limit) is cell.clipped, "clipping must be at work where it is asked for"
    shrunk = min(1.0, limit / (whole + 1e-6))
    got = {name: state[f"{name}/exp_avg"].double() for name in expected}
    worst = 0.0
    for name, g in got.items():
        square = seconds.get(name, torch.zeros_like(g))
        seconds[name] = BETAS[1] * square + (1 - BETAS[1]) * g.pow(2)
        root = (seconds[name] / (1 - BETAS[1] ** number)).sqrt() + EPSILON
        wanted = before[name].double() * (1 - LR * DECAY) - LR * g / root
        worst = max(worst, float((after[name].double() - wanted.detach()).abs().max()) / LR)
    clipped = {name: g * shrunk for name, g in expected.items()}
    return oracle.difference(got, clipped), abs(norm - whole) / whole, worst
