"""`python -m raytune_ft.tune --config FILE`: Ray Tune over the same training function.

Each trial is `training.worker.run` in a process of its own with a run folder of its own, under
`SWEEP/trials/`. Rows are counted once; all trials stream the same packs.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ray import tune as ray_tune
from rich.console import Console
from rich.table import Table

from raytune_ft.cluster import noise_to, ray_session
from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe, TuneSection
from raytune_ft.data.feeder import feeding
from raytune_ft.errors import RecipeError, TrainingError
from raytune_ft.new_run import new_folder, removed_unless_started
from raytune_ft.preparation import Prepared, prepare
from raytune_ft.screen import Screen
from raytune_ft.training import worker
from raytune_ft.training.run_folder import Event, RunFolder, append_jsonl

INHERITED = (
    "source", "model_folder", "template", "system", "method", "quantization", "double_quant",
    "eos_token",
)  # fmt: skip
TUNABLE = ("lora.", "train.", "model.")
STEPS = ("train.epochs", "train.max_steps", "train.micro_batch_size", "train.accumulation")
"""Fields that change the number of steps, which `data.compat` counts once for all trials."""


@dataclass(frozen=True)
class Trial:
    """One trial after the sweep."""

    number: int
    values: dict[str, Any]
    metric: float | None
    step: int
    state: str
    folder: Path


def tune(recipe: Recipe, *, source: str, dry_run: bool = False) -> int:
    """Run the sweep of `recipe.tune`; return the exit code.

    Writes `leaderboard.jsonl`, `best.yaml` and `best/` (the best trial's adapter) into the
    sweep's folder. A trial that fails is listed with its reason and does not stop the others.

    Raises:
        RecipeError: the space is empty, names an unknown field, or workers are more than one.
        TrainingError: no trial finished.
    """
    check(recipe)
    if dry_run:
        print_space(recipe)
        return 0
    folder = new_folder(recipe, source)
    with removed_unless_started(folder), noise_to(folder.log) as terminal:
        screen = Screen(recipe.train.log_every, console=Console(file=terminal, highlight=False))
        screen.stage("ray")
        with ray_session():
            prepared = prepare(recipe, folder, source, screen)
            trials = sweep(recipe, prepared, folder, screen)
        best = keep_best(recipe, trials, folder)
        folder.update(status="done", best=best.number)
        screen.console.print(leaderboard(recipe, trials))
        screen.line(f"best recipe: {folder.path}/best.yaml   its adapter: {folder.path}/best")
        screen.line(f"talk to it: raytune-ft chat {best.folder}")
    return 0


def check(recipe: Recipe) -> None:
    """Refuse a sweep that cannot run, before anything starts."""
    if not recipe.tune.space:
        raise RecipeError(
            "tune.space: is empty; name fields, such as: tune: {space: {lora.r: [8, 16]}}"
        )
    if recipe.run.workers > 1:
        raise RecipeError("run.workers: a sweep trains one worker per trial; set run.workers: 1")
    if recipe.tune.metric == "val_loss" and recipe.data.validation is None:
        raise RecipeError("tune.metric: 'val_loss' needs held-out rows; set data.validation")
    for field, choice in recipe.tune.space.items():
        if not field.startswith(TUNABLE):
            raise RecipeError(
                f"tune.space: '{field}' cannot be swept; fields of lora, train and model can"
            )
        if recipe.data.compat is not None and field in STEPS:
            raise RecipeError(
                f"tune.space: '{field}' cannot be swept under data.compat, whose learning rate "
                "goes by the steps counted before; leave out data.compat, or the field"
            )
        for value in [choice["low"], choice["high"]] if isinstance(choice, dict) else choice:
            with_values(recipe, {field: value})


def sweep(recipe: Recipe, prepared: Prepared, folder: RunFolder, screen: Screen) -> list[Trial]:
    """Run all trials; return them best first."""
    import ray

    section = recipe.tune
    gpus = int(ray.cluster_resources().get("GPU", 0))
    concurrent = section.concurrent or max(1, gpus or (os.cpu_count() or 1) // 2)
    concurrent = min(concurrent, section.trials)
    resources: dict[str, float] = {"cpu": 0.5}
    if gpus:
        resources["gpu"] = min(1.0, gpus / concurrent)
    job = replace(prepared.job, sharing=concurrent, gpu_share=resources.get("gpu", 1.0))
    shared = replace(prepared, job=job)
    screen.line(f"{section.trials} trials, {concurrent} at once, ~{job.expected_steps} steps each")
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(ray_tune.with_parameters(run_trial, prepared=shared), resources),
        param_space={k: domain(v) for k, v in section.space.items()},
        tune_config=ray_tune.TuneConfig(
            metric=section.metric,
            mode=section.mode,
            num_samples=section.trials,
            max_concurrent_trials=concurrent,
            scheduler=scheduler(section, job.expected_steps),
            trial_dirname_creator=lambda trial: f"trial_{trial.trial_id}",
        ),
        run_config=ray_tune.RunConfig(
            name="sweep",
            storage_path=str(folder.path / "ray"),
            verbose=0,
            callbacks=[Lines(screen, section, job.expected_steps)],
        ),
    )
    return ranked(tuner.fit(), section, folder)


def run_trial(config: dict[str, Any], prepared: Prepared) -> None:
    """Train one trial in this process, reporting each step to Ray Tune."""
    base = RunFolder(prepared.job.run_path)
    trial_id = ray_tune.get_context().get_trial_id()
    recipe = with_values(Recipe.model_validate(prepared.job.recipe), config)
    folder = RunFolder(base.path / "trials" / trial_id)
    info = base.info()
    name = f"{info['name']}_{trial_id}"
    named = recipe.model_copy(update={"run": recipe.run.model_copy(update={"name": trial_id})})
    folder.create(name, loader.dump_yaml(named), **{key: info[key] for key in INHERITED})
    shutil.copy(base.path / "data.json", folder.path / "data.json")
    job = replace(
        prepared.job, recipe=named.model_dump(mode="json"), run_path=str(folder.path),
        sure=False,  # its own batch or epochs may give it other steps than were told for all
    )  # fmt: skip

    last: list[Event] = []

    def report(event: Event) -> None:
        if event["kind"] == "step":
            metrics = {k: event[k] for k in ("step", "loss", "val_loss", "lr")}
            # a scheduler ends a trial at its last report: that one waits for the adapter
            if event["share"] == 1.0:
                last.append(metrics)
            else:
                ray_tune.report(metrics)

    # trials end at any step and with their own epochs: each has a feeder, which ends with it
    rows = prepared.kinds
    rows["train"] = replace(prepared.train, epochs=named.train.epochs)
    with (
        noise_to(folder.log),
        feeding(rows, shared_folder=base.path.parent, begin=("train",)) as supply,
    ):
        packs, validation = supply.of_rank(0)
        worker.run(job, packs, validation, report)
    folder.update(status="done")
    for metrics in last:
        ray_tune.report(metrics)


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """Copy a recipe with dotted fields set, checked as if they stood in the file."""
    content = recipe.model_dump(mode="json")
    for field, value in values.items():
        section, _, key = field.partition(".")
        if key not in content.get(section, {}):
            raise RecipeError(f"tune.space: there is no field '{field}' in a recipe")
        content[section][key] = value
    try:
        return Recipe.model_validate(content)
    except ValueError as error:
        problem = str(error).splitlines()[2].strip() if len(str(error).splitlines()) > 2 else error
        raise RecipeError(f"tune.space: {', '.join(values)}: {problem}") from None


def domain(choice: list[Any] | dict[str, float]) -> Any:
    """Turn a choice of the recipe into Ray Tune's search space."""
    if isinstance(choice, list):
        return ray_tune.choice(choice)
    make: Callable[[float, float], Any] = (
        ray_tune.loguniform if choice.get("log") else ray_tune.uniform
    )
    return make(choice["low"], choice["high"])


def scheduler(section: TuneSection, total_steps: int) -> Any:
    """Build the early-stopping rule; steps are its clock, of which `total_steps` is an estimate.

    Trials are compared at a quarter, a half and the whole of them. What ends a trial is the trial
    itself: `max_t` is out of its reach, for it would end one whose steps are a few more.
    """
    if section.scheduler == "none":
        return None
    return ray_tune.schedulers.ASHAScheduler(
        time_attr="step", max_t=2 * total_steps, grace_period=max(1, total_steps // 4),
        reduction_factor=2,
    )  # fmt: skip


class Lines(ray_tune.Callback):  # type: ignore[misc]
    """Prints a line when a trial starts, moves on, ends or fails."""

    def __init__(self, screen: Screen, section: TuneSection, total_steps: int) -> None:
        self.screen: Screen | None = screen
        self.section, self.total_steps = section, total_steps

    def __getstate__(self) -> dict[str, Any]:
        """Leave the screen out of what Ray Tune writes down; a copy prints nothing."""
        return {**self.__dict__, "screen": None}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Event, **_: Any
    ) -> None:
        """Print progress at the sweep's logging interval."""
        step = result["step"]
        if self.screen is None:
            return
        if step in (1, self.total_steps) or step % self.screen.log_every == 0:
            value = result.get(self.section.metric)
            text = f"{self.section.metric} {value:.4f}" if value is not None else ""
            self.screen.line(
                f"trial {trial.trial_id} | {words(trial.config)} | "
                f"step {step}/~{self.total_steps} | {text}"
            )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        """Say which trial failed."""
        if self.screen is not None:
            self.screen.line(f"trial {trial.trial_id} | {words(trial.config)} | failed")


def ranked(grid: Any, section: TuneSection, folder: RunFolder) -> list[Trial]:
    """Order trials by their last metric, failed ones last."""
    found = []
    for number, result in enumerate(grid):
        metrics = result.metrics or {}
        value, step = metrics.get(section.metric), int(metrics.get("step", 0))
        trial_id = str(metrics.get("trial_id", Path(result.path).name.removeprefix("trial_")))
        path = folder.path / "trials" / trial_id
        begun = (path / "run.json").is_file()
        done = begun and RunFolder(path).info().get("status") == "done"
        state = "done" if done else "stopped early"
        if result.error is not None:
            state = "failed: " + str(result.error).strip().splitlines()[-1][:120]
        if state != "done" and begun:
            RunFolder(path).update(status=state)
        found.append(Trial(number, dict(result.config or {}), value, step, state, path))
    sign = 1 if section.mode == "min" else -1
    return sorted(
        found,
        key=lambda t: (t.state != "done", math.inf if t.metric is None else sign * t.metric),
    )


def keep_best(recipe: Recipe, trials: list[Trial], folder: RunFolder) -> Trial:
    """Write the leaderboard, the best trial's recipe and its adapter."""
    for trial in trials:
        append_jsonl(folder.path / "leaderboard.jsonl", {
            "trial": trial.number, **trial.values, recipe.tune.metric: trial.metric,
            "steps": trial.step, "state": trial.state, "folder": str(trial.folder),
        })  # fmt: skip
    best = trials[0]
    if best.state != "done":
        folder.update(status="failed")
        raise TrainingError(f"no trial finished; the first one: {best.state}; see {folder.log}")
    (folder.path / "best.yaml").write_text(
        (best.folder / "recipe.yaml").read_text(encoding="utf-8"), encoding="utf-8"
    )
    result = RunFolder(best.folder).adapter
    if not result.is_dir():
        result = RunFolder(best.folder).model
    shutil.copytree(result, folder.path / "best")
    return best


def leaderboard(recipe: Recipe, trials: list[Trial]) -> Table:
    """Lay out the trials, best first."""
    table = Table(title="leaderboard", title_justify="left")
    for column in ["", *recipe.tune.space, recipe.tune.metric, "steps", "state"]:
        table.add_column(column)
    for place, trial in enumerate(trials, start=1):
        metric = "-" if trial.metric is None else f"{trial.metric:.4f}"
        values = [_short(trial.values.get(k)) for k in recipe.tune.space]
        table.add_row(str(place), *values, metric, str(trial.step), trial.state)
    return table


def print_space(recipe: Recipe) -> None:
    """Print what a sweep would try."""
    table = Table(title=f"{recipe.tune.trials} trials", title_justify="left")
    table.add_column("field")
    table.add_column("values")
    for field, choice in recipe.tune.space.items():
        table.add_row(
            field,
            ", ".join(map(_short, choice))
            if isinstance(choice, list)
            else f"{choice['low']:g} to {choice['high']:g}"
            + (", log scale" if choice.get("log") else ""),
        )
    Console().print(table)


def words(config: Event) -> str:
    """Write a trial's values in one line."""
    return " ".join(f"{key.rpartition('.')[2]}={_short(value)}" for key, value in config.items())


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    from raytune_ft.cli import run_verb

    run_verb("tune")
