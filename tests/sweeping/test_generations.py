"""A population whose driver dies anywhere goes the way of a calm one, and of one told by hand.

Trials here are curves whose state is what they learned: a step adds to it by the trial's values, a
checkpoint keeps it, and who takes another one's has it too. Every second step is a checkpoint
beside those of pauses, and what is behind the last one is taken again.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.sweeping import population
from raytune_ft.sweeping.course import Course, is_trained, result_of
from raytune_ft.sweeping.generations import Generations, course_of
from raytune_ft.sweeping.inheriting import Pause
from raytune_ft.sweeping.searching import search_for
from raytune_ft.sweeping.space import Space
from raytune_ft.sweeping.trials import Ledger, Trial, Turn
from raytune_ft.training.run_folder import RunFolder, append_jsonl, read_jsonl
from tests.sweeping.made import recipe_of

TRIALS = 9
STEPS = 16
SPACE = {
    "train.lr": {"low": 1e-4, "high": 1e-2, "log": 1},
    "lora.dropout": [0.0, 0.1, 0.2, 0.3],
}
FAILS_AT = 7
"""Of a trial whose dropout is 0.3 then."""


class KilledError(Exception):
    """The driver is gone."""


def sweep_of(seed: int = 42, **tune: Any) -> Recipe:
    tune = {"trials": TRIALS, "scheduler": "pbt", **tune}
    return recipe_of(SPACE, tune=tune, train={"seed": seed})


def learned(values: dict[str, Any], step: int) -> float:
    """Return what a step adds to a trial's state."""
    bump = random.Random(f"{sorted(values.items())}/{step}").random()
    return 300 * values["train.lr"] ** 0.8 - values["lora.dropout"] + bump


def trained(trial: Trial, until: int | None) -> Iterator[dict[str, Any] | None]:
    """Train a curve from its last checkpoint to its end or pause, a step at a time.

    The last thing that it yields is None when it is paused.
    """
    folder = RunFolder(trial.folder)
    folder.path.mkdir(parents=True, exist_ok=True)
    if not folder.run_json.is_file():
        folder.update(status="running", checkpoint=[0, 0.0, trial.values])
    if is_trained(folder):
        return
    begin, state, values = folder.info()["checkpoint"]
    assert values == trial.values
    pause = Pause(until, "loss")
    if pause.is_at(folder, begin):
        yield None
        return
    folder.cut_after(begin)
    for step in range(begin + 1, STEPS + 1):
        if trial.values["lora.dropout"] == 0.3 and step == FAILS_AT:
            raise ValueError("loss is nan")
        state += learned(trial.values, step)
        event = {"step": step, "loss": 10.0 - state, "seconds": 0.5}
        append_jsonl(folder.metrics, event)
        pause.hear(event)
        yield event
        if step % 2 == 0 or pause.reached:
            folder.update(checkpoint=[step, state, trial.values])
        if pause.reached:
            yield None
            return
    folder.adapter.mkdir(exist_ok=True)
    folder.update(status="done", exported_step=STEPS, state=state)


def carry(trial: Trial, source: Trial, turn: Turn) -> None:
    step, state, _ = RunFolder(source.folder).info()["checkpoint"]
    assert step == turn.step
    RunFolder(trial.folder).update(checkpoint=[step, state, turn.values])


def drive(course: Course, dice: random.Random, life: int, at_once: int) -> None:
    """Run trials side by side, in an order of chance; KilledError after `life` turns."""
    running: dict[int, Iterator[dict[str, Any] | None]] = {}
    while True:
        while len(running) < at_once and (trial := course.next()) is not None:
            course.started(trial.number)
            running[trial.number] = trained(trial, course.until(trial.number))
        if not running:
            assert not course.waits
            return
        assert len(running) <= at_once
        if not life:
            raise KilledError
        life -= 1
        number = dice.choice(list(running))
        folder = RunFolder(course.ledger.trials[number].folder)
        try:
            event = next(running[number], {})
        except ValueError as error:
            course.failed(number, str(error))
            del running[number]
            continue
        if event and course.told(number, event):
            continue
        del running[number]
        if dice.random() < 0.1:
            raise KilledError  # between its last word and the ledger's line
        if event is None:
            last = list(read_jsonl(folder.metrics))[-1]
            assert last["step"] == folder.info()["checkpoint"][0]
            course.paused(number, last["step"], last["loss"])
            course.paused(number, last["step"], last["loss"])  # said twice
        else:
            course.trained(number, result_of(folder, "loss"))


def finished(recipe: Recipe, folder: Path, dice: random.Random, *, kills: bool) -> Ledger:
    """Drive a sweep to its end through as many drivers as it takes."""
    folder.mkdir()

    def fragile(trial: Trial, source: Trial, turn: Turn) -> None:
        if kills and dice.random() < 0.2:
            raise KilledError
        carry(trial, source, turn)
        if kills and dice.random() < 0.2:
            raise KilledError

    for _ in range(2000):
        calm = random.Random(0)
        calm.random = lambda: 1.0  # type: ignore[method-assign]
        life = dice.randint(0, 25) if kills else -1
        try:
            ledger = Ledger.read(folder)
            course = Generations(recipe, ledger, search_for(recipe), STEPS, carry=fragile)
            drive(course, dice if kills else calm, life, dice.randint(1, 5))
        except KilledError:
            if dice.random() < 0.3:
                with (folder / "trials.jsonl").open("a") as file:
                    file.write('{"event": "exploited", "tri')
            continue
        return ledger
    raise AssertionError("the sweep does not end")


