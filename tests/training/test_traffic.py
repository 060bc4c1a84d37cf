"""What ranks send each other, counted in real gloo runs, against the model of docs/scaling.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.traffic import SMALL, Count, count
from raytune_ft.config.estimates.traffic import Trained, calls, payloads, sent, sent_by_model
from raytune_ft.config.zero import WHOLE_GRADIENTS, sums_once
from tests.ranks import run_ranks

WORLDS = (2, pytest.param(4, marks=pytest.mark.exact))
MICRO_STEPS, STEPS = 3, 3
WIDTH = {"float32": 4, "bfloat16": 2}
KEPT_WHOLE = 100
"""Elements up to which stage 3 leaves weights whole, so that it has some of both."""
FILES = {
    "stage 2": {"stage": 2, "overlap_comm": False},
    "stage 3": {"stage": 3, "overlap_comm": False,
                "stage3_param_persistence_threshold": KEPT_WHOLE},
    "stage 3, none kept": {"stage": 3, "overlap_comm": False, "stage3_max_live_parameters": 0,
                           "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
                           "stage3_param_persistence_threshold": KEPT_WHOLE},
}  # fmt: skip
CELLS = [
    ("none", "full", "bfloat16"), ("zero1", "full", "float32"), ("zero1", "lora", "bfloat16"),
    ("zero2", "lora", "bfloat16"), ("zero2", "full", "float32"), ("stage 2", "lora", "bfloat16"),
    ("stage 2", "full", "float32"), ("stage 3", "full", "float32"),
    ("stage 3, none kept", "full", "float32"),
]  # fmt: skip
PADDING = 16
"""Elements that a group of weights is filled up with, so that ranks get equal stretches."""


def work(rank: int, world: int, folder: str) -> None:
    """Be one rank of every cell; rank 0 writes down what it was asked to send in a step."""
    torch.set_num_threads(1)
    import torch.distributed as dist

    from tests.gpu import test_zero as shapes

    seen = Count()
    count(seen)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    shapes.ACCUMULATION = MICRO_STEPS
    told = []
    for zero, method, dtype in CELLS:
        named = f"{folder}/{zero}.json" if zero in FILES else zero
        engine = shapes.build(named, dtype, method, "cpu")
        steps = shapes.batches("cpu")
        for _ in range(STEPS):  # stage 3 learns in the first what it fetches when
            seen.take()
            losses = shapes.advance(engine, next(steps))
        found = seen.take()
        weights = engine.weights()
        told.append({
            "cell": [zero, method, dtype], "payloads": found.payloads, "small": found.small,
            "calls": found.calls, "sizes": {n: list(s) for n, s in sizes(engine).items()},
            "loss": losses[0], "weight": float(sum(w.double().sum() for w in weights.values())),
        })  # fmt: skip
        del engine
    if rank == 0:
        Path(folder, "told.json").write_text(json.dumps(told))


def sizes(engine: Any) -> dict[str, torch.Size]:
    return {name: getattr(p, "ds_shape", p.shape) for name, p in engine.trained.items()}


@pytest.fixture(scope="module", params=WORLDS)
def told(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Give the number of ranks and what was counted in each cell."""
    folder = tmp_path_factory.mktemp(f"ranks_{request.param}")
    for name, zero in FILES.items():
        (folder / f"{name}.json").write_text(json.dumps({"zero_optimization": zero}))
    run_ranks(work, (request.param, str(folder)), request.param)
    found = json.loads((folder / "told.json").read_text())
    return request.param, {tuple(line["cell"]): line for line in found}


def model_of(line: dict[str, Any]) -> dict[str, int]:
    zero, _, dtype = line["cell"]
    counts = [int(torch.Size(size).numel()) for size in line["sizes"].values()]
    whole = sum(n for n in counts if n <= KEPT_WHOLE)
    trained = Trained(
        sum(counts), MICRO_STEPS, WIDTH[dtype], sharded=sum(counts) - whole,
        fetches=2 if zero.endswith("none kept") else 1, whole=whole,
    )  # fmt: skip
    return payloads(stage_of(zero), trained, every_micro_step=zero == "stage 2")


def stage_of(zero: str) -> int:
    return {"none": 0, "zero1": 1, "zero2": 2, "stage 2": 2}.get(zero, 3)


