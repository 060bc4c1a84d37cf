"""The same seed gives the same bytes, another seed others: whole runs, each in its own process."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from raytune_ft.config.schema import Recipe
from tests.conftest import write_chats
from tests.ranks import forks

WEIGHTS = "adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def content(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """A recipe with all that draws numbers: dropout, noise, packing, shuffling, drawn answers."""
    rows = write_chats(tmp_path_factory.mktemp("rows") / "train.jsonl", 40)
    return {
        "model": {"path": str(tiny_model), "quantization": "nf4"},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {
            "sources": [{"path": str(rows)}], "max_length": 96, "window": 16, "validation": 0.1,
        },
        "train": {
            "epochs": 2, "accumulation": 4, "lr": 5e-3, "deepspeed": "none",
            "neftune_noise_alpha": 5.0,
        },
        "chat_eval": {"prompts": ["question 3?"], "max_new_tokens": 4, "temperature": 1.0},
        "run": {"trackers": []},
    }  # fmt: skip


def bytes_of(content: dict[str, object], seed: int, folder: str) -> str:
    """Train in this process; return the hash of the adapter."""
    from tests import runs
    from tests.training.test_worker import train

    recipe = Recipe.model_validate(content)
    seeded = recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": seed})})
    return runs.sha256(train(seeded, Path(folder)).path / WEIGHTS)


def hashes(content: dict[str, object], seeds: Sequence[int], folder: Path) -> list[str]:
    """Run every seed in a process of its own, which has trained nothing before."""
    with ProcessPoolExecutor(2, forks(), max_tasks_per_child=1) as pool:
        folders = [str(folder / f"run_{n}") for n in range(len(seeds))]
        return list(pool.map(bytes_of, [content] * len(seeds), seeds, folders))


@pytest.mark.slow
def test_a_seed_decides_every_byte(
    content: dict[str, object], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    seeds = range(1, 1 + request.config.getoption("--seeds"))
    found = hashes(content, [*seeds, *seeds], tmp_path)
    first, second = found[: len(seeds)], found[len(seeds) :]
    print(f"{len(seeds)} seeds x 2: {sum(map(str.__eq__, first, second))} equal")
    assert first == second
    assert len(set(first)) == len(seeds)
