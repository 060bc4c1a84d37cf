"""Layouts of runs: the same gradient in each of them; a run keeps its own, and steps down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.config.estimates.layout import Choice, Layout, asked, layouts
from raytune_ft.config.estimates.pace import DEVICES
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import MemoryPlanError
from raytune_ft.model.loading import read_config
from raytune_ft.model.memory import Shape
from raytune_ft.training import layouts as of_runs
from raytune_ft.training.batching import StepData, steps
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import Engine, TorchEngine
from raytune_ft.training.guarding import dry_step
from raytune_ft.training.guarding.failures import Retry
from raytune_ft.training.guarding.room import FILE, Room
from raytune_ft.training.laid_out import decoder_layers, lay_out, recompute
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.step import seed_step
from tests.conftest import write_chats
from tests.faults.test_oom import LENGTH, Run, assert_equal, holding, recipe_of

CPU = torch.device("cpu")
MIB = 2**20
LAYERS = 2
"""Of the tiny model."""


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("layouts") / "rows.jsonl", 48)


def asked_for(rows: Path, model: Path, dropout: float = 0.0, **train: Any) -> Recipe:
    sizes = {"micro_batch_size": 1, "accumulation": 4, "max_steps": 3, "on_oom": "stop"}
    recipe = recipe_of(rows, model, **{**sizes, **train})
    return recipe.model_copy(update={"lora": recipe.lora.model_copy(update={"dropout": dropout})})


def every_layout(recipe: Recipe, model: Path) -> list[Layout]:
    counts = Shape(read_config(model)).counts(recipe)
    return [one for one in layouts(recipe, counts) if not one.resident]


def first_step(run: Run) -> StepData:
    return next(steps(run.packs(), run.room, rank=0, workers=1))


def gradients(engine: Engine, data: StepData) -> tuple[dict[str, torch.Tensor], float]:
    """Return the gradient of a step, and its loss."""
    assert isinstance(engine, TorchEngine)
    engine.module.train()
    seed_step(1, 1)
    losses = [float(engine.forward_backward(one, data.n_targets)) for one in data.micro_batches]
    found = {name: p.grad.clone() for name, p in engine.trained.items() if p.grad is not None}
    for parameter in engine.trained.values():
        parameter.grad = None
    return found, sum(losses)


def trained_b(run: Run) -> None:
    """Give the matrices that begin with zeros values, so that every gradient counts."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in run.engine.trained.items():
            if "lora_B" in name:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.05 * drawn)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)], ids=["f32", "f64"]
)
def test_every_layout_has_the_same_loss_and_gradient(
    dtype: torch.dtype, tolerance: float, rows: Path, tiny_model: Path
) -> None:
    recipe = asked_for(rows, tiny_model)
    run = Run(recipe, tiny_model)
    run.engine.module.to(dtype)
    trained_b(run)
    known = every_layout(recipe, tiny_model)
    assert len(known) == 3 * (LAYERS + 1)
    found = []
    for layout in known:
        run.room.micro_batch_size = layout.micro_batch_size
        run.room.accumulation = layout.accumulation
        lay_out(run.engine.module.model, layout)
        data = first_step(run)
        assert len(data.micro_batches) == layout.accumulation
        found.append(gradients(run.engine, data))
    first, loss = found[0]
    assert all(float(gradient.abs().max()) > 0 for gradient in first.values())
    scale = max(float(gradient.abs().max()) for gradient in first.values())
    for other, its in found[1:]:
        assert its == pytest.approx(loss, rel=tolerance)
        assert other.keys() == first.keys()
        for name, gradient in other.items():
            assert float((gradient - first[name]).abs().max()) <= tolerance * scale, name


def test_layers_that_run_again_draw_the_same_dropout(rows: Path, tiny_model: Path) -> None:
    run = Run(asked_for(rows, tiny_model, dropout=0.3), tiny_model)
    trained_b(run)
    data, found = first_step(run), []
    for again in (0, 1, 2, 0):
        recompute(run.engine.module.model, again)
        marks = [one.gradient_checkpointing for one in decoder_layers(run.engine.module)]
        assert marks == [True] * again + [False] * (LAYERS - again)
        found.append(gradients(run.engine, data))
    for other, loss in found[1:]:
        assert loss == found[0][1]
        assert_equal(other, found[0][0])


