"""More workers than GPUs: one line before anything starts; on a CPU they share the cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft import outlook, resources
from raytune_ft.config.loader import load_recipe
from raytune_ft.errors import RecipeError
from tests import runs

NAME = "internlm_7b_qlora_moss_sft_all_e2_gpu8"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver's tool that lists three GPUs."""
    tool = tmp_path / "nvidia-smi"
    lines = "\\n".join(f"{n}, GPU-{n}, NVIDIA H100 80GB HBM3, 81559, 81000" for n in range(3))
    tool.write_text(f"#!/bin/sh\nprintf '{lines}\\n'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("chosen", "here", "settings"),
    [
        (None, "3 GPUs", "run.workers=2 train.accumulation=4"),
        ("0", "1 GPU", "run.workers=1 train.accumulation=8"),
    ],
)
def test_eight_workers_on_fewer_gpus_are_told_what_to_set(
    chosen: str | None, here: str, settings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    asked = load_recipe(NAME)
    with pytest.raises(RecipeError) as caught:
        outlook.check_memory(asked)
    said = str(caught.value)
    assert f"this machine has {here}; set {settings}, which keeps 64 packs per step" in said
    assert "\n" not in said and "RAY_ADDRESS" in said
    fewer = load_recipe(NAME, settings.split())
    assert fewer.global_batch_size == asked.global_batch_size == 64
    resources.check(fewer)


@pytest.mark.usefixtures("machine")
def test_a_cluster_has_gpus_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    resources.check(load_recipe(NAME))


@pytest.mark.usefixtures("machine")
def test_an_elastic_run_begins_with_as_many_as_there_are() -> None:
    resources.check(load_recipe(NAME, ["run.min_workers=3"]))
    with pytest.raises(RecipeError, match="this machine has 3 GPUs"):
        resources.check(load_recipe(NAME, ["run.min_workers=4"]))


def test_ranks_without_a_gpu_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    resources.check(load_recipe(NAME))


@pytest.mark.ray
@pytest.mark.usefixtures("machine")
def test_the_command_says_it_in_one_line_and_leaves_nothing(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    process = runs.start(
        Path(NAME), f"model.path={tiny_model}", f"data.sources=[{{path: {chats}}}]",
        f"run.storage={tmp_path / 'runs'}",
    )  # fmt: skip
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    (line,) = [line for line in said.splitlines() if line.strip()]
    assert "8 workers need a GPU each" in line
    assert not list(tmp_path.glob("runs/*"))


@given(workers=st.integers(1, 2048), cores=st.integers(1, 4096))
def test_all_workers_find_their_share_of_the_cores(workers: int, cores: int) -> None:
    share = resources.cpus_per_worker(workers, cores)
    assert 0 < share * workers <= max(cores, 0.5) and share <= 0.5
    assert share == 0.5 or (share + 1e-4) * workers > cores
