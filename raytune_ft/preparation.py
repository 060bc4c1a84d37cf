"""From a recipe to a run that can start: model folder, counted rows, known steps, run folder.

Shared by training and sweeps. What fails here fails before a worker starts, and leaves nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from raytune_ft import export
from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources, stream
from raytune_ft.data.packing import Pack, Plan, Position, count_steps
from raytune_ft.data.sources import RowSource
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Encoder, Measurement, Report, make_plan, nothing_left
from raytune_ft.errors import DataError, RecipeError
from raytune_ft.model import loading
from raytune_ft.screen import Screen
from raytune_ft.training import mmlu
from raytune_ft.training.run_folder import RunFolder, write_json
from raytune_ft.training.worker import Job


@dataclass(frozen=True)
class Rows:
    """Rows of one kind, ready to be streamed."""

    source: RowSource
    encoder: Encoder
    plan: Plan

    def packs(self, start: Position) -> Iterator[tuple[Position, Pack]]:
        """Stream packs of all epochs from `start` on, through Ray Data."""
        return stream.packs(self.source, self.encoder, self.plan, start)

    def once(self) -> Iterator[Pack]:
        """Yield the packs of one epoch."""
        for _, pack in stream.packs(self.source, self.encoder, self.plan, epochs=1):
            yield pack


@dataclass(frozen=True)
class Prepared:
    """A run that can start: what each worker is told, and where its packs come from."""

    job: Job
    train: Rows
    validation: Rows | None


def prepare(recipe: Recipe, folder: RunFolder, source: str, screen: Screen) -> Prepared:
    """Find the model, count the rows with Ray Data, and write the run folder's first files.

    Ray must be running. Raises RecipeError, ModelError or DataError with one line each.
    """
    mmlu_files = mmlu.absolute(recipe.chat_eval.mmlu)
    for path in recipe.chat_eval.mmlu:
        mmlu.read_benchmark(path)  # a bad row ends the run here, not after the first epoch
    screen.stage("model folder")
    model_folder = loading.prepare_folder(recipe.model.path, log=screen.line)
    tokenizer = TextTokenizer.from_folder(model_folder, recipe.model.eos_token)
    encoder = Encoder(tokenizer, recipe.model.template, recipe.data)
    rows = sources.open_sources(recipe.data, recipe.train.seed)
    training, held_out = sources.split_validation(rows, recipe.data, recipe.train.seed)
    measured = measure(training, encoder, screen)
    train = Rows(training, encoder, make_plan(measured, recipe.data, recipe.train.seed))
    if not train.plan.n_windows:
        raise DataError(nothing_left(measured.report))
    validation = _held_out(held_out, encoder, recipe, screen) if held_out is not None else None
    total_steps = count_steps(train.plan, recipe)

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
        total_steps=total_steps,
    )
    record = record_of(measured.report, train.plan, total_steps)
    formats = [str(found) for found in rows.recognised]
    write_json(folder.path / "data.json", {**record, "formats": formats})
    chat_eval = resolved.chat_eval.model_copy(update={"mmlu": mmlu_files})
    job = Job(
        resolved.model_copy(update={"chat_eval": chat_eval}).model_dump(mode="json"),
        str(folder.path),
        str(model_folder),
        total_steps,
        recipe.run.workers,
    )
    return Prepared(job, train, validation)


def record_of(report: Report, plan: Plan, total_steps: int) -> dict[str, Any]:
    """Write down what became of the rows; nothing is dropped without a line here."""
    packs = plan.n_packs(0)
    lost = plan.lost_tokens
    density = round((report["tokens"] - lost) / (packs * plan.max_length), 4)
    counts = {"packs": packs, "density": density, "steps": total_steps}
    return {**report, **counts, **({"lost_tokens": lost} if lost else {})}


def _held_out(rows: RowSource, encoder: Encoder, recipe: Recipe, screen: Screen) -> Rows:
    # the reference packs no held-out rows: each counts alone, under data.compat as well
    still = recipe.data.model_copy(update={"shuffle_before_pack": False, "compat": None})
    measured = measure(rows, encoder, screen)
    return Rows(rows, encoder, make_plan(measured, still, recipe.train.seed))


def measure(rows: RowSource, encoder: Encoder, screen: Screen) -> Measurement:
    """Count tokens of all rows with Ray Data, showing progress."""
    screen.stage("data", 0, len(rows))
    return stream.measure(rows, encoder, lambda done, total: screen.stage("data", done, total))


def new_folder(recipe: Recipe, source: str) -> RunFolder:
    """Make an empty folder for a new run; RecipeError if that run exists."""
    now = datetime.now().astimezone()
    name = recipe.run.name or f"{loader.recipe_stem(source)}_{now:%Y%m%d_%H%M%S}"
    path = Path(recipe.run.storage).expanduser().resolve() / name
    if path.exists():
        raise RecipeError(
            f"run.name: '{path}' exists; go on with it by --resume {path}, or choose another name"
        )
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise RecipeError(f"run.storage: '{path}' cannot be made: {error.strerror}") from None
    return RunFolder(path)


@contextmanager
def removed_unless_started(folder: RunFolder) -> Iterator[None]:
    """Leave nothing behind when a run ends before it began to write its record."""
    try:
        yield
    except BaseException:
        if not folder.run_json.is_file():
            shutil.rmtree(folder.path, ignore_errors=True)
            if folder.path.parent.is_dir() and not any(folder.path.parent.iterdir()):
                folder.path.parent.rmdir()
        raise
