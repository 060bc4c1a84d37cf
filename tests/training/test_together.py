"""Adapters on one base: each as if it were alone, whoever is beside it and whoever leaves."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Position
from raytune_ft.data.places import Placed, iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.errors import Interrupted, RecipeError
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training import worker
from raytune_ft.training.guarding.guards import Guards
from raytune_ft.training.run_folder import Event, RunFolder, read_jsonl, write_json
from raytune_ft.training.together import Outcome, run_together
from raytune_ft.training.worker import Job

TRIALS: list[dict[str, dict[str, Any]]] = [
    {"lora": {"r": 4, "alpha": 8}, "train": {"lr": 5e-3}},
    {"lora": {"r": 2, "alpha": 16}, "train": {"lr": 1e-3, "weight_decay": 0.1, "max_norm": 0.3}},
    {
        "lora": {"r": 8, "alpha": 8, "dropout": 0.3},
        "train": {"lr": 2e-3, "betas": [0.8, 0.9], "scheduler": "linear", "warmup_steps": 2},
    },
]
BASE: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.1},
    "data": {"max_length": 96, "window": 16},
    "train": {
        "epochs": 2, "accumulation": 2, "micro_batch_size": 2, "deepspeed": "none", "max_steps": 6,
    },
    "checkpoint": {"every": 2, "keep": -1},
    "chat_eval": {"every": None},
    "run": {"trackers": []},
}  # fmt: skip
STEPS = 6


def recipes_of(folder: Path, rows: Path, **changes: dict[str, Any]) -> list[Recipe]:
    shared = {**BASE, "model": {"path": str(folder)}}
    shared["data"] = {**BASE["data"], "sources": [{"path": str(rows)}]}
    made = []
    for trial in TRIALS:
        parts = (shared, trial, changes)
        sections = {section for part in parts for section in part}
        content = {
            section: {k: v for part in parts for k, v in part.get(section, {}).items()}
            for section in sections
        }
        made.append(Recipe.model_validate(content))
    return made


class Rows:
    """Packs of a recipe's rows."""

    def __init__(self, recipe: Recipe) -> None:
        source = sources.open_sources(recipe.data, recipe.train.seed)
        tokenizer = TextTokenizer.from_folder(recipe.model.path)
        self.feed = make_feed(source, Encoder.of(recipe, tokenizer), recipe.train.seed)
        self.epochs = recipe.train.epochs

    def packs(self, start: Position) -> Iterator[Placed]:
        return iter_packs(self.feed, start, epochs=self.epochs)

    def held_out(self) -> list[Any]:
        return [placed.pack for placed in iter_packs(self.feed, Position(), epochs=1)][:3]


def job_of(recipe: Recipe, folder: Path) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "data.json", {"rows": 1, "used": 1, "formats": ["openai"], "steps": 9})
    content = recipe.model_dump(mode="json")
    return Job(content, str(folder), recipe.model.path, STEPS, sharing=64)


def alone(recipes: Sequence[Recipe], folder: Path) -> list[RunFolder]:
    rows = Rows(recipes[0])
    for place, recipe in enumerate(recipes):
        job = job_of(recipe, folder / str(place))
        worker.run(job, rows.packs, rows.held_out, lambda event: None)
    return [RunFolder(folder / str(place)) for place in range(len(recipes))]


def together(
    recipes: Sequence[Recipe],
    folder: Path,
    report: Any = lambda place, event: True,
    *,
    at_once: int,
    guards: Guards = Guards(),  # noqa: B008, frozen
) -> tuple[list[RunFolder], list[Outcome]]:
    rows = Rows(recipes[0])
    jobs = [job_of(recipe, folder / str(place)) for place, recipe in enumerate(recipes)]
    found = run_together(jobs, rows.packs, rows.held_out, report, guards, at_once=at_once)
    return [RunFolder(job.run_path) for job in jobs], found


def losses(run: RunFolder) -> list[tuple[int, float, float | None]]:
    return [(e["step"], e["loss"], e["val_loss"]) for e in read_jsonl(run.metrics)]


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(run.adapter / "adapter_model.safetensors")
    return found


def assert_alike(run: RunFolder, other: RunFolder, tolerance: float = 0.0) -> None:
    for mine, theirs in zip(losses(run), losses(other), strict=True):
        assert mine == pytest.approx(theirs, abs=tolerance)
    theirs_by_name = weights(other)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, theirs_by_name[name], rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def recipes(tiny_model: Path, chats: Path) -> list[Recipe]:
    return recipes_of(tiny_model, chats)


@pytest.fixture(scope="module")
def lone(recipes: list[Recipe], tmp_path_factory: pytest.TempPathFactory) -> list[RunFolder]:
    return alone(recipes, tmp_path_factory.mktemp("lone"))


@pytest.mark.parametrize("at_once", [1, 2])
def test_each_is_as_if_alone(
    recipes: list[Recipe], lone: list[RunFolder], tmp_path: Path, at_once: int
) -> None:
    runs, found = together(recipes, tmp_path, at_once=at_once)
    assert all(outcome.is_done for outcome in found)
    for run, other in zip(runs, lone, strict=True):
        assert len(losses(run)) == STEPS
        assert_alike(run, other, 0.0 if at_once == 1 else 1e-5)