def by_hand(recipe: Recipe) -> dict[int, tuple[dict[str, Any], float | None]]:
    """Train all trials in step, in one loop; return each one's last values and last loss."""
    values = dict(enumerate(search_for(recipe).planned()))
    states, space = dict.fromkeys(values, 0.0), Space.of(recipe)
    for step in range(1, STEPS + 1):
        for number in list(states):
            if values[number]["lora.dropout"] == 0.3 and step == FAILS_AT:
                del states[number]
                continue
            states[number] += learned(values[number], step)
        if step % 2 == 0 and step < STEPS:
            losses = {number: 10.0 - state for number, state in states.items()}
            key = f"{recipe.train.seed}/{step}"
            for number, source in population.exploits(losses, "min", key).items():
                states[number] = states[source]
                values[number] = population.moved(space, recipe, values[source], f"{key}/{number}")
    return {n: (values[n], 10.0 - states[n] if n in states else None) for n in values}


def ends(ledger: Ledger) -> list[tuple[Any, ...]]:
    return [(t.values, t.state, t.metric, t.step, t.turns) for t in ledger.trials.values()]


@pytest.mark.parametrize("seed", range(12))
def test_killed_anywhere_a_population_goes_the_same_way(tmp_path: Path, seed: int) -> None:
    recipe = sweep_of(seed)
    calm = finished(recipe, tmp_path / "calm", random.Random(seed), kills=False)
    killed = finished(recipe, tmp_path / "killed", random.Random(seed), kills=True)
    assert ends(killed) == ends(calm)
    lines = [list(read_jsonl(tmp_path / name / "trials.jsonl")) for name in ("calm", "killed")]
    exploited = [
        [(e["trial"], e["step"], e["from"], e["values"]) for e in each if e["event"] == "exploited"]
        for each in lines
    ]
    assert exploited[0] == exploited[1]
    assert len(exploited[0]) > 7
    starts = [sum(e["event"] == "started" for e in each) for each in lines]
    assert starts[1] > starts[0] + 10
    over = [e["trial"] for e in lines[1] if e["event"] in ("done", "failed")]
    assert sorted(over) == list(range(TRIALS))
    for number, (values, loss) in by_hand(recipe).items():
        trial = calm.trials[number]
        assert trial.values == values
        assert trial.state == ("failed: loss is nan" if loss is None else "done")
        assert loss is None or trial.metric == loss


def test_some_fail_on_the_way_and_some_are_saved_by_others_values() -> None:
    """What the curves of this file are made for does happen."""
    fates = set()
    for seed in range(12):
        recipe = sweep_of(seed)
        begun = search_for(recipe).planned()
        for number, (_, loss) in by_hand(recipe).items():
            fates.add((begun[number]["lora.dropout"] == 0.3, loss is None))
    assert fates >= {(True, True), (True, False), (False, False)}


def at_the_first_comparison(place: Path, **tune: Any) -> Generations:
    recipe = sweep_of(**tune)
    course = Generations(recipe, Ledger.read(place), search_for(recipe), STEPS, carry=carry)
    for trial in iter(course.next, None):
        for event in trained(trial, course.until(trial.number)):
            if event is not None:
                course.told(trial.number, event)
    return course


def test_nobody_goes_on_before_all_are_there(tmp_path: Path) -> None:
    course = at_the_first_comparison(tmp_path)
    for number in range(TRIALS):
        assert course.next() is None
        assert course.waits
        assert course.until(number) == 2
        course.paused(number, 2, float(number))
    assert course.until(0) == 4
    assert sorted(n for n, _ in course.ledger.exploits) == [7, 8]
    assert [trial.number for trial in iter(course.next, None)] == list(range(TRIALS))


def test_a_trial_that_fails_is_not_waited_for(tmp_path: Path) -> None:
    course = at_the_first_comparison(tmp_path)
    for number in range(TRIALS - 1):
        course.paused(number, 2, float(number))
    assert course.next() is None
    course.failed(TRIALS - 1, "out of memory")
    assert sorted(n for n, _ in course.ledger.exploits) == [6, 7]
    assert course.next() is not None


def test_a_process_that_ends_for_no_fault_is_begun_again(tmp_path: Path) -> None:
    recipe = sweep_of()
    course = Generations(recipe, Ledger.read(tmp_path), search_for(recipe), STEPS, carry=carry)
    first = course.next()
    assert first is not None
    course.returned(first.number)
    assert course.next() == first


def test_asked_to_stop_it_gives_no_trial_and_waits_for_none(tmp_path: Path) -> None:
    course = at_the_first_comparison(tmp_path)
    course.stopping = True
    for number in range(TRIALS):
        course.paused(number, 2, float(number))
    assert course.next() is None
    assert not course.waits


def test_what_was_measured_before_a_turn_is_not_the_trial_s(tmp_path: Path) -> None:
    """A driver that comes later reads the lines of before the turn once more."""
    course = at_the_first_comparison(tmp_path)
    for number in range(TRIALS):
        course.paused(number, 2, float(number))
    (loser, turn), *_ = course.ledger.exploits
    assert course.ledger.trials[loser].metric == turn.source
    again = Ledger.read(tmp_path)
    assert again.trials == course.ledger.trials
    Generations(course.recipe, again, search_for(course.recipe), STEPS, carry=carry)
    assert replace(again.trials[loser], seconds=0.0) == course.ledger.trials[loser]


def test_the_course_is_what_the_recipe_says(tmp_path: Path) -> None:
    for scheduler, kind in (("pbt", Generations), ("asha", Course), ("none", Course)):
        recipe = sweep_of(scheduler=scheduler)
        course = course_of(recipe, Ledger(tmp_path), search_for(recipe), STEPS)
        assert type(course) is kind
        assert (course.until(0) is None) == (kind is Course)
        (tmp_path / "trials.jsonl").unlink()
