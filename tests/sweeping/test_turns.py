"""What Ray Tune is told of a population: when there is nothing yet, and whose word is too late."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ray_tune = pytest.importorskip("ray.tune")

from raytune_ft.sweeping.generations import Generations  # noqa: E402
from raytune_ft.sweeping.on_ray import Next, Turns, Watch, _name  # noqa: E402
from raytune_ft.sweeping.searching import search_for  # noqa: E402
from raytune_ft.sweeping.trials import Ledger  # noqa: E402
from tests.sweeping.made import recipe_of  # noqa: E402

FINISHED = ray_tune.search.Searcher.FINISHED


@pytest.fixture
def course(tmp_path: Path) -> Generations:
    space = {"train.lr": {"low": 1e-4, "high": 1e-2}}
    recipe = recipe_of(space, tune={"scheduler": "pbt"})
    ledger = Ledger.read(tmp_path)
    return Generations(recipe, ledger, search_for(recipe), 16, carry=lambda *_: None)


def trials_of(searcher: Next) -> list[Any]:
    """Take what there is; each as one of Ray Tune's."""
    asked = iter(lambda: searcher.suggest("x"), None)
    return [SimpleNamespace(config=config, get_error=lambda: "lost") for config in asked]


def report(course: Generations, trial: Any, **result: Any) -> str:
    return Turns(course, lambda _: None).on_trial_result(None, trial, result)


def test_none_while_all_are_waited_for_and_the_end_at_the_end(course: Generations) -> None:
    searcher = Next(course)
    first = trials_of(searcher)
    assert [(t.config["number"], t.config["until"]) for t in first] == [(n, 2) for n in range(4)]
    assert len({_name(t) for t in first}) == 4
    for trial in first:
        assert report(course, trial, step=2, loss=1.0) == "CONTINUE"
        assert trials_of(searcher) == []
        report(course, trial, outcome="paused", step=2, metric=float(trial.config["number"]))
    second = trials_of(searcher)
    assert [(t.config["number"], t.config["until"]) for t in second] == [(n, 4) for n in range(4)]
    assert not {_name(t) for t in first} & {_name(t) for t in second}
    for trial in second:
        report(course, trial, outcome="done", step=16, metric=1.0)
    assert searcher.suggest("x") == FINISHED


def test_what_is_said_behind_a_pause_is_of_no_account(course: Generations) -> None:
    first = trials_of(Next(course))
    for trial in first:
        report(course, trial, outcome="paused", step=2, metric=1.0)
    before = dict(course.ledger.trials)
    report(course, first[0], outcome="failed", reason="lost after its last word")
    report(course, first[1], outcome="paused", step=2, metric=7.0)
    Watch(course, lambda _: None).on_trial_error(0, [], first[2])
    assert course.ledger.trials == before
    assert [t.config["until"] for t in trials_of(Next(course))] == [4] * 4


def test_a_process_that_was_asked_to_end_alone_begins_again(course: Generations) -> None:
    searcher = Next(course)
    first = trials_of(searcher)
    report(course, first[1], outcome="interrupted")
    assert [t.config["number"] for t in trials_of(searcher)] == [1]
    course.stopping = True
    report(course, first[2], outcome="interrupted")
    assert searcher.suggest("x") == FINISHED
