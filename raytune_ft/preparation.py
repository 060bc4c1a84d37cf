"""From a recipe to a run that can start: model folder, counted rows, known steps, run folder.

Shared by training and sweeps. What fails here fails before a worker starts, and leaves nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from raytune_ft import export
from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources, stream
from raytune_ft.data.counting import Estimate, estimate
from raytune_ft.data.examples import Encoder
from raytune_ft.data.feeder import Rows
from raytune_ft.data.questions import held_out_questions
from raytune_ft.data.report import Report, nothing_left
from raytune_ft.data.sources import RowSource
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Measurement, make_feed
from raytune_ft.errors import DataError
from raytune_ft.model import loading
from raytune_ft.model.memory import trained_parameters
from raytune_ft.screen import Screen
from raytune_ft.training.evaluating import answer_metrics, mmlu
from raytune_ft.training.guarding import disk
from raytune_ft.training.run_folder import RunFolder, write_json
from raytune_ft.training.saving import load_from
from raytune_ft.training.watching import trackers
from raytune_ft.training.worker import Job


@dataclass(frozen=True)
class Prepared:
    """A run that can start: what each worker is told, and the rows that it is fed with."""

    job: Job
    train: Rows
    validation: Rows | None

    @property
    def kinds(self) -> dict[str, Rows]:
        """The rows by their kinds, as `feeder.feeding` takes them."""
        kinds = {"train": self.train, "validation": self.validation}
        return {kind: rows for kind, rows in kinds.items() if rows is not None}


def prepare(recipe: Recipe, folder: RunFolder, source: str, screen: Screen) -> Prepared:
    """Find the model, count the rows with Ray Data, and write the run folder's first files.

    Ray must be running. Raises RecipeError, ModelError or DataError with one line each.
    """
    answer_metrics.check_installed(recipe.eval.metrics)
    trackers.check_installed(recipe.run.trackers)
    mmlu_files = mmlu.absolute(recipe.chat_eval.mmlu)
    for path in recipe.chat_eval.mmlu:
        mmlu.read_benchmark(path)  # a bad row ends the run here, not after the first epoch
    screen.stage("model folder")
    model_folder = loading.prepare_folder(recipe.model.path, log=screen.line)
    tokenizer = TextTokenizer.from_folder(
        model_folder, recipe.model.eos_token, recipe.model.new_tokens
    )
    encoder = Encoder.of(recipe, tokenizer)
    begin = load_from.prepare(recipe, model_folder, folder)
    rows = sources.open_sources(recipe.data, recipe.train.seed)
    training, held_out = sources.split_validation(rows, recipe.data, recipe.train.seed)
    compat = recipe.data.compat is not None
    screen.stage("data", 0, len(training))
    measured = measure(training, encoder, screen) if compat else None
    train = make_feed(training, encoder, recipe.train.seed, measured)
    seen = estimate(train)
    if not seen.packs:
        raise DataError(nothing_left(measured.report if measured else seen.report))
    validation = _held_out(held_out, encoder, recipe) if held_out is not None else None
    questions = []
    if held_out is not None and recipe.eval.metrics:
        questions = held_out_questions(held_out, encoder, recipe.eval.rows)
    expected_steps = seen.steps(recipe)
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    disk.check_run(folder.path, recipe, trained_parameters(recipe, config), expected_steps)

    resolved = recipe.model_copy(
        update={"run": recipe.run.model_copy(update={"name": folder.path.name})}
    )
    folder.create(
        folder.path.name,
        loader.dump_yaml(resolved),
        source=source,
        model_folder=str(model_folder),
        template=recipe.model.template,
        system=export.system_of(recipe),
        method=recipe.model.method,
        quantization=recipe.model.quantization,
        double_quant=recipe.model.double_quant,
        eos_token=recipe.model.eos_token,
        new_tokens=recipe.model.new_tokens,
        expected_steps=expected_steps,
        load_from_sha256=begin.sha256 if begin else None,
    )
    record = record_of(measured.report if measured else seen.report, seen, expected_steps)
    formats = [str(found) for found in rows.recognised]
    write_json(folder.path / "data.json", {**record, "formats": formats})
    chat_eval = resolved.chat_eval.model_copy(update={"mmlu": mmlu_files})
    job = Job(
        resolved.model_copy(update={"chat_eval": chat_eval}).model_dump(mode="json"),
        str(folder.path),
        str(model_folder),
        expected_steps,
        compat,
        seen.steps_are_sure(recipe),
        recipe.run.workers,
        training.fingerprint,
        tuple(questions),
        begin,
    )
    return Prepared(job, Rows(train, recipe.train.epochs, tuple(seen.windows)), validation)


def record_of(report: Report, seen: Estimate, expected_steps: int) -> dict[str, Any]:
    """Write down what became of the rows; nothing is dropped without a line here."""
    counts = {"packs": seen.packs, "density": round(seen.density, 4), "steps": expected_steps}
    return {**report, **counts, "exact": seen.exact}


def _held_out(rows: RowSource, encoder: Encoder, recipe: Recipe) -> Rows:
    """Look at held-out rows now: their first use is an epoch away."""
    # the reference packs no held-out rows: each counts alone, under data.compat as well
    still = recipe.data.model_copy(update={"shuffle_before_pack": False, "compat": None})
    feed = make_feed(rows, replace(encoder, data=still), recipe.train.seed)
    seen = estimate(feed)
    if not seen.packs:
        raise DataError(nothing_left(seen.report).replace("data.sources", "data.validation", 1))
    return Rows(feed, made=tuple(seen.windows))


def measure(rows: RowSource, encoder: Encoder, screen: Screen) -> Measurement:
    """Count tokens of all rows with Ray Data, showing progress."""

    def show(done: int, total: int) -> None:
        screen.stage("data", done, total)

    return stream.measure(rows, encoder, show)
