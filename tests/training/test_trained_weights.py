"""What is trained (C29, C30): every adapted layer and nothing else, also after a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import Engine
from tests.training.ragged import batches, targets

CPU = torch.device("cpu")
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "pissa": {"init_lora_weights": "pissa"},
    "loftq": {"init_lora_weights": "loftq"},
    "eva": {"init_lora_weights": "eva"},
    "head": {"modules_to_save": ["lm_head"]},
    "tokens": {},
}
ADDED = ("lora_", "modules_to_save", "trainable_tokens_delta")
"""What the names of weights beside the base have in them."""
MOVE_AT_ONCE = {"pissa", "loftq", "orthogonal"}
"""With B at 0, A has no gradient in the first step; here B is not."""
CELLS = [
    (variant, quantization, again)
    for variant in VARIANTS
    for quantization in ("none", "nf4", "int8")
    for again in (False, True)
    if (variant, quantization) not in {("pissa", "nf4"), ("pissa", "int8"), ("dora", "int8")}
    and (variant != "loftq" or quantization == "nf4")
    and (variant not in {"head", "eva", "orthogonal", "rslora"} or quantization == "none")
]


def recipe(folder: Path, variant: str, quantization: str, *, again: bool) -> Recipe:
    return Recipe.model_validate({
        "model": {
            "path": str(folder), "quantization": quantization, "gradient_checkpointing": again,
            "new_tokens": ["<call>", "<back>"] if variant == "tokens" else [],
        },
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1, **VARIANTS[variant]},
        "data": {"sources": [{"path": "none.jsonl"}]},
        "train": {"accumulation": 4, "deepspeed": "none"},
    })  # fmt: skip


def built(chosen: Recipe) -> Engine:
    engine, _ = build_engine(chosen, Path(chosen.model.path), CPU, lambda: batches()[0][:3])
    engine.module.train()
    return engine


def take(engine: Engine, number: int) -> None:
    """Take a step; new tokens, where there are some, are in its rows."""
    torch.manual_seed(number)  # of the dropout, as the loop does
    step = batches()[number]
    added = engine.module.model.get_input_embeddings().weight.shape[0] - 297  # type: ignore[union-attr,operator]
    for batch in step:
        ids = batch["input_ids"].clone()
        if added:
            ids[:, 1::5], ids[:, 2::5] = 297, 298
        engine.forward_backward({**batch, "input_ids": ids}, targets(step))
    engine.step(1e-2)


def everything(engine: Engine) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = engine.module.state_dict()
    return {name: value.detach().clone() for name, value in state.items()}


@pytest.mark.parametrize(
    ("variant", "quantization", "again"),
    [
        # quantised bases without recomputation show nothing that those with it do not
        pytest.param(*cell, marks=pytest.mark.exact if cell[1] != "none" and not cell[2] else ())
        for cell in CELLS
    ],
)
def test_after_one_step_every_adapted_layer_has_moved_and_no_other(
    tiny_model: Path, variant: str, quantization: str, again: bool
) -> None:
    """With recomputed activations and without: C29."""
    engine = built(recipe(tiny_model, variant, quantization, again=again))
    before = everything(engine)
    take(engine, 0)
    after = everything(engine)
    trained = set(engine.trained)
    assert all(any(mark in name for mark in ADDED) for name in trained)
    assert sum("lora_B" in name for name in trained) == sum("lora_B" in n for n in before) > 0
    for name, value in after.items():
        if name in trained:
            waits = "lora_A" in name and variant not in MOVE_AT_ONCE
            assert waits or not torch.equal(value, before[name]), name
        elif "token_adapter" not in name:  # the head shows a tied table's rows a second time
            assert torch.equal(value, before[name]), name
    if variant == "tokens":
        assert sum("trainable_tokens_delta" in name for name in trained) == 2  # table and head


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_a_resume_trains_the_same_weights(tiny_model: Path, variant: str) -> None:
    """C30: the adapter stays trained, the base frozen, and both are what they were."""
    quantization = "nf4" if variant == "loftq" else "none"
    chosen = recipe(tiny_model, variant, quantization, again=False)
    first = built(chosen)
    take(first, 0)
    weights, state = first.weights(), first.optimizer_state()
    again = built(chosen)
    again.load(weights, state)
    assert list(again.trained) == list(first.trained)
    assert all(p.requires_grad for p in again.trained.values())
    frozen = {n for n, p in again.module.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in again.module.named_parameters()} - set(first.trained)
    for name, value in everything(first).items():
        assert torch.equal(everything(again)[name], value), name
    take(first, 1)
    take(again, 1)
    for name, value in first.weights().items():
        assert not torch.equal(value, weights[name]) or "lora_A" in name, name
        assert torch.equal(again.weights()[name], value), name
