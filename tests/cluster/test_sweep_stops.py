"""A sweep is asked to stop, goes on, has a bad trial; and its trials are runs like any other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_ft.training.run_folder import RunFolder, read_json, read_jsonl
from tests import runs

SPACE = """
tune:
  space: {train.lr: [2.0e-3, 1.0e+30, 5.0e-3], lora.r: [2]}
  search: grid
  scheduler: none
  concurrent: 1
"""
WORDS = ("train.max_steps=40", "train.deepspeed=none", "train.epochs=8", "chat_eval.prompts=[]")


def begin(verb: str, *words: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"raytune_ft.{verb}", *map(str, words)]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, printed = process.communicate(timeout=900)
    return process.returncode, printed


def wait_for(process: subprocess.Popen[str], path: Path, lines: int) -> None:
    """Wait until a JSONL file has so many lines."""
    while len(list(read_jsonl(path))) < lines:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def last_line(printed: str) -> str:
    return printed.strip().splitlines()[-1]


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(2400)
def test_stopped_taken_up_and_alone(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "sweep")
    with recipe.open("a") as file:
        file.write(SPACE)
    sweep = tmp_path / "runs/sweep"
    first = sweep / "trials/trial_0000"

    process = begin("tune", "--config", recipe, *WORDS)
    wait_for(process, first / "metrics.jsonl", 3)
    process.send_signal(signal.SIGTERM)
    code, printed = ended(process)
    assert code == 75, printed
    assert "0 of 3 trials are over; go on with: raytune-ft tune --resume" in last_line(printed)
    assert RunFolder(sweep).status() == "stopped"
    assert RunFolder(first).status() == "stopped"
    stopped_at = len(list(read_jsonl(first / "metrics.jsonl")))
    assert 3 <= stopped_at < 40

    alone = shutil.copytree(first, tmp_path / "trial_0000")
    code, printed = ended(begin("train", "--resume", alone))
    assert code == 0, printed

    code, printed = ended(begin("tune", "--config", recipe, *WORDS, "train.max_steps=41"))
    assert code == 2
    assert "began with train.max_steps 40, this recipe has 41" in last_line(printed)

    code, printed = ended(begin("tune", "--resume", sweep))
    assert code == 0, printed
    board: list[dict[str, Any]] = list(read_jsonl(sweep / "leaderboard.jsonl"))
    assert [t["state"] for t in board[:2]] == ["done", "done"]
    assert board[2]["trial"] == 1
    assert board[2]["state"].startswith("failed: step ")
    (resumed,) = read_jsonl(first / "resumes.jsonl")
    assert resumed["step"] == stopped_at
    assert runs.sha256(first / "adapter/adapter_model.safetensors") == runs.sha256(
        alone / "adapter/adapter_model.safetensors"
    )
    rows = read_json(sweep / "data.json")["rows"]
    info = read_json(sweep / "run.json")
    assert 0 < info["windows_made"] <= 8 * -(-rows // 16)

    code, printed = ended(begin("tune", "--config", recipe, *WORDS))
    assert (code, len(printed.splitlines())) == (0, 1)
    assert "this sweep is finished; its best recipe is" in printed

    code, printed = ended(begin("train", "--config", sweep / "best.yaml", "run.name=again"))
    assert code == 0, printed
    assert runs.adapter_of(tmp_path / "runs/again").keys()
    assert runs.sha256(tmp_path / "runs/again/adapter/adapter_model.safetensors") == runs.sha256(
        sweep / "best/adapter_model.safetensors"
    )


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_a_sweep_without_a_good_trial_says_why(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "bad")
    with recipe.open("a") as file:
        file.write("tune: {space: {train.lr: [1.0e+30]}, trials: 1, scheduler: none}\n")
    code, printed = ended(begin("tune", "--config", recipe, *WORDS))
    assert code == 5, printed
    assert "no trial finished; trial 0 failed: step " in last_line(printed)
    (line,) = read_jsonl(tmp_path / "runs/bad/leaderboard.jsonl")
    assert line["state"].startswith("failed: step ")
    assert not (tmp_path / "runs/bad/best.yaml").exists()


@pytest.mark.cluster
@pytest.mark.ray
@pytest.mark.timeout(1200)
def test_trials_with_other_packs_prepare_for_themselves(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "packs")
    with recipe.open("a") as file:
        file.write(
            "tune: {space: {data.max_length: [48, 96], train.seed: [1]}, search: grid, "
            "scheduler: none, concurrent: 2}\n"
        )
    code, printed = ended(begin("tune", "--config", recipe, *WORDS, "train.max_steps=3"))
    assert code == 0, printed
    trials = [tmp_path / f"runs/packs/trials/trial_000{n}" for n in range(2)]
    tokens = [sum(e["tokens"] for e in read_jsonl(trial / "metrics.jsonl")) for trial in trials]
    assert tokens[1] > 1.5 * tokens[0]  # as many packs of twice the length
    assert all((trial / "adapter/adapter_model.safetensors").is_file() for trial in trials)
    seeds = [yaml.safe_load((t / "recipe.yaml").read_text())["train"]["seed"] for t in trials]
    assert seeds == [1, 1]
    assert all(len(list(read_jsonl(trial / "metrics.jsonl"))) == 3 for trial in trials)
