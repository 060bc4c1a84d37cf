"""The course of a sweep whose driver dies anywhere, hundreds of times, is that of a calm one.

Trials here are curves: a step writes its line as a run does, every second one is a checkpoint, and
what is behind the last checkpoint is taken again. tests/cluster has the same with Ray and training.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.sweeping.course import Course, is_trained, result_of
from raytune_ft.sweeping.searching import search_for
from raytune_ft.sweeping.trials import Ledger, Trial
from raytune_ft.training.run_folder import RunFolder, append_jsonl, read_jsonl
from tests.sweeping.made import recipe_of

TRIALS = 10
STEPS = 8
BAD = {"lora.r": 13}
"""A trial with this fails at its third step."""


class KilledError(Exception):
    """The driver is gone."""


def sweep_of(**tune: Any) -> Recipe:
    space = {"train.lr": {"low": 1e-4, "high": 1e-2, "log": 1}, "lora.r": [4, 8, 16, 13]}
    return recipe_of(space, tune={"trials": TRIALS, **tune})


def loss_of(trial: Trial, step: int) -> float:
    """Fall with the steps, at a pace and with bumps that follow from the values."""
    bumps = random.Random(f"{sorted(trial.values.items())}/{step}").random()
    return 10.0 - step * 300 * trial.values["train.lr"] ** 0.8 + bumps


def trained(trial: Trial) -> Iterator[dict[str, Any]]:
    """Train a curve from its last checkpoint to its end, a step at a time."""
    folder = RunFolder(trial.folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.run_json.is_file():
        folder.update(status="running", checkpoint=0)
    if is_trained(folder):
        return
    begin = folder.info()["checkpoint"]
    folder.cut_after(begin)
    for step in range(begin + 1, STEPS + 1):
        if trial.values["lora.r"] == BAD["lora.r"] and step == 3:
            raise ValueError("loss is nan")
        event = {"step": step, "loss": loss_of(trial, step), "seconds": 0.5}
        append_jsonl(folder.metrics, event)
        yield event
        if step % 2 == 0:
            folder.update(checkpoint=step)
    folder.adapter.mkdir(exist_ok=True)
    folder.update(status="done", exported_step=STEPS)


def drive(course: Course, dice: random.Random, life: int, at_once: int) -> None:
    """Run trials side by side, in an order of chance; KilledError after `life` turns."""
    running: dict[int, Iterator[dict[str, Any]]] = {}
    while True:
        while len(running) < at_once and (trial := course.next()) is not None:
            course.started(trial.number)
            running[trial.number] = trained(trial)
        if not running:
            return
        if not life:
            raise KilledError
        life -= 1
        number = dice.choice(list(running))
        try:
            event = next(running[number], None)
        except ValueError as error:
            course.failed(number, str(error))
            del running[number]
            continue
        if event is None:
            folder = RunFolder(course.ledger.trials[number].folder)
            if dice.random() < 0.3:
                raise KilledError  # between its end and the word of it
            course.trained(number, result_of(folder, "loss"))
        if event is None or not course.told(number, event):
            del running[number]


def finished(recipe: Recipe, folder: Path, dice: random.Random, *, kills: bool) -> Ledger:
    """Drive a sweep to its end through as many drivers as it takes."""
    folder.mkdir()
    for _ in range(1000):
        ledger = Ledger.read(folder)
        course = Course(recipe, ledger, search_for(recipe), STEPS)
        calm = random.Random(0)
        calm.random = lambda: 1.0  # type: ignore[method-assign]
        try:
            at_once = dice.randint(1, 4)
            drive(course, dice if kills else calm, dice.randint(0, 9) if kills else -1, at_once)
        except KilledError:
            if dice.random() < 0.3:
                with (folder / "trials.jsonl").open("a") as file:
                    file.write('{"event": "done", "tri')
            continue
        return ledger
    raise AssertionError("the sweep does not end")


def ends(ledger: Ledger) -> list[tuple[Any, ...]]:
    return [(t.values, t.state, t.metric, t.step) for t in ledger.trials.values()]


def check_once(folder: Path) -> None:
    over: set[int] = set()
    for event in read_jsonl(folder / "trials.jsonl"):
        assert event["trial"] not in over, event
        if event["event"] in ("done", "stopped", "failed"):
            over.add(event["trial"])
    assert over == set(range(TRIALS))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("scheduler", ["asha", "none"])
def test_killed_anywhere_a_sweep_ends_as_a_calm_one(
    tmp_path: Path, seed: int, scheduler: str
) -> None:
    recipe = sweep_of(scheduler=scheduler)
    calm = finished(recipe, tmp_path / "calm", random.Random(seed), kills=False)
    killed = finished(recipe, tmp_path / "killed", random.Random(seed), kills=True)
    kept = [e["event"] for e in read_jsonl(tmp_path / "killed/trials.jsonl")]
    assert kept.count("started") > TRIALS + 5
    assert ends(killed) == ends(calm)
    check_once(tmp_path / "killed")
    states = {trial.state for trial in killed.trials.values()}
    assert "failed: loss is nan" in states or scheduler == "asha"
    assert ("stopped early" in states) == (scheduler == "asha")


def test_what_a_trial_was_told_is_not_needed_twice(tmp_path: Path) -> None:
    """A driver dies between a trial's end and the ledger's line: the folder says it all."""
    recipe = sweep_of(scheduler="none")
    course = Course(recipe, Ledger.read(tmp_path), search_for(recipe), STEPS)
    trial = next(t for t in iter(course.next, None) if t.values["lora.r"] != BAD["lora.r"])
    for _ in trained(trial):
        pass
    again = Course(recipe, Ledger.read(tmp_path), search_for(recipe), STEPS)
    found = again.ledger.trials[trial.number]
    assert (found.state, found.step) == ("done", STEPS)
    assert found.metric == loss_of(trial, STEPS)
    assert found.seconds == STEPS * 0.5


def test_a_trial_that_cannot_be_fails_alone(tmp_path: Path) -> None:
    recipe = recipe_of({"train.min_lr": [1e-5, 1.0], "lora.r": [4]}, tune={"search": "grid"})
    course = Course(recipe, Ledger.read(tmp_path), search_for(recipe), STEPS)
    given = list(iter(course.next, None))
    assert [trial.number for trial in given] == [0]
    assert course.trials[1].state == (
        "failed: tune.space: train.min_lr is above train.lr; lower train.min_lr"
    )


def test_the_best_checkpoint_s_metric_counts_where_it_is_exported(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step, value in ((1, None), (2, 3.0), (3, None), (4, 5.0)):
        append_jsonl(folder.metrics, {"step": step, "loss": 9.0 - step, "val_loss": value})
    for exported, expected in ((2, 3.0), (3, 3.0), (4, 5.0)):
        folder.update(exported_step=exported)
        assert result_of(folder, "val_loss").metric == expected
    assert result_of(folder, "loss").metric == 5.0


def test_asked_to_stop_it_gives_no_trial(tmp_path: Path) -> None:
    recipe = sweep_of()
    course = Course(recipe, Ledger.read(tmp_path), search_for(recipe), STEPS)
    assert course.next() is not None
    course.stopping = True
    assert course.next() is None
    assert sum(not trial.is_over for trial in course.trials) == TRIALS
