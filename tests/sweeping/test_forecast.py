"""How many trials run at once, what they cost and when the last one ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config import catalog, loader
from raytune_ft.config.estimates import peak
from raytune_ft.config.estimates.footprint import count
from raytune_ft.config.estimates.pace import DEVICES
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import MemoryPlanError
from raytune_ft.row_counts import Counted
from raytune_ft.sweeping import duration, forecast
from raytune_ft.sweeping.fit import FILLED, Fit, Layouts, Machine, Model, fit, heaviest, machine
from raytune_ft.sweeping.forecast import print_dry_run
from raytune_ft.sweeping.space import Space, with_values
from raytune_ft.sweeping.trials import WAITING, Trial

GIB = 2**30
NAME = "internlm_7b_qlora_oasst1_e3"


def sweep_of(name: str = NAME, **tune: Any) -> Recipe:
    recipe = loader.load_recipe(name)
    content = recipe.model_dump(mode="json")
    content["tune"] = {"space": {"lora.r": [16, 64], "train.lr": [1e-4]}, "trials": 16, **tune}
    return Recipe.model_validate(content)


def gpus(name: str, number: int = 1, cores: int = 64) -> Machine:
    device = DEVICES[name]
    return Machine(cores, 512 * GIB, number, device.memory, device)


@pytest.fixture(scope="module")
def seven() -> Recipe:
    return sweep_of()


@pytest.mark.parametrize(("card", "number"), [("h200", 1), ("h200", 8), ("rtx 4090", 2)])
def test_trials_share_a_gpu_as_far_as_its_memory_goes(
    seven: Recipe, card: str, number: int
) -> None:
    where = gpus(card, number)
    found = fit(seven, 1000, heaviest(seven), where)
    assert found.needed is not None and where.free is not None
    assert found.concurrent == found.per_gpu * number
    assert found.per_gpu * found.needed <= where.free
    one_more = Layouts(with_values(seven, {"lora.r": 64}), _counts(seven, 64), where)
    alone, crowded = one_more.on(1), one_more.on(found.per_gpu + 1)
    too_large = crowded.memory * (found.per_gpu + 1) > 0.92 * where.free
    assert too_large or crowded.seconds > 1.1 * alone.seconds
    context = peak.memory_bytes(seven, _counts(seven, 64), on_gpu=True)["GPU context"]
    assert found.needed > context


def _counts(recipe: Recipe, r: int) -> Any:
    shape = catalog.card_config(recipe.model.path)
    assert shape is not None
    return count(shape, with_values(recipe, {"lora.r": r}))


def test_the_heaviest_value_of_the_space_decides(seven: Recipe) -> None:
    light = sweep_of(space={"lora.r": [8]})
    heavy = sweep_of(space={"lora.r": [8, 512]})
    where = gpus("h200")
    few = fit(heavy, 100, heaviest(heavy), where)
    many = fit(light, 100, heaviest(light), where)
    assert few.needed is not None and many.needed is not None
    assert few.needed > many.needed and few.concurrent <= many.concurrent


@pytest.mark.parametrize("field", ["data.max_length", "train.micro_batch_size"])
def test_any_field_that_takes_memory_counts(field: str) -> None:
    recipe = sweep_of(space={field: [1, 2]})
    content = recipe.model_dump(mode="json")
    content["train"]["layout"] = "recipe"
    content["tune"]["space"] = {field: [512, 4096] if "length" in field else [1, 16]}
    swept = Recipe.model_validate(content)
    small = with_values(swept, {field: content["tune"]["space"][field][0]})
    both = fit(swept, 99, heaviest(swept), gpus("h200"))
    alone = fit(small, 99, [small], gpus("h200"))
    assert both.needed is not None and alone.needed is not None
    assert both.needed > alone.needed and both.concurrent < alone.concurrent


@pytest.mark.parametrize(("cores", "host", "most"), [(64, 512, 5), (3, 512, 3), (64, 10, 3)])
def test_cores_and_the_host_count_beside_gpus(
    seven: Recipe, cores: int, host: int, most: int
) -> None:
    where = replace(gpus("h200"), cores=cores, memory=host * GIB)
    assert fit(seven, 99, heaviest(seven), where).concurrent == most


@pytest.mark.parametrize(("memory", "cores", "most"), [(64, 4, 4), (8, 64, 3), (2.2, 64, 1)])
def test_on_a_cpu_memory_and_cores_count(memory: float, cores: int, most: int) -> None:
    recipe = sweep_of("configs/quickstart.yaml", space={"lora.r": [4, 16]})
    where = Machine(cores, int(memory * GIB))
    found = fit(recipe, 100, heaviest(recipe), where)
    assert found.concurrent == most and found.per_gpu == 0
    assert found.needed is not None
    assert found.concurrent == 1 or found.concurrent * found.needed <= memory * GIB * FILLED


def test_a_sweep_of_few_trials_and_a_cap_take_less(seven: Recipe) -> None:
    where = gpus("h200", 8)
    assert fit(seven, 3, heaviest(seven), where).concurrent == 3
    capped = sweep_of(concurrent=8)
    found = fit(capped, 100, heaviest(capped), where)
    assert (found.concurrent, found.per_gpu) == (8, 1)


def test_more_at_once_than_fit_are_refused_in_a_line_with_the_number() -> None:
    recipe = sweep_of(concurrent=9)
    with pytest.raises(
        MemoryPlanError, match=r"^tune\.concurrent: 9 trials [^\n]*\d GiB[^\n]*$"
    ) as e:
        fit(recipe, 16, heaviest(recipe), gpus("h200"))
    most = int(str(e.value).rpartition("set it to ")[2].split()[0])
    fitting = sweep_of(concurrent=most)
    assert fit(fitting, 16, heaviest(fitting), gpus("h200")).concurrent == most


@pytest.mark.parametrize("where", [Machine(2, 1 * GIB), replace(gpus("l4"), free=3 * GIB)])
def test_a_trial_that_does_not_fit_is_refused(seven: Recipe, where: Machine) -> None:
    with pytest.raises(MemoryPlanError, match=r"^tune: one trial needs about [\d.]+ GiB, [^\n]*$"):
        fit(seven, 4, heaviest(seven), where)


def test_a_cluster_is_known_by_what_ray_says() -> None:
    here = {"CPU": 96.0, "GPU": 8.0, "accelerator_type:H100": 1.0, "memory": 1e12}
    found = machine(here)
    assert (found.gpus, found.cores, found.device) == (8, 96, DEVICES["h100"])
    unknown = machine({"CPU": 8.0, "GPU": 4.0})
    recipe = sweep_of()
    assert fit(recipe, 16, heaviest(recipe), unknown).concurrent == 4, "one for each GPU"
    assert machine({"CPU": 6.0}).gpus == 0


@given(seconds=st.lists(st.floats(0.1, 100), min_size=1, max_size=40), slots=st.integers(1, 12))
def test_the_end_lies_between_the_bounds_of_any_schedule(seconds: list[float], slots: int) -> None:
    """Graham's bound: list scheduling takes under twice the shortest schedule there is."""
    each = [(lambda at_once, one=one: one) for one in seconds]
    end = duration.end_of([1] * len(seconds), each, slots, 0.0)
    least = max(*seconds, sum(seconds) / slots)
    assert least - 1e-6 <= end <= sum(seconds) / slots + max(seconds) + 1e-6


