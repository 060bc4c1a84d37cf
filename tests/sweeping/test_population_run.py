"""A population through Ray: weights, optimizer state and values pass on, nothing else changes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_ft.config import loader
from raytune_ft.sweeping.lineage import ancestry
from raytune_ft.sweeping.trials import Ledger
from raytune_ft.training.run_folder import read_json, read_jsonl
from raytune_ft.training.saving import checkpoint, identity
from tests import runs

SPACE = """
tune:
  space:
    train.lr: {low: 2.0e-4, high: 2.0e-2, log: 1}
    train.min_lr: 0.1 * train.lr
    train.weight_decay: {low: 0.0, high: 0.2}
    lora.dropout: [0.0, 0.1, 0.2]
  scheduler: pbt
  trials: 4
  concurrent: 2
"""
WORDS = ("train.max_steps=4", "chat_eval.prompts=[]", "run.trackers=[]", "checkpoint.keep=-1")
RUNGS = (1, 2, 3)


def hashes(folder: Path) -> list[str]:
    return [runs.sha256(folder / name) for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER)]


def tune(recipe: Path, *words: str) -> None:
    command = [sys.executable, "-m", "raytune_ft.tune", "--config", str(recipe), *WORDS, *words]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr


@pytest.mark.ray
@pytest.mark.slow
def test_a_population_passes_on_weights_state_and_values(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "pbt")
    with recipe.open("a") as file:
        file.write(SPACE)
    tune(recipe)
    sweep = tmp_path / "runs/pbt"
    events = list(read_jsonl(sweep / "trials.jsonl"))
    exploited = [event for event in events if event["event"] == "exploited"]
    # behind the first step all have the same loss: an adapter begins as nothing
    assert [event["step"] for event in exploited] == [2, 3]
    paused = [(event["trial"], event["step"]) for event in events if event["event"] == "paused"]
    assert sorted(paused) == [(trial, step) for trial in range(4) for step in RUNGS]
    for event in exploited:
        check_passed_on(sweep, event)
    ledger = Ledger.read(sweep)
    assert [trial.state for trial in ledger.trials.values()] == ["done"] * 4
    for trial in ledger.trials.values():
        check_its_own_run(trial.folder, trial.values)
    check_kept(sweep, ledger)
    tune(recipe, "tune.scheduler=none", "run.name=plain")
    check_as_without(sweep, ledger)


def check_passed_on(sweep: Path, event: dict[str, Any]) -> None:
    """Behind a comparison a trial has the other one's tensors, and the other one's state."""
    own, source = (sweep / f"trials/trial_000{event[who]}" for who in ("trial", "from"))
    places = [
        each / "checkpoints" / checkpoint.folder_name(event["step"]) for each in (own, source)
    ]
    assert hashes(places[0]) == hashes(places[1])
    assert checkpoint.damage(places[0]) is None
    states = [checkpoint.read_state(place) for place in places]
    assert states[0].recipe_hash != states[1].recipe_hash
    states[0].recipe_hash = states[1].recipe_hash
    assert states[0] == states[1]
    values = [
        {e["step"]: e["loss"] for e in read_jsonl(p / "metrics.jsonl")} for p in (own, source)
    ]
    assert values[0][event["step"]] > values[1][event["step"]]
    resumed = [e["step"] for e in read_jsonl(own / "resumes.jsonl")]
    assert resumed == list(RUNGS)


def check_its_own_run(folder: Path, values: dict[str, Any]) -> None:
    """A trial's folder is a run's, with its last values, by which its last steps went."""
    recipe = loader.load_recipe(str(folder / "recipe.yaml"))
    assert (recipe.train.lr, recipe.lora.dropout) == (values["train.lr"], values["lora.dropout"])
    assert recipe.train.min_lr == values["train.min_lr"] == 0.1 * values["train.lr"]
    lines = list(read_jsonl(folder / "metrics.jsonl"))
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert recipe.train.min_lr < lines[-1]["lr"] < recipe.train.lr
    last = checkpoint.read_state(folder / "checkpoints/step_000004")
    assert last.recipe_hash == identity.recipe_hash(recipe)


def check_kept(sweep: Path, ledger: Ledger) -> None:
    board = list(read_jsonl(sweep / "leaderboard.jsonl"))
    assert [("turns" in line) for line in board] == [
        bool(ledger.trials[line["trial"]].turns) for line in board
    ]
    best = ledger.trials[board[0]["trial"]]
    kept = yaml.safe_load((sweep / "best.yaml").read_text())
    assert kept["train"]["lr"] == best.values["train.lr"]
    weights = "adapter_model.safetensors"
    assert runs.sha256(sweep / "best" / weights) == runs.sha256(best.folder / "adapter" / weights)
    assert (sweep / "best_lineage.json").is_file() == bool(best.turns)
    if best.turns:
        said = read_json(sweep / "best_lineage.json")
        assert said == {"trial": best.number, "weights": ancestry(ledger.trials, best.number)}
        assert (sweep / "best.yaml").read_text().startswith(f"# These are trial {best.number}'s")
    assert "<h2>Lineage</h2>" in (sweep / "sweep.html").read_text()


def check_as_without(sweep: Path, ledger: Ledger) -> None:
    """Up to its first turn a trial is what it is without a population; without one to its end."""
    for trial in ledger.trials.values():
        plain = sweep.parent / "plain/trials" / trial.name
        first = trial.turns[1].step if trial.turns else 4
        losses = [list(read_jsonl(p / "metrics.jsonl")) for p in (plain, trial.folder)]
        told = [[(e["loss"], e["grad_norm"], e["lr"]) for e in each[:first]] for each in losses]
        assert told[0] == told[1]
        if not trial.turns:
            name = "adapter/adapter_model.safetensors"
            assert runs.sha256(plain / name) == runs.sha256(trial.folder / name)
            last = f"checkpoints/{checkpoint.folder_name(4)}"
            assert hashes(plain / last) == hashes(trial.folder / last)
    assert not all(trial.turns for trial in ledger.trials.values())
