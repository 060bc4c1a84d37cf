"""The gate of the QLoRA benchmark: the fast path's losses and gradients beside the plain path's.

Speed that does not pass does not count. The fast side is as a run has it: its passes of one pack
are replayed from CUDA graphs.
"""

from __future__ import annotations

import gc
from argparse import Namespace
from dataclasses import dataclass
from typing import Any

from benchmarks.qlora_ours import Ours


def check(args: Namespace) -> dict[str, Any]:
    """Compare the fast path with the plain one; see `gate`."""
    steps = {"train.accumulation": args.gate_packs, "train.layout": "recipe", "lora.dropout": 0.0,
             "train.deepspeed": "none"}  # fmt: skip
    sides = {}
    for side, fast_path in (("plain", False), ("fast", True)):
        mine = Namespace(**{**vars(args), "packs": args.gate_packs})
        sides[side] = _gate_side(mine, {**steps, "model.fast_path": fast_path})
    return gate(sides["plain"], sides["fast"])


@dataclass
class Side:
    """What one way of computing gave."""

    losses: list[float]
    gradients: dict[str, Any]
    """Of one step's packs, by the trained weights' names, on the host."""
    fast_path: list[str]
    """What computes in its fast form."""


def _gate_side(args: Namespace, changes: dict[str, Any]) -> Side:
    ours = Ours(args, changes)
    torch = ours.torch
    data = ours.full_steps()
    generator, engine = torch.Generator().manual_seed(1), ours.engine
    with torch.no_grad():
        for name, parameter in sorted(engine.trained.items()):
            if "lora_B" in name:  # at their 0 the gradients of A are 0, too
                noise = torch.randn(parameter.shape, generator=generator) * 0.01
                parameter.copy_(noise)
                engine.masters[name].copy_(noise)
    first = next(data)
    engine.module.train()
    for batch in first.micro_batches:
        engine.forward_backward(batch, first.n_targets)
    found = {name: master.grad.float().cpu() for name, master in engine.masters.items()}
    engine.drop_gradients()
    for number, step in zip(range(1, args.gate_steps + 1), data, strict=False):
        ours.step(step, number)
    losses, said = ours.losses, ours.line()["fast_path"]
    del ours, engine
    gc.collect()  # an engine and its graphs hold each other
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return Side(losses, found, said)


def gate(plain: Side, fast: Side) -> dict[str, Any]:
    """Return by how much two ways differ, and whether that is within the limits.

    Losses of the first steps within 1%, and every layer's gradient within a cosine of 0.999.
    """
    from torch.nn.functional import cosine_similarity

    apart = [abs(a - b) / abs(a) for a, b in zip(plain.losses, fast.losses, strict=True)]
    cosines = {
        name: float(cosine_similarity(want.flatten(), fast.gradients[name].flatten(), dim=0))
        for name, want in plain.gradients.items()
    }
    worst = min(cosines, key=lambda name: cosines[name])
    return {
        "passed": max(apart) < 0.01 and cosines[worst] >= 0.999 and bool(fast.fast_path),
        "fast_path": fast.fast_path,
        "loss_apart": round(max(apart), 6),
        "least_cosine": round(cosines[worst], 6),
        "worst": worst,
        "mean_cosine": round(sum(cosines.values()) / len(cosines), 6),
        "losses_plain": [round(x, 4) for x in plain.losses],
        "losses_fast": [round(x, 4) for x in fast.losses],
    }