def test_asha_takes_at_least_one_trial_to_its_end() -> None:
    assert duration.shortest([8, 8, 8], "asha") == [8, 2, 2]
    assert duration.shortest([8, 8], "none") == [8, 8]
    assert duration.shortest([1, 1], "asha") == [1, 1]


def counted(packs: int) -> Counted:
    report: Any = {"rows": 10, "used": 10, "tokens": 900, "targets": 10}
    return Counted(report, 10, True, packs=packs, steps=1, density=0.5)


def test_cost_is_the_sum_over_trials_with_their_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sweep_of(scheduler="none", space={"train.epochs": [1, 3]})
    monkeypatch.setattr(forecast, "machine", lambda cluster: gpus("h200"))
    values = [{"train.epochs": 1}, {"train.epochs": 3}]
    found = forecast.forecast(recipe, 2, values=values, counted=counted(320))
    assert found.most is not None and found.least == found.most
    each = -(-320 // recipe.global_batch_size)
    assert found.most.steps == 4 * each
    assert found.most.tokens == 4 * each * recipe.global_batch_size * recipe.data.max_length // 2
    assert found.gpu_share == pytest.approx(1 / found.concurrent)
    assert found.seconds is not None and found.devices == 1
    assert found.hours(found.most) == pytest.approx(found.seconds / 3600)


def test_trials_that_share_a_gpu_wait_for_each_other(seven: Recipe) -> None:
    model = Model(seven)
    here = duration.step_seconds(seven, model, gpus("h200"), 5, 1.0)
    spread = duration.step_seconds(seven, model, gpus("h200", 5), 1, 1.0)
    assert here is not None and spread is not None
    assert here(1) < here(5) < 6 * here(1)
    assert spread(5) == pytest.approx(spread(1)) and spread(6) > spread(5)


def test_the_last_trial_has_the_machine_for_itself() -> None:
    """Three trials of ten steps, two at once, that slow each other down as far as two can."""
    each: list[duration.StepSeconds] = [lambda at_once: 2.0 * at_once] * 3
    assert duration.end_of([10, 10, 10], each, 2, 0.0) == pytest.approx(40 + 20)
    assert duration.end_of([10, 10, 10], each, 2, 5.0) == pytest.approx(45 + 25)
    assert duration.end_of([10, 10, 10], each, 3, 0.0) == pytest.approx(60)
    assert duration.end_of([5, 10], each, 2, 0.0) == pytest.approx(30)


@pytest.fixture
def planned(tiny_model: Path, chats: Path) -> tuple[Recipe, list[Trial]]:
    recipe = Recipe.model_validate({
        "model": {"path": str(tiny_model)},
        "data": {"sources": [{"path": str(chats)}], "max_length": 96},
        "train": {"epochs": 2, "micro_batch_size": 1, "accumulation": 2},
        "tune": {"space": {"lora.r": [4, 8], "lora.alpha": "2 * lora.r"}, "search": "grid"},
    })  # fmt: skip
    values = Space.of(recipe).grid(recipe)
    trials = [Trial(i, f"trial_{i:04d}", each, None, 0, WAITING, Path(), 0.0)
              for i, each in enumerate(values)]  # fmt: skip
    return recipe, trials


def test_a_dry_run_shows_trials_cost_and_end_in_80_columns(
    planned: tuple[Recipe, list[Trial]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_dry_run(*planned) == 0
    said = capsys.readouterr().out
    table = [line for line in said.splitlines() if not line.startswith(("plan", "note"))]
    assert all(len(line) <= 80 for line in table)
    assert "= 2 * lora.r" in said and ["│", "1", "│", "8", "│", "16", "│"] in map(
        str.split, said.splitlines()
    )
    assert "trials at once: each takes at most" in said or "1 trial at a time" in said
    assert "at most" in said and "core-hours: begun now, it ends at" in said


def test_a_dry_run_as_json(
    planned: tuple[Recipe, list[Trial]], capsys: pytest.CaptureFixture[str]
) -> None:
    assert print_dry_run(*planned, as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert [one["values"] for one in said["trials"]] == [one.values for one in planned[1]]
    most, least = said["forecast"]["most"], said["forecast"]["least"]
    assert least["steps"] <= most["steps"] and most["seconds"] > 0 and most["core_hours"] > 0


def test_a_search_that_chooses_as_it_goes_is_weighed_by_the_extremes_of_its_space(
    planned: tuple[Recipe, list[Trial]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, trials = planned
    assert print_dry_run(recipe, [replace(one, values={}) for one in trials]) == 0
    said = capsys.readouterr().out
    assert "chosen as the sweep goes" in said and "lora.r: [4, 8]" in said
    known, open_yet = (
        forecast.forecast(recipe, 2, values=values, steps=3)
        for values in ([one.values for one in trials], [{}, {}])
    )
    assert known.lines[0] == open_yet.lines[0]


def test_a_trial_whose_values_cannot_be_together_is_noted_and_costs_nothing(
    planned: tuple[Recipe, list[Trial]], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, trials = planned
    bad = replace(trials[0], number=7, values={"model.quantization": "nf4", "model.method": "full"})
    assert print_dry_run(recipe, [trials[0], bad], as_json=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert any(note.startswith("trial 7 cannot be: ") for note in said["notes"])
    alone = forecast.forecast(recipe, 1, values=[trials[0].values], steps=5)
    both = forecast.forecast(recipe, 2, values=[trials[0].values, bad.values], steps=5)
    assert alone.most is not None and both.most is not None
    assert both.most.steps == alone.most.steps


def test_trials_on_one_base_are_told_as_such(planned: tuple[Recipe, list[Trial]]) -> None:
    recipe, _ = planned
    shared = recipe.model_copy(
        update={"tune": recipe.tune.model_copy(update={"shared_base": True})}
    )
    line = forecast.forecast(shared, 2).lines[0]
    assert (
        line == "trials that can share a base train on one, in one process; the others one by one"
    )


def test_neither_torch_nor_ray_is_needed_where_a_card_knows_the_model() -> None:
    code = (
        "import sys; from raytune_ft.config import loader;"
        "from raytune_ft.sweeping.forecast import forecast;"
        f"r = loader.load_recipe('{NAME}', ['train.max_steps=9', 'tune.space={{lora.r: [8, 9]}}']);"
        "print(forecast(r, 4, cluster={'GPU': 1, 'CPU': 8, 'accelerator_type:H200': 1}).lines);"
        "assert not {'torch', 'ray', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env={**os.environ, "RAY_ADDRESS": "auto"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "trials at once" in done.stdout and "GPU-hours" in done.stdout


def test_a_population_waits_and_begins_again_at_each_comparison(
    seven: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = seven.model_dump(mode="json")
    space = {"train.lr": {"low": 1e-5, "high": 1e-3}}
    content["tune"] = {"space": space, "trials": 8, "scheduler": "pbt"}
    recipe = Recipe.model_validate(content)
    where = gpus("h100")
    monkeypatch.setattr(forecast, "machine", lambda *_: where)
    monkeypatch.setattr(forecast, "fit", lambda *_: Fit(4, 4, None, "four at once"))
    seconds: duration.StepSeconds = lambda at_once: 2.0  # noqa: E731
    monkeypatch.setattr(duration, "step_seconds", lambda *_: seconds)
    found = forecast.forecast(recipe, 8, steps=80)
    assert found.most == found.least
    assert found.most is not None and found.most.steps == 8 * 80
    assert found.seconds == pytest.approx(8 * 2 * (duration.START_GPU + 10 * 2.0))
    assert found.lines[1] == (
        "compared about 7 times, behind steps 10 to 70 of 80: there 2 of 8 go on with weights of "
        "the best 2; each trial begins 8 times"
    )
    assert not any("at most" in line or "earliest" in line for line in found.lines[1:])


def test_a_metric_that_is_measured_too_late_is_told(seven: Recipe) -> None:
    content = seven.model_dump(mode="json")
    content["tune"] = {
        "space": {"train.lr": [1e-4, 1e-3]},
        "scheduler": "pbt",
        "metric": "val_loss",
    }
    content["eval"] = {"every": 500}
    content["data"]["validation"] = 0.1
    found = forecast.forecast(Recipe.model_validate(content), 4, steps=80)
    assert found.lines[1] == (
        "trials are never compared: val_loss is measured too late, set eval.every to 10 or less"
    )