def head_again(line: dict[str, Any]) -> int:
    """Return the bytes of the head, which the loss calls on its own: fetched a third time."""
    (size,) = (s for n, s in line["sizes"].items() if n.endswith("lm_head.weight"))
    return MICRO_STEPS * int(torch.Size(size).numel()) * WIDTH[line["cell"][2]]


def test_payloads_are_those_of_the_model(told: Any) -> None:
    """But for padding and for what is smaller than a kilobyte."""
    world, lines = told
    for cell, line in lines.items():
        found, wanted = line["payloads"], model_of(line)
        assert found.keys() == wanted.keys(), cell
        for kind in wanted:
            if cell[0].endswith("none kept") and kind == "all_gather":
                wanted[kind] += head_again(line)
            more = PADDING * world * len(line["sizes"]) * MICRO_STEPS * 4
            off = found[kind] - wanted[kind]
            assert -line["small"] <= off <= more, (world, cell, kind, found, wanted)


def test_collectives_are_as_many_as_the_model_says(told: Any) -> None:
    """All gradients fit into one bucket here; the plain engine sends its tensors one by one."""
    _, lines = told
    for (zero, method, dtype), line in lines.items():
        work = Trained(1, MICRO_STEPS)
        wanted = calls(stage_of(zero), work, every_micro_step=zero == "stage 2")
        found = line["calls"]
        if zero == "none":
            large = [s for s in line["sizes"].values() if 4 * torch.Size(s).numel() >= SMALL]
            assert found == {"all_reduce": len(large)}
        elif stage_of(zero) == 3:
            assert found["reduce_scatter"] == wanted["reduce_scatter"]
        else:
            assert found == wanted, (zero, method, dtype)


def test_zero2_sums_gradients_once_a_step_and_stage_2_at_each_micro_step(told: Any) -> None:
    """The same weights come of it."""
    world, lines = told
    once, each = lines["zero2", "lora", "bfloat16"], lines["stage 2", "lora", "bfloat16"]
    assert each["payloads"]["all_reduce"] == MICRO_STEPS * once["payloads"]["all_reduce"]
    assert each["payloads"]["all_gather"] == once["payloads"]["all_gather"]
    assert once["loss"] == pytest.approx(each["loss"], rel=1e-3)
    assert once["weight"] == pytest.approx(each["weight"], rel=1e-3, abs=1e-2)
    assert sum(sent(k, n, world) for k, n in once["payloads"].items()) < sum(
        sent(k, n, world) for k, n in each["payloads"].items()
    )


def test_one_rank_sends_nothing() -> None:
    trained = Trained(1000, MICRO_STEPS)
    assert all(sent_by_model(payloads(stage, trained), 1) == 0 for stage in (0, 1, 2, 3))
    assert sent("all_reduce", 600, 3) == 800
    assert sent("all_gather", 600, 3) == 400


@pytest.mark.parametrize(
    ("name", "trained", "accumulation", "once"),
    [
        ("zero2", WHOLE_GRADIENTS, 2, True),
        ("zero2", WHOLE_GRADIENTS + 1, 2, False),
        ("zero2", 1000, 1, False),
        ("zero2_offload", 1000, 2, False),
        ("my_zero2.json", 1000, 2, False),
    ],
)
def test_when_zero2_keeps_gradients_whole(
    name: str, trained: int, accumulation: int, once: bool
) -> None:
    assert sums_once(name, trained, accumulation) is once


def test_memory_is_predicted_for_what_the_engine_does() -> None:
    from raytune_ft.config import catalog
    from raytune_ft.config.estimates.footprint import count as counts_of
    from raytune_ft.config.estimates.peak import memory_bytes
    from raytune_ft.config.schema import Recipe

    def gradients(deepspeed: str, accumulation: int) -> int:
        body = catalog.body_for("internlm_7b", "qlora/oasst1_e3")
        body["train"] |= {"deepspeed": deepspeed, "accumulation": accumulation}
        recipe = Recipe.model_validate(body | {"run": {"workers": 8}})
        counts = counts_of(catalog.card("internlm_7b").config, recipe)
        return int(memory_bytes(recipe, counts, on_gpu=True)["gradients"])

    assert gradients("zero2", 16) == gradients("zero1", 16) > 4 * gradients("zero2", 1)