def test_the_fast_path_is_so_too(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    """Its masks come from counters, here of each trial's own rows."""
    fast = recipes_of(tiny_model, chats, model={"fast_path": True}, train={"max_steps": 3})
    lone = alone(fast, tmp_path / "lone")
    runs, _ = together(fast, tmp_path / "together", at_once=3)
    for run, other in zip(runs, lone, strict=True):
        assert len(losses(run)) == 3
        assert_alike(run, other, 1e-5)


def test_an_nf4_base_is_shared(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    packed = recipes_of(
        tiny_model,
        chats,
        model={"quantization": "nf4"},
        train={"max_steps": 2},
    )
    lone = alone(packed, tmp_path / "lone")
    runs, _ = together(packed, tmp_path / "together", at_once=3)
    for run, other in zip(runs, lone, strict=True):
        assert_alike(run, other, 1e-5)


def test_one_that_is_given_up_is_not_missed(
    recipes: list[Recipe], lone: list[RunFolder], tmp_path: Path
) -> None:
    """Its memory is free, and those beside it go on as before, to the bit."""
    held: list[weakref.ref[torch.Tensor]] = []
    left: list[int] = []

    def report(place: int, event: Event) -> bool:
        if event["kind"] == "step" and place == 0:
            gc.collect()
            left.append(sum(tensor() is not None for tensor in held))
        if event["kind"] == "step" and place == 1 and not held:
            held.extend(weakref.ref(p) for p in adapters_of_rank(recipes[1].lora.r))
        return not (event["kind"] == "step" and place == 1 and event["step"] == 3)

    runs, found = together(recipes, tmp_path, report, at_once=3)
    assert [outcome.is_given_up for outcome in found] == [False, True, False]
    assert losses(runs[1]) == losses(lone[1])[:3]
    assert not runs[1].adapter.exists()
    assert len(held) == 28
    assert left[1] == 28
    assert left[3:] == [0, 0, 0]
    for place in (0, 2):
        assert_alike(runs[place], lone[place])


def adapters_of_rank(r: int) -> list[torch.Tensor]:
    """Find the matrices of adapters of a rank among all objects there are."""
    return [
        p
        for p in gc.get_objects()
        if isinstance(p, torch.nn.Parameter) and p.requires_grad and p.ndim == 2 and r in p.shape
    ]


def test_a_group_that_was_killed_goes_on_each_from_its_own_checkpoint(
    recipes: list[Recipe], lone: list[RunFolder], tmp_path: Path
) -> None:
    """Between two saves of one step, so that they are at different steps; one has ended."""
    for place, step in enumerate((4, 2, STEPS)):
        folder = tmp_path / str(place)
        shutil.copytree(lone[place].path, folder)
        shutil.rmtree(folder / "adapter")
        for path in (folder / "checkpoints").iterdir():
            if int(path.name.rpartition("_")[2]) > step:
                shutil.rmtree(path)
    runs, found = together(recipes, tmp_path, at_once=3)
    assert all(outcome.is_done for outcome in found)
    for run, other in zip(runs, lone, strict=True):
        assert_alike(run, other)


def test_one_that_fails_fails_alone(
    recipes: list[Recipe], lone: list[RunFolder], tmp_path: Path
) -> None:
    train = recipes[1].train.model_copy(update={"lr": 1e30})
    wild = recipes[1].model_copy(update={"train": train})
    runs, found = together([recipes[0], wild, recipes[2]], tmp_path, at_once=3)
    assert found[1].error is not None
    assert "loss is nan" in str(found[1].error)
    assert [outcome.is_done for outcome in found] == [True, False, True]
    for place in (0, 2):
        assert_alike(runs[place], lone[place])


def test_all_stop_behind_a_checkpoint_and_go_on(
    recipes: list[Recipe], lone: list[RunFolder], tmp_path: Path
) -> None:
    seen: list[int] = []

    def report(place: int, event: Event) -> bool:
        if event["kind"] == "step" and place == 2:
            seen.append(event["step"])
        return True

    guards = Guards(lambda: 3 in seen)
    _, found = together(recipes, tmp_path, report, at_once=3, guards=guards)
    assert all(isinstance(outcome.error, Interrupted) for outcome in found)
    assert [outcome.state.step for outcome in found] == [3, 3, 3]
    runs, _ = together(recipes, tmp_path, report, at_once=3)
    assert seen == [1, 2, 3, 4, 5, 6]
    for run, other in zip(runs, lone, strict=True):
        assert_alike(run, other)


def test_where_memory_ends_fewer_go_together(
    recipes: list[Recipe],
    lone: list[RunFolder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the second micro-batch, when some gradients are there already."""
    forward, calls = TokenLoss.token_losses, [0]

    def limited(loss: TokenLoss, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        found = forward(loss, input_ids, *args, **kwargs)
        if calls[0] > 1 and len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(TokenLoss, "token_losses", limited)
    runs, found = together(recipes, tmp_path, at_once=3)
    assert all(outcome.is_done for outcome in found)
    for run, other in zip(runs, lone, strict=True):
        assert_alike(run, other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"max_length": 64}}, "data.max_length: has several values"),
        ({"train": {"seed": 7}}, "train.seed: has several values"),
        ({"lora": {"use_dora": True}}, "lora.use_dora True: its trials cannot share a base"),
        ({"lora": {"init_lora_weights": "pissa"}}, "lora.init_lora_weights 'pissa'"),
    ],
)
def test_what_cannot_share_is_refused(
    recipes: list[Recipe], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    content = recipes[1].model_dump(mode="json")
    for section, fields in changes.items():
        content[section] |= fields
    with pytest.raises(RecipeError, match=words):
        together([recipes[0], Recipe.model_validate(content)], tmp_path, at_once=2)
