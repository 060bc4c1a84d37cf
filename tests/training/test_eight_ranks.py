"""A shipped recipe of eight GPUs, at a tiny shape: its eight gloo ranks train as one does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from raytune_ft.config import catalog
from raytune_ft.config.schema import Recipe
from raytune_ft.data.places import iter_packs
from raytune_ft.training import worker
from raytune_ft.training.run_folder import RunFolder, read_jsonl, write_json
from raytune_ft.training.worker import Job
from tests import runs
from tests.conftest import write_chats
from tests.ranks import run_ranks
from tests.training.test_worker import feed_of

WORLD = 8
NAME = "internlm_7b_qlora_moss_sft_all_e2_gpu8"
ROWS = 150
"""Two whole steps of 64 rows and one of 22, in which six ranks have three rows and two have two."""
LOSS, WEIGHTS = 1e-6, 2e-5
"""Relative, the latter of each tensor's norm: float32 adds up in another order, and Adam magnifies
the rounding of gradients near its epsilon."""


def recipe_of(model: Path, rows: Path, workers: int) -> Recipe:
    """Return the shipped recipe with its batch and ZeRO, on a tiny float32 model."""
    body = catalog.resolve(NAME)
    changes: dict[str, dict[str, Any]] = {
        "model": {"path": str(model), "template": "default", "quantization": "none"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"sources": [{"path": str(rows)}], "fill": {}, "system": "", "max_length": 96,
                 "window": 64},
        "train": {"epochs": 1, "lr": 5e-3, "log_every": 1,
                  "accumulation": body["train"]["accumulation"] * WORLD // workers},
        "chat_eval": {"every": None},
        "run": {"workers": workers, "trackers": []},
    }  # fmt: skip
    merged = {name: {**body.get(name, {}), **change} for name, change in changes.items()}
    return Recipe.model_validate({**body, **merged})


def train(recipe: Recipe, folder: Path) -> None:
    """Be one rank of a whole run, without Ray."""
    packs = partial(iter_packs, feed_of(recipe), epochs=1)
    job = Job(recipe.model_dump(mode="json"), str(folder), recipe.model.path,
              expected_steps=3, sharing=64, data_fingerprint="sha-1")  # fmt: skip
    worker.run(job, packs, None, lambda _: None)


def be_rank(rank: int, recipe: Recipe, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder.parent}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=WORLD)
    train(recipe, folder)
    dist.destroy_process_group()


def folder_of(place: Path) -> Path:
    place.mkdir()
    told = {"rows": ROWS, "used": ROWS, "formats": ["openai"], "steps": 3}
    write_json(place / "data.json", told)
    return place


@pytest.fixture(scope="module")
def ended(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, tuple[list[dict[str, Any]], dict[str, torch.Tensor]]]:
    """Number of ranks -> lines of metrics.jsonl, and the adapter."""
    base = tmp_path_factory.mktemp("eight")
    rows = write_chats(base / "rows.jsonl", ROWS)
    one, eight = (folder_of(base / name) for name in ("one", "eight"))
    run_ranks(be_rank, (recipe_of(tiny_model, rows, WORLD), eight), WORLD)
    train(recipe_of(tiny_model, rows, 1), one)
    return {
        n: (list(read_jsonl(RunFolder(place).metrics)), runs.adapter_of(place))
        for n, place in ((1, one), (WORLD, eight))
    }


def test_eight_ranks_lose_what_one_loses_at_every_step(ended: Any) -> None:
    one, eight = ended[1][0], ended[WORLD][0]
    assert len(one) == 3 and one[-1]["loss"] < one[0]["loss"]
    assert [line["rows"] for line in eight] == [line["rows"] for line in one]
    assert [len(line["rows"]) for line in one] == [64, 64, ROWS - 128]
    for key in ("loss", "grad_norm", "lr", "tokens", "targets"):
        assert [e[key] for e in eight] == pytest.approx([o[key] for o in one], rel=LOSS), key
    assert all(len(line["rank_seconds"]) == WORLD for line in eight)


def test_eight_ranks_end_with_the_weights_of_one(ended: Any) -> None:
    one, eight = ended[1][1], ended[WORLD][1]
    assert one.keys() == eight.keys() and len(one) > 10
    for name, weight in one.items():
        assert float(weight.norm()) > 0
        off = float(torch.linalg.norm(weight - eight[name]) / torch.linalg.norm(weight))
        assert off <= WEIGHTS, f"{name}: {off:.1e}"
