"""A checkpoint counts only when it is whole, at every instant and after any damage."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch

from raytune_ft.errors import CheckpointError
from raytune_ft.training import checkpoint
from raytune_ft.training.checkpoint import TrainState


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.arange(4.0) * value}


def write(root: Path, step: int, keep: int = 2) -> Path:
    state = TrainState(step=step, epoch=1, window=2, pack=3, tokens=10 * step, recipe_hash="h")
    return checkpoint.save(root, state, tensors(step), {"a/exp_avg": torch.ones(3, 2)}, keep=keep)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    loaded = checkpoint.load(write(tmp_path, 5))
    assert loaded.state == TrainState(step=5, epoch=1, window=2, pack=3, tokens=50, recipe_hash="h")
    assert all(torch.equal(loaded.weights[k], v) for k, v in tensors(5).items())
    assert set(loaded.optimizer) == {"a/exp_avg"}


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 10, 15, 100000):
        write(tmp_path, step)
    assert [p.name for p in checkpoint.valid_steps(tmp_path)] == ["step_000015", "step_100000"]


def test_minus_one_keeps_all(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step, keep=-1)
    assert len(checkpoint.valid_steps(tmp_path)) == 3


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    write(tmp_path, 5)
    newest = write(tmp_path, 10)
    files = sorted(newest.iterdir())
    rng = random.Random(0)
    for _ in range(200):
        path = rng.choice(files)
        good = path.read_bytes()
        place = rng.randrange(len(good))
        path.write_bytes(
            good[:place] + bytes([good[place] ^ (1 << rng.randrange(8))]) + good[place + 1 :]
        )
        found = checkpoint.latest(tmp_path)
        assert found is not None, path.name
        assert found.name == "step_000005", path.name
        path.write_bytes(good)
    assert checkpoint.latest(tmp_path) == newest


def test_a_save_stopped_at_any_file_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stop the save after its k-th file operation, for every k until it gets through."""
    write(tmp_path, 5)
    stopped = 0
    for k in range(1000):
        calls = iter(range(k))
        for name in ("save_file", "_sha256", "_fsync"):
            real = getattr(checkpoint, name)

            def stop(*args: object, real: object = real, calls: object = calls) -> object:
                if next(calls, None) is None:
                    raise KeyboardInterrupt
                return real(*args)

            monkeypatch.setattr(checkpoint, name, stop)
        try:
            write(tmp_path, 10)
        except KeyboardInterrupt:
            stopped += 1
        else:
            monkeypatch.undo()
            break
        monkeypatch.undo()
        latest = checkpoint.latest(tmp_path)
        assert latest is not None
        assert checkpoint.load(latest).state.step in (5, 10)
        shutil.rmtree(tmp_path / "step_000010", ignore_errors=True)
    assert stopped > 5
    assert [p.name for p in checkpoint.valid_steps(tmp_path)] == ["step_000005", "step_000010"]
    assert not list(tmp_path.glob(".writing_*"))


def test_damage_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"'optimizer.safetensors' is missing"):
        checkpoint.load(folder)
    (folder / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="not readable"):
        checkpoint.load(folder)
