"""What is trained is the same set of weights, with the same values, before and after a resume."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import CheckpointError
from raytune_ft.training import worker
from raytune_ft.training.engine import Engine
from raytune_ft.training.saving import checkpoint
from tests.training.test_load_from import recipe_of, train

WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "adapter": {},
    "adapter, ZeRO-2": {"train": {"deepspeed": "zero2"}},
    "adapter, biases and a whole module": {
        "lora": {"bias": "lora_only", "modules_to_save": ["lm_head"]},
    },
    "all weights": {"model": {"method": "full"}},
    "all weights, ZeRO-1": {"model": {"method": "full"}, "train": {"deepspeed": "zero1"}},
}


class StoppedError(Exception):
    """Raised instead of training on."""


def at_start(
    recipe: Recipe, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Engine, dict[str, torch.Tensor]]:
    """Take a run up; return its engine as it is before the next step, and all weights."""
    caught: list[Engine] = []

    def stop(engine: Engine, *_: object) -> None:
        caught.append(engine)
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr(worker, "train", stop)
        with pytest.raises(StoppedError):
            train(recipe, folder)
    return caught[0], {n: p.detach().clone() for n, p in caught[0].module.named_parameters()}


@pytest.mark.parametrize("way", WAYS)
def test_trained_weights_and_optimizer_are_those_of_the_checkpoint(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    changes = WAYS[way]
    short = {**changes, "train": {**changes.get("train", {}), "max_steps": 2}}
    recipe = recipe_of(tiny_model, chats, **short)
    fresh, before = at_start(recipe, tmp_path / "run", monkeypatch)
    run = train(recipe, tmp_path / "run")
    resumed, after = at_start(recipe, run.path, monkeypatch)

    assert list(resumed.trained) == list(fresh.trained)
    learning = [n for n, p in resumed.module.named_parameters() if p.requires_grad]
    assert learning == list(fresh.trained)
    loaded = checkpoint.load(run.checkpoints / checkpoint.folder_name(2))
    weights, optimizer = resumed.weights(), resumed.optimizer_state()
    assert weights.keys() == loaded.weights.keys() == set(fresh.trained)
    assert optimizer.keys() == loaded.optimizer.keys()
    assert all(torch.equal(weights[name], loaded.weights[name]) for name in weights)
    assert all(torch.equal(optimizer[name], loaded.optimizer[name]) for name in optimizer)

    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved <= set(fresh.trained), "a frozen weight has changed"
    assert len(moved) > len(fresh.trained) / 2, "what was learned is not there any more"


def test_a_result_that_finds_no_room_is_written_when_taken_up_again(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    """The kernel refuses files over 20 KB: one line, nothing half-written, nothing lost."""
    recipe = recipe_of(tiny_model, chats, train={"max_steps": 1})
    run = train(recipe, tmp_path / "run")
    expected = (run.adapter / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(run.adapter)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            train(recipe, run.path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(caught.value).startswith(f"{run.adapter}: cannot be written (")
    assert str(caught.value).endswith(f"go on with --resume {run.path}")
    assert not [path for path in run.path.iterdir() if path.name.startswith((".writ", "adapter"))]
    train(recipe, run.path)
    assert (run.adapter / "adapter_model.safetensors").read_bytes() == expected
