"""The fast path on a CUDA device: bfloat16 and NF4, every family, and two layers of a 7B's shape.

    python -m pytest tests/gpu/test_kernels_install.py -s -q

prints what each compared pair came to and, for the 7B's layers, the time of a micro-step both ways.
About three minutes on an H100, most of it the compilation of kernels.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from raytune_ft.config.schema import ModelSection
from raytune_ft.model.fastpath import blocks
from raytune_ft.model.loading import load_model
from tests.kernels.installed import (
    FAMILIES,
    Batch,
    Made,
    batches,
    finish,
    gradients,
    least_cosine,
    network,
    train,
    with_adapter,
)
from tests.model.families import CONFIGS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda", 0)
WORDS, LENGTH, LONG_ROW = 4096, 2048, 32768


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_takes_the_steps_of_the_plain_way(family: str, folder: Path) -> None:
    """bfloat16, NF4 where the family is read from files; losses within 1%."""
    nf4 = {"quantization": "nf4"} if family in CONFIGS else {}
    losses = []
    for fast in (False, True):
        model = with_adapter(network(family, folder, CUDA, dtype="bfloat16", **nf4))
        for block in model.modules():  # kernels of attention draw other numbers than torch does
            if isinstance(getattr(block, "attn_dropout", None), float):
                block.attn_dropout = 0.0
        one = finish(model, fast)
        losses.append(train(one, 6, batches(CUDA)))
    print(f"{family}: {_worst(losses):.2%} of a loss; {'; '.join(one[2].lines())}")
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert one[2].counts["linear"] > 0
    assert not any("differs" in line for line in one[2].plain)


def _worst(losses: list[list[float]]) -> float:
    return max(abs(b - a) / a for a, b in zip(*losses, strict=True))


@pytest.fixture(scope="module")
def shape_of_7b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of InternLM-7B with few words, drawn in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    place = tmp_path_factory.mktemp("7b")
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=4096, intermediate_size=11008, num_hidden_layers=2,
        num_attention_heads=32, rms_norm_eps=1e-6, attention_bias=True, dtype=torch.bfloat16,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(CUDA):
        model = LlamaForCausalLM(config).bfloat16()
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(place)
    return place


def of_7b(place: Path, fast: bool, *, dtype: str = "bfloat16", dropout: float = 0.0) -> Made:
    section = ModelSection.model_validate(
        {"path": str(place), "quantization": "nf4", "dtype": dtype}
    )
    model = with_adapter(load_model(place, section, CUDA), r=64, alpha=16, dropout=dropout)
    return finish(model, fast)


def given() -> list[Batch]:
    return batches(CUDA, LENGTH, WORDS)


def test_ten_steps_of_a_7b(shape_of_7b: Path) -> None:
    """Packed rows, padded rows and whole ones: every loss within 1% of the plain way's."""
    losses = [train(of_7b(shape_of_7b, fast), 10, given(), lr=2e-4) for fast in (False, True)]
    print(f"7B's layers: {_worst(losses):.3%} of a loss, {losses[0][0]:.4f} to {losses[1][9]:.4f}")
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["packed", "padded", "whole"])
def test_gradients_of_a_7b_are_those_of_float32(which: int, shape_of_7b: Path) -> None:
    """Layer by layer, A and B of each: cosine 0.999 or more to float32's, and no further off
    than the plain way's by more than 5e-4."""
    found = {}
    for name, fast, dtype in (
        ("float32", False, "float32"), ("plain", False, "bfloat16"), ("fast", True, "bfloat16"),
    ):  # fmt: skip
        one = of_7b(shape_of_7b, fast, dtype=dtype)
        given()[which].loss(one[1]).backward()
        found[name] = {key: value.cpu() for key, value in gradients(one[0]).items()}
        del one
        torch.cuda.empty_cache()
    cosines = {way: least_cosine(found[way], found["float32"]) for way in ("plain", "fast")}
    print(f"least cosine to float32: {cosines}")
    assert cosines["fast"] >= 0.999
    assert cosines["fast"] > cosines["plain"] - 5e-4