def test_a_recipe_s_number_of_layers_is_what_an_engine_recomputes(
    rows: Path, tiny_model: Path
) -> None:
    recipe = asked_for(rows, tiny_model)
    for value, layers in ((1, 1), (7, 2), (True, 2), (False, 0), ("auto", 0)):
        model = recipe.model.model_copy(update={"gradient_checkpointing": value})
        engine, _ = build_engine(recipe.model_copy(update={"model": model}), tiny_model, CPU)
        marks = [one.gradient_checkpointing for one in decoder_layers(engine.module)]
        assert sum(marks) == layers


def choice_of(recipe: Recipe, *known: Layout) -> Choice:
    return Choice(known[0], LAYERS, 900 * MIB, 1.0, 2**30, "to test", known[1:], asked(recipe))


WIDE = (Layout(4, 1, 0), Layout(4, 1, 1), Layout(2, 2, 0), Layout(1, 4, 2))


def test_what_does_not_fit_goes_on_in_the_next_smaller_layout(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Whatever `train.on_oom` says: the layout was ours, not the recipe's."""
    recipe = asked_for(rows, tiny_model)
    expected = Run(asked_for(rows, tiny_model, micro_batch_size=2, accumulation=2), tiny_model)
    weights = expected.train()
    run = Run(recipe, tiny_model)
    run.room = Room.of(recipe, tmp_path, run.told.append, choice_of(recipe, *WIDE))
    assert run.room.fitting().train.micro_batch_size == 4
    with holding(run.engine, 2 * LENGTH):
        dry_step.find_room(run.engine, run.room)
        assert_equal(run.train(), weights)
    assert [line.partition("; going on with ")[2] for line in run.told] == [
        "4 packs per pass x 1 pass, the first of 2 layers recomputed instead of "
        "4 packs per pass x 1 pass, no layer recomputed: the same steps",
        "2 packs per pass x 2 passes, no layer recomputed instead of "
        "4 packs per pass x 1 pass, the first of 2 layers recomputed: the same steps",
    ]
    assert run.losses == expected.losses
    again = Room.of(recipe, tmp_path, choice=choice_of(recipe, *WIDE))
    assert again.layout == WIDE[2]
    other = Room.of(recipe, tmp_path, choice=choice_of(recipe, WIDE[1], WIDE[3]))
    assert other.layout == WIDE[1], "another choice begins with its own"
    assert Room.of(recipe, tmp_path).micro_batch_size == 1


def test_a_step_steps_down_to_more_recomputation_and_goes_on(rows: Path, tiny_model: Path) -> None:
    recipe = asked_for(rows, tiny_model, dropout=0.1)
    known = (Layout(1, 4, 0), Layout(1, 4, 2))
    expected = Run(recipe, tiny_model)
    weights = expected.train()
    run = Run(recipe, tiny_model)
    run.room = Room.of(recipe, None, run.told.append, choice_of(recipe, *known))
    with full_unless_recomputed(run.engine):
        assert_equal(run.train(), weights)
    assert (run.losses, len(run.told)) == (expected.losses, 1)
    assert run.told[0].startswith("step 1: a batch of 1 x 48 tokens")


class full_unless_recomputed:  # noqa: N801, used as a block
    """Stand for a device that holds a batch only if all layers run again."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def __enter__(self) -> None:
        def check(_module: Any, _args: Any, _batch: Any) -> None:
            if not all(one.gradient_checkpointing for one in decoder_layers(self.engine.module)):
                raise torch.OutOfMemoryError("CUDA out of memory.")

        self.hook = self.engine.module.register_forward_pre_hook(check, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        self.hook.remove()


def test_the_smallest_layout_that_does_not_fit_ends_the_run(rows: Path, tiny_model: Path) -> None:
    recipe = asked_for(rows, tiny_model)
    run = Run(recipe, tiny_model)
    run.room = Room.of(recipe, None, run.told.append, choice_of(recipe, *WIDE))
    with holding(run.engine, LENGTH - 8), pytest.raises(MemoryPlanError) as caught:
        dry_step.find_room(run.engine, run.room)
    assert len(run.told) == 3
    assert "set model.quantization=nf4; or " in str(caught.value)
    assert "micro_batch_size" not in str(caught.value)


def test_deepspeed_counts_the_passes_of_the_smaller_layout(
    rows: Path, tiny_model: Path, tmp_path: Path
) -> None:
    wide = asked_for(rows, tiny_model, deepspeed="zero2", micro_batch_size=4, accumulation=1)
    run = Run(wide, tiny_model)
    run.room = Room.of(wide, tmp_path, run.told.append, choice_of(wide, *WIDE))
    with holding(run.engine, 2 * LENGTH):
        dry_step.find_room(run.engine, run.room)
        assert run.engine.accumulation == 2  # type: ignore[attr-defined]
        run.train()
    with holding(run.engine, LENGTH), pytest.raises(Retry):
        run.room.take(
            lambda _: run.engine.forward_backward(first_step(run).micro_batches[0], 1),
            run.engine,
            first_step(run),
            1,
        )
    assert Room.of(wide, tmp_path, choice=choice_of(wide, *WIDE)).layout == WIDE[3]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    made = RunFolder(tmp_path / "run")
    made.path.mkdir()
    made.update(status="running")
    yield made


def decided(recipe: Recipe, folder: RunFolder, model: Path, mib: int) -> tuple[Choice, list[str]]:
    told: list[str] = []
    found = of_runs.decided(
        recipe, folder, model, (mib * MIB, mib * MIB), DEVICES["h200"], told.append
    )
    return found, told


def test_a_run_keeps_the_layout_that_it_began_with(
    rows: Path, tiny_model: Path, folder: RunFolder
) -> None:
    recipe = asked_for(rows, tiny_model)
    first, told = decided(recipe, folder, tiny_model, 8000)
    assert told == [f"plan    {first.line}"]
    assert folder.info()["layout"] == json.loads(json.dumps(first.to_json()))
    for mib in (80_000, 4000):  # with more memory too: other sums would round otherwise
        assert decided(recipe, folder, tiny_model, mib) == (first, [])
    again, told = decided(
        recipe.model_copy(update={"run": recipe.run.model_copy(update={"workers": 2})}),
        folder, tiny_model, 8000,
    )  # fmt: skip
    assert again.asked["workers"] == 2
    assert len(told) == 1


def test_a_smaller_gpu_is_told_of_and_gets_another_layout(
    rows: Path, tiny_model: Path, folder: RunFolder
) -> None:
    recipe = asked_for(rows, tiny_model, micro_batch_size=64, accumulation=64)
    first, _ = decided(recipe, folder, tiny_model, 8000)
    small = first.memory // MIB - 1
    second, told = decided(recipe, folder, tiny_model, small)
    assert second.memory < first.memory
    assert second.layout != first.layout
    assert told[0].startswith(f"this run began with {first.layout.said(LAYERS)}, about ")
    assert told[0].endswith("the same steps, not the same bytes")
    assert told[1] == f"plan    {second.line}"
    assert Choice.from_json(folder.info()["layout"]) == second


def test_a_cpu_and_a_recipe_that_lays_itself_out_have_no_layout(
    rows: Path, tiny_model: Path, folder: RunFolder
) -> None:
    recipe = asked_for(rows, tiny_model)
    settled = of_runs.settled(recipe, folder, tiny_model, CPU, pytest.fail)
    own = asked_for(rows, tiny_model, layout="recipe")
    on_gpu = of_runs.settled(own, folder, tiny_model, torch.device("cuda"), pytest.fail)
    assert settled is None and on_gpu is None
    assert "layout" not in folder.info()
    assert Room.of(recipe, folder.path).fitting() == recipe
    assert not (folder.path / FILE).exists()
