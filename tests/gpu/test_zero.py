"""DeepSpeed against plain torch on one device: gradients, five steps, float16's overflow.

On a CUDA device layers have the shape of a 7B model and the presets overlap their communication;
on a CPU the same way is gone with small layers. Random weights; no hub.

    pytest tests/gpu/test_zero.py -s        prints a line per comparison
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import LoraSection, Recipe
from raytune_ft.model import adapter
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training import presets
from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.engine import Engine, State, TorchEngine, ZeroEngine
from raytune_ft.training.engine.scaling import CLEAN_KEY, FACTOR_KEY

ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_CPU = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal: DeepSpeed has the GPU here"),
]
STEPS, ACCUMULATION, LR, BETAS = 5, 4, 1e-3, (0.0, 0.99)
"""Without an average of gradients, AdamW's state is the gradient of the last step."""
LIMITS = {"float32": 1e-4, "bfloat16": 2e-2}
"""Of losses after some steps: kernels that add up in any order, and rounding of bfloat16."""
SPREADS = {"zero3": 1.5, "zero3_offload": 1.5}
"""Of bfloat16's own error: stage 3 has linear layers of its own, which round in other places; the
others compute the same numbers and add them up in another order."""


@dataclass(frozen=True)
class Shape:
    """Widths of a network."""

    hidden: int
    mlp: int
    heads: int
    words: int
    layers: int
    length: int


SHAPES = {
    "cuda": Shape(4096, 11008, 32, 32000, 2, 512),  # InternLM-7B and Llama-7B, fewer layers
    "cpu": Shape(32, 64, 4, 64, 2, 24),
}


def build(zero: str, dtype: str, method: str, device: str, optimizer: str = "adamw") -> Engine:
    """Make an engine; its weights are the same bfloat16 numbers whatever the dtype."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, computed = SHAPES[device], getattr(torch, dtype)
    config = LlamaConfig(
        vocab_size=shape.words, hidden_size=shape.hidden, intermediate_size=shape.mlp,
        num_attention_heads=shape.heads, num_hidden_layers=shape.layers,
        bos_token_id=0, eos_token_id=1, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    model.requires_grad_(method == "full")
    if method == "lora":
        model = adapter.attach(model, LoraSection(r=16, alpha=32, dropout=0.0), 1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zero would hide A's gradient
            torch.nn.init.normal_(parameter, std=0.02)
        parameter.data = parameter.data.bfloat16().to(computed)
    recipe = recipe_of(zero, method, optimizer)
    resolved = presets.resolve(recipe, computed, on_gpu=device == "cuda")
    place = torch.device(device, 0) if device == "cuda" else torch.device(device)
    if resolved is None:
        return TorchEngine(TokenLoss(model), place, recipe.train, computed)
    return ZeroEngine(TokenLoss(model), place, recipe.train, resolved)


def recipe_of(zero: str, method: str, optimizer: str = "adamw") -> Recipe:
    return Recipe.model_validate({
        "model": {"path": "random", "method": method},
        "data": {"sources": [{"path": "none.jsonl"}]},
        "train": {"micro_batch_size": 1, "accumulation": ACCUMULATION, "lr": LR, "betas": BETAS,
                  "max_norm": 1e9, "deepspeed": zero, "optimizer": optimizer},
    })  # fmt: skip


def batches(device: str) -> Iterator[list[TensorBatch]]:
    """Yield the micro-batches of each step: packs of two samples, ragged, partly labelled."""
    shape, random = SHAPES[device], torch.Generator().manual_seed(2)
    while True:
        step = []
        for micro in range(ACCUMULATION):
            n = shape.length - 3 * micro
            cut = n // (micro + 2)
            ids = torch.randint(2, shape.words, (1, n), generator=random)
            labels = ids.clone()
            labels[:, : cut // 2], labels[:, cut] = -100, -100
            positions = torch.cat([torch.arange(cut), torch.arange(n - cut)]).unsqueeze(0)
            step.append({
                "input_ids": ids, "labels": labels, "position_ids": positions,
                "segment_ids": (torch.arange(n) >= cut).long().unsqueeze(0),
            })  # fmt: skip
        yield step


def advance(engine: Engine, step: list[TensorBatch]) -> tuple[float, float | None]:
    """Take a step; return its mean loss and the gradient's norm."""
    inner = [(b["labels"][:, 1:] != -100) for b in step]
    targets = sum(int(keep.sum()) for keep in inner)
    loss = sum(float(engine.forward_backward(batch, targets)) for batch in step) / targets
    return loss, engine.step(LR)


