"""A checkpoint counts only when it is whole; tests/faults stops its writing at every call."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load

from raytune_ft.errors import CheckpointError
from raytune_ft.model import tensor_file
from raytune_ft.training.guarding.exclusive import only_writer
from raytune_ft.training.saving import checkpoint, durable
from raytune_ft.training.saving.checkpoint import TrainState


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((3, 2), value), "b": torch.arange(4.0) * value}


def whole_steps(root: Path) -> list[Path]:
    return [folder for folder in checkpoint.step_folders(root) if checkpoint.damage(folder) is None]


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
    assert [p.name for p in whole_steps(tmp_path)] == ["step_000015", "step_100000"]


def test_minus_one_keeps_all(tmp_path: Path) -> None:
    for step in (5, 10, 15):
        write(tmp_path, step, keep=-1)
    assert len(whole_steps(tmp_path)) == 3


def test_damage_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path, 5)
    (folder / "optimizer.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"'optimizer.safetensors' is missing"):
        checkpoint.load(folder)
    (folder / "manifest.json").write_text(json.dumps([]))
    with pytest.raises(CheckpointError, match="not readable"):
        checkpoint.load(folder)


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path: Path) -> None:
    write(tmp_path, 5)
    (write(tmp_path, 10) / "state.json").unlink()
    told: list[str] = []
    loaded = checkpoint.load_latest(tmp_path, told.append)
    assert loaded is not None and loaded.state.step == 5
    assert told == [f"{tmp_path}/step_000010: 'state.json' is missing or has another size; "
                    "it is left out"]  # fmt: skip
    shutil.rmtree(tmp_path / "step_000005")
    assert checkpoint.load_latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "nothing") is None


def test_the_best_one_is_kept_and_old_damage_is_not(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=-1)
    (tmp_path / "step_000002" / "manifest.json").unlink()
    checkpoint.save(tmp_path, TrainState(step=5, best_step=1), tensors(5), {}, keep=2)
    assert [checkpoint.step_of(p) for p in checkpoint.step_folders(tmp_path)] == [1, 4, 5]


def test_one_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    """A run that goes on from an older one, since this one is damaged, comes by here again."""
    folder = write(tmp_path, 5)
    (folder / "weights.safetensors").write_bytes(b"")
    assert checkpoint.damage(write(tmp_path, 5)) is None
    assert [p.name for p in tmp_path.iterdir()] == ["step_000005"]


def test_older_ones_are_not_read_when_one_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        write(tmp_path, step, keep=-1)
    read: list[str] = []
    real = checkpoint.sha256_of

    def noted(path: Path) -> str:
        read.append(path.parent.name)
        return real(path)

    monkeypatch.setattr(checkpoint, "sha256_of", noted)
    write(tmp_path, 4)
    assert set(read) == {"step_000004"}


def restated(folder: Path, **changes: object) -> Path:
    """Rewrite a checkpoint's state, as another version would have written it."""
    content = json.loads((folder / "state.json").read_text())
    content = {k: v for k, v in {**content, **changes}.items() if v != "gone"}
    for path in (folder / "state.json", folder / "manifest.json"):
        path.unlink()
    size, sha256 = durable.write(folder / "state.json", [json.dumps(content).encode()])
    entries = {
        path.name: {"size": path.stat().st_size, "sha256": checkpoint.sha256_of(path)}
        for path in folder.iterdir()
    }
    assert entries["state.json"] == {"size": size, "sha256": sha256}
    durable.write(folder / "manifest.json", [checkpoint._manifest(entries).encode()])
    return folder


def test_the_state_of_the_version_before_this_is_read(tmp_path: Path) -> None:
    new = ("losses", "best", "best_step", "waited", "stopped", "format")
    folder = restated(write(tmp_path, 5), **dict.fromkeys(new, "gone"))
    state = checkpoint.load(folder).state
    assert (state.format, state.step, state.losses, state.best) == (1, 5, [], None)


def test_the_state_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    folder = restated(write(tmp_path, 5), tomorrow=1)
    with pytest.raises(CheckpointError, match=r"newer version of raytune_ft .*'tomorrow'"):
        checkpoint.load(folder)


DTYPES = list(tensor_file.NAMES)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_the_library_reads_what_is_written(
    shapes: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    given_tensors = {
        name: (torch.rand(shape) * 9 - 4).to(dtype) for name, (dtype, shape) in shapes.items()
    }
    read = load(b"".join(tensor_file.blocks_of(given_tensors)))
    assert read.keys() == given_tensors.keys()
    for name, tensor in given_tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_a_part_of_another_tensor_is_written_by_its_values(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    read = load(b"".join(tensor_file.blocks_of({"a": whole.t(), "b": whole[:, 1]})))
    assert torch.equal(read["a"], whole.t()) and torch.equal(read["b"], whole[:, 1])


HOLDER = """
import sys, time
from pathlib import Path
from raytune_ft.training.guarding.exclusive import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_do_not_write_one_run(tmp_path: Path) -> None:
    """The second waits, says so in the end, and goes on as soon as the first is killed."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        message = rf"^{tmp_path}: another process trains this run"
        with pytest.raises(CheckpointError, match=message), only_writer(tmp_path, patience_s=0.2):
            pass
        holder.kill()
        with only_writer(tmp_path):
            assert (tmp_path / ".lock").is_file()