def test_float16_of_a_7b_is_as_near_to_float32(shape_of_7b: Path) -> None:
    """Gradients under a loss scale, A and B of each layer, beside PEFT's updates in float32."""
    found = {}
    for name, fast, dtype in (
        ("float32", False, "float32"), ("plain", False, "float16"), ("fast", True, "float16"),
    ):  # fmt: skip
        one = of_7b(shape_of_7b, fast, dtype=dtype)
        (given()[0].loss(one[1]) * 2.0**12).backward()
        found[name] = {key: value.cpu() for key, value in gradients(one[0]).items()}
        del one
        torch.cuda.empty_cache()
    cosines = {way: least_cosine(found[way], found["float32"]) for way in ("plain", "fast")}
    print(f"least cosine of float16 to float32: {cosines}")
    assert cosines["fast"] >= 0.999
    assert cosines["fast"] > cosines["plain"] - 5e-4


def test_dropout_is_the_same_where_layers_are_computed_again(shape_of_7b: Path) -> None:
    found: list[dict[str, Tensor]] = []
    for again in (False, True):
        one = of_7b(shape_of_7b, True, dropout=0.1)
        if again:
            one[0].activation_checkpointing_enable({"use_reentrant": False})
            one[0].enable_input_require_grads()
        torch.manual_seed(3)
        given()[0].loss(one[1]).backward()
        found.append(gradients(one[0]))
    assert least_cosine(found[1], found[0]) > 0.9999
    sizes = [sum(float(g.norm()) for g in one.values()) for one in found]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)


def test_what_a_micro_step_takes(shape_of_7b: Path) -> None:
    """Prints; no time is asserted."""
    for dropout in (0.0, 0.1):
        row: dict[str, str] = {}
        for fast in (False, True):
            one = of_7b(shape_of_7b, fast, dropout=dropout)
            torch.cuda.reset_peak_memory_stats()
            step = _micro_step(one, given()[0])
            row["fast" if fast else "plain"] = (
                f"{_milliseconds(step):.2f} ms, host {_milliseconds(step, wait=False):.2f} ms, "
                f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
            )
            del one, step
            torch.cuda.empty_cache()
        print(f"dropout {dropout}, 2 layers, 2 x {LENGTH} tokens: {row}")


def test_what_a_long_context_takes(shape_of_7b: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prints; the MLP in tiles takes less memory than at once, and gives the same loss."""
    found = {}
    for way, longest in (("tiles", blocks.LONG), ("at once", 2**40)):
        monkeypatch.setattr(blocks, "LONG", longest)
        one = of_7b(shape_of_7b, True)
        one[0].activation_checkpointing_enable({"use_reentrant": False})
        one[0].enable_input_require_grads()
        batch = batches(CUDA, LONG_ROW, WORDS)[2].first_row()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = batch.loss(one[1])
        loss.backward()
        found[way] = (torch.cuda.max_memory_allocated() - before, loss.item())
        del one, batch, loss
        torch.cuda.empty_cache()
    sizes = {way: f"{size / 2**30:.2f} GiB" for way, (size, _) in found.items()}
    print(f"2 layers, {LONG_ROW} tokens, recomputed, over the weights: {sizes}")
    assert found["tiles"][0] < found["at once"][0]
    assert found["tiles"][1] == pytest.approx(found["at once"][1], rel=1e-3)


def _micro_step(one: Made, batch: Batch) -> Callable[[], Any]:
    def step() -> None:
        batch.loss(one[1]).backward()

    return step


def _milliseconds(step: Callable[[], Any], *, wait: bool = True, repeats: int = 8) -> float:
    """Return the median time of a step, or of the host's part in it alone."""
    times = []
    for number in range(repeats + 2):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        if wait:
            torch.cuda.synchronize()
        if number >= 2:
            times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] * 1e3