def trained(engine: Engine, device: str, steps: int) -> tuple[State, list[float]]:
    """Return the gradient of the first step, and the losses of all."""
    losses, state = [], State()
    for number, step in enumerate(itertools.islice(batches(device), steps)):
        loss, norm = advance(engine, step)
        assert norm is not None and norm > 0
        losses.append(loss)
        state = state if number else engine.optimizer_state()
    gradient = {name: state[f"{name}/exp_avg"] for name in engine.trained if state}
    return gradient, losses


def difference(found: State, expected: State) -> float:
    """Return the largest difference of any element over its tensor's largest one."""
    assert found.keys() == expected.keys()
    return max(
        float((found[n].cpu().double() - e.cpu().double()).abs().max() / e.abs().max())
        for n, e in expected.items()
    )


WAYS = [
    *(
        pytest.param("cuda", *way, marks=ON_GPU)
        for way in itertools.product(
            ("lora", "full"), ("float32", "bfloat16"),
            ("zero1", "zero2", "zero2_offload", "zero3", "zero3_offload"),
        )
    ),
    pytest.param("cpu", "lora", "float32", "zero3", marks=ON_CPU),
    pytest.param("cpu", "full", "bfloat16", "zero2", marks=ON_CPU),
]  # fmt: skip


@pytest.mark.parametrize(("device", "method", "dtype", "zero"), WAYS)
def test_zero_trains_as_plain_torch_does(
    device: str, method: str, dtype: str, zero: str, plain: Any
) -> None:
    exact, _ = plain(device, method, "float32")
    expected, losses = plain(device, method, dtype)
    gradient, found = trained(build(zero, dtype, method, device), device, STEPS)
    error, own = difference(gradient, exact), difference(expected, exact)
    drift = max(abs(a - b) / b for a, b in zip(found, losses, strict=True))
    print(f"\n{device} {method} {dtype} {zero}: gradient {error:.1e} off float32, plain torch "
          f"{own:.1e}; losses of {STEPS} steps {drift:.1e} apart")  # fmt: skip
    assert error <= (LIMITS[dtype] if dtype == "float32" else SPREADS.get(zero, 1.05) * own)
    assert drift <= LIMITS[dtype]
    assert found[-1] < found[0]


@pytest.fixture(scope="module")
def plain() -> Any:
    """Give what plain torch does, computed once: (device, method, dtype) -> gradient, losses."""
    known: dict[tuple[str, str, str], tuple[State, list[float]]] = {}

    def of(device: str, method: str, dtype: str) -> tuple[State, list[float]]:
        key = (device, method, dtype)
        if key not in known:
            known[key] = trained(build("none", dtype, method, device), device, STEPS)
        return known[key]

    return of


@pytest.mark.parametrize(
    ("device", "zero"),
    [
        *(pytest.param("cuda", z, marks=ON_GPU) for z in ("none", "zero1", "zero2", "zero3")),
        pytest.param("cpu", "zero2", marks=ON_CPU),
    ],
)
def test_an_overflow_of_float16_changes_nothing_and_is_told(
    device: str, zero: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    if device == "cpu":
        monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    engine = build(zero, "float16", "lora", device)
    before = engine.weights()
    state = {FACTOR_KEY: torch.tensor(2.0**44), CLEAN_KEY: torch.tensor(0)}
    engine.load(before, state)
    step = next(batches(device))
    assert advance(engine, step)[1] is None
    assert float(engine.optimizer_state()[FACTOR_KEY]) == 2.0**43
    after = engine.weights()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    halvings = 1
    while advance(engine, step)[1] is None:
        halvings += 1
        assert halvings < 44
    assert any(not torch.equal(w, before[name]) for name, w in engine.weights().items())
    print(f"\n{device} {zero}: float16 took the step after {halvings} halvings")
