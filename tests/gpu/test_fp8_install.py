"""`model.compute: fp8` on a CUDA device: two layers of a 7B's shape, and a run of a worker.

tests/gpu/test_kernels_fp8.py has the products by themselves, and the command for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.estimates.layout import Layout
from raytune_ft.config.schema import Recipe
from raytune_ft.model.fastpath.linears import PART
from raytune_ft.training.laid_out import lay_out
from raytune_ft.training.run_folder import read_json, read_jsonl
from tests.kernels.eighth_steps import Drawn, check_steps, draw
from tests.kernels.installed import Batch, Made, gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a CUDA device with float8",
    ),
]
DEVICE = torch.device("cuda", 0)
WORDS, LENGTH = 4096, 2048


@pytest.fixture(scope="module")
def shape_of_7b(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Two layers of InternLM-7B with few words, drawn in bfloat16."""
    return draw(
        tmp_path_factory.mktemp("7b"), DEVICE, length=LENGTH, words=WORDS, rank=64,
        hidden_size=4096, intermediate_size=11008, num_attention_heads=32,
    )  # fmt: skip


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_ten_steps_are_those_of_the_same_roundings(shape_of_7b: Drawn, quantization: str) -> None:
    """Prints every trained weight's cosines in the first step."""
    check_steps(shape_of_7b, quantization)


@pytest.mark.usefixtures("in_order")
def test_weights_that_stay_and_layers_that_run_again_give_the_same_bits(shape_of_7b: Drawn) -> None:
    """A layout may change between steps; kept in both orders, weights take 2 bytes each."""
    found, sizes = [], []
    for resident in (False, True):
        one = shape_of_7b.made("fp8", resident=resident, dropout=0.1)
        sizes.append(_held(one[0]))
        for layout in (Layout(1, 1, 0, resident), Layout(1, 1, 1, resident), Layout(1, 1, 2)):
            lay_out(one[0], layout)
            torch.manual_seed(3)
            shape_of_7b.rows()[0].loss(one[1]).backward()
            found.append(gradients(one[0]))
        assert _held(one[0]) == 0
    weights = sum(part.base.shape.numel() for part in _parts(one[0]))
    assert sizes == [0, 2 * weights]
    for other in found[1:]:
        assert all(torch.equal(other[name], value) for name, value in found[0].items())


def _parts(model: torch.nn.Module) -> list[Any]:
    return [module.__dict__[PART] for module in model.modules() if PART in module.__dict__]


def _held(model: torch.nn.Module) -> int:
    """Return the bytes of weights that are kept in float8."""
    return sum(value.numel() for part in _parts(model) for value in part.base.eighths.kept.values())


def test_what_a_micro_step_takes(shape_of_7b: Drawn) -> None:
    """Prints; no time is asserted. Four rows of 2048, as the automatic layout has on this GPU."""
    rows = shape_of_7b.rows()[2]
    four = Batch(*(torch.cat([part, part]) for part in vars(rows).values()))
    for name, batch in (("1 row", rows.first_row()), ("4 rows", four)):
        for dropout in (0.0, 0.1):
            row = {}
            for compute in ("auto", "fp8"):
                for resident in (False, True):
                    one = shape_of_7b.made(compute, resident=resident, dropout=dropout)
                    torch.cuda.reset_peak_memory_stats()
                    step = _micro_step(one, batch)
                    row[f"{compute}{', kept' * resident}"] = (
                        f"{_milliseconds(step):.2f} ms, host "
                        f"{_milliseconds(step, wait=False):.2f} ms, "
                        f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
                    )
                    del one, step
                    torch.cuda.empty_cache()
            print(f"{name} of {LENGTH}, dropout {dropout}, 2 layers: {row}")


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


def test_a_run_says_that_it_is_in_float8(tiny_model: Path, tmp_path: Path) -> None:
    from tests.conftest import write_chats
    from tests.training.test_worker import train as run_worker

    rows = write_chats(tmp_path / "train.jsonl", 12)
    losses = {}
    for compute in ("auto", "fp8"):
        content = {
            "model": {"path": str(tiny_model), "compute": compute, "quantization": "nf4"},
            "lora": {"r": 16, "alpha": 16, "dropout": 0.1},
            "data": {"sources": [{"path": str(rows)}], "max_length": 96, "window": 16},
            "train": {"max_steps": 4, "accumulation": 2, "deepspeed": "zero2"},
            "chat_eval": {"every": None, "prompts": ["question 3?"], "max_new_tokens": 3},
            "run": {"trackers": []},
        }
        run = run_worker(Recipe.model_validate(content), tmp_path / compute)
        info = read_json(run.run_json)
        print(compute, info["fast_path"], info["layout"]["why"])
        losses[compute] = [line["loss"] for line in read_jsonl(run.metrics)]
        said = any(line.startswith("float8: frozen weights") for line in info["fast_path"])
        assert said is (compute == "fp8")
        assert ("in float8" in info["layout"]["why"]) is (compute == "fp8")
    assert losses["fp8"] == pytest.approx(losses["auto"], rel=0.02)
