"""What a run does beside optimizing: it changes no weight, and tells what the model says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_ft.config.schema import ModelSection, Recipe
from raytune_ft.data import sources
from raytune_ft.data.encode import encode_prompt
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Pack, Position
from raytune_ft.data.places import Placed, iter_packs
from raytune_ft.data.questions import held_out_questions
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.model.adapter import load_adapter
from raytune_ft.model.generate import stream_ids
from raytune_ft.model.loading import load_model
from raytune_ft.training import worker
from raytune_ft.training.callbacks import FIRST_TOKENS
from raytune_ft.training.evaluating import answer_metrics
from raytune_ft.training.run_folder import RunFolder, read_jsonl, write_json
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.worker import Job
from tests import runs
from tests.conftest import write_chats

PROMPTS = ["what is red?", "and {colour}?"]
LONGEST = 60


@pytest.fixture(scope="module")
def recipe(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two epochs of a few steps at a rate that overfits; dropout on, held-out rows, no prompts."""
    rows = write_chats(tmp_path_factory.mktemp("rows") / "train.jsonl", 30)
    return Recipe.model_validate({
        "model": {"path": str(tiny_model)},
        "lora": {"r": 8, "alpha": 64, "dropout": 0.1},
        "data": {
            "sources": [{"path": str(rows)}], "max_length": 96, "window": 16, "validation": 0.2,
            "fill": {"colour": "blue"},
        },
        "train": {
            "epochs": 2, "accumulation": 2, "lr": 5e-2, "deepspeed": "none",
            "scheduler": "constant",
        },
        "checkpoint": {"every": 1, "keep": -1},
        "chat_eval": {"every": None},
        "run": {"trackers": []},
    })  # fmt: skip


def changed(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with fields of its sections set, checked as a whole."""
    content = recipe.model_dump(mode="json")
    for section, fields in sections.items():
        content[section] |= fields
    return Recipe.model_validate(content)


def asking(recipe: Recipe, temperature: float = 0.9) -> Recipe:
    return changed(
        recipe,
        chat_eval={
            "every": 2, "prompts": PROMPTS, "max_new_tokens": LONGEST,
            "temperature": temperature, "top_p": 0.9,
        },
        eval={"every": 2, "metrics": ["exact_match", "chrf", "rouge"], "rows": 4,
              "max_new_tokens": 8},
    )  # fmt: skip


def train(recipe: Recipe, folder: Path) -> RunFolder:
    """Run a worker to the end, as `preparation` and the trainer would."""
    seed = recipe.train.seed
    tokenizer = TextTokenizer.from_folder(recipe.model.path)
    encoder = Encoder.of(recipe, tokenizer)
    rows, held_out = sources.split_validation(
        sources.open_sources(recipe.data, seed), recipe.data, seed
    )
    assert held_out is not None
    feed, kept = make_feed(rows, encoder, seed), make_feed(held_out, encoder, seed)
    run = RunFolder(folder)
    run.path.mkdir(parents=True, exist_ok=True)
    write_json(run.path / "data.json", {"rows": 1, "used": 1, "formats": ["openai"], "steps": 9})

    def packs(start: Position) -> Iterator[Placed]:
        return iter_packs(feed, start, epochs=recipe.train.epochs)

    def validation() -> Iterator[Pack]:
        return (placed.pack for placed in iter_packs(kept, Position(), epochs=1))

    questions = ()
    if recipe.eval.metrics:
        questions = tuple(held_out_questions(held_out, encoder, recipe.eval.rows))
    job = Job(
        recipe.model_dump(mode="json"), str(run.path), recipe.model.path, expected_steps=9,
        sharing=64, data_fingerprint="sha-1", questions=questions,
    )  # fmt: skip
    worker.run(job, packs, validation, lambda _: None)
    return run


@pytest.fixture(scope="module")
def silent(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(recipe, tmp_path_factory.mktemp("silent") / "run")


@pytest.fixture(scope="module")
def asked(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(asking(recipe), tmp_path_factory.mktemp("asked") / "run")


def weights_of(run: RunFolder) -> str:
    return runs.sha256(run.path / "adapter/adapter_model.safetensors")


def test_asking_and_measuring_change_no_bit_of_the_weights(
    silent: RunFolder, asked: RunFolder
) -> None:
    assert weights_of(asked) == weights_of(silent)
    losses = [[line["loss"] for line in read_jsonl(run.metrics)] for run in (silent, asked)]
    assert losses[0] == losses[1]


def test_every_answer_is_told_with_its_kind_tokens_and_end(asked: RunFolder) -> None:
    lines = list(read_jsonl(asked.samples))
    last = list(read_jsonl(asked.metrics))[-1]["step"]
    moments = [(0, "before"), *((s, "step") for s in range(2, last, 2)), (last, "after")]
    filled = ["what is red?", "and blue?"]
    expected = [
        (step, when, kind, prompt)
        for step, when in moments
        for kind in ("greedy", "sampled")
        for prompt in filled
    ]
    assert [(e["step"], e["when"], e["kind"], e["prompt"]) for e in lines] == expected
    for line in lines:
        limit = FIRST_TOKENS if line["when"] == "before" else LONGEST
        assert line["stopped"] == ("length" if line["tokens"] == limit else "end")
        assert line["tokens"] <= limit
    drawn = [e["answer"] for e in lines if e["kind"] == "sampled"]
    assert drawn != [e["answer"] for e in lines if e["kind"] == "greedy"]
    assert len({e["answer"] for e in lines if e["prompt"] == "and blue?"}) > 2


def test_the_last_greedy_answers_are_those_of_the_exported_adapter(
    recipe: Recipe, asked: RunFolder
) -> None:
    folder = Path(recipe.model.path)
    model: Any = load_model(folder, ModelSection(path=str(folder)), torch.device("cpu"))
    model = load_adapter(model, asked.adapter)
    tokenizer = TextTokenizer.from_folder(folder)
    template = get_template("tokenizer", tokenizer)
    told = [e for e in read_jsonl(asked.samples) if e["when"] == "after" and e["kind"] == "greedy"]
    for line in told:
        ids = encode_prompt([{"role": "user", "content": line["prompt"]}], template, tokenizer)
        found = stream_ids(model, ids, stop_ids=template.stop_ids, max_new_tokens=LONGEST)
        assert tokenizer.decode(list(found)).strip() == line["answer"]


def test_a_run_taken_up_again_tells_and_measures_the_same(
    recipe: Recipe, asked: RunFolder, tmp_path: Path
) -> None:
    """Drawn answers as well: their random state is of the step and the prompt."""
    folder = tmp_path / "run"
    shutil.copytree(asked.path, folder)
    shutil.rmtree(folder / "adapter")
    for path in (folder / "checkpoints").glob("step_*"):
        if int(path.name.rpartition("_")[2]) > 3:
            shutil.rmtree(path)
    again = train(asking(recipe), folder)
    for name in ("samples.jsonl", "evaluations.jsonl"):
        assert (again.path / name).read_text() == (asked.path / name).read_text(), name
    measured = [
        [{k: v for k, v in e.items() if k.startswith("val_")} for e in read_jsonl(run.metrics)]
        for run in (again, asked)
    ]
    assert measured[0] == measured[1]
    assert again.info()["best"] == asked.info()["best"]


def test_held_out_answers_are_written_down_with_what_they_are_compared_with(
    recipe: Recipe, asked: RunFolder
) -> None:
    lines = list(read_jsonl(asked.evaluations))
    steps = [e for e in read_jsonl(asked.metrics) if e["val_loss"] is not None]
    assert [e["step"] for e in lines] == [s["step"] for s in steps for _ in range(4)]
    for step in steps:
        here = [e for e in lines if e["step"] == step["step"]]
        assert [e["row"] for e in here] == [0, 1, 2, 3]
        assert all(e["prompt"].endswith("<|im_start|>assistant\n") for e in here)
        assert all(e["tokens"] <= 8 and e["wanted"] for e in here)
        expected = answer_metrics.score(
            ["exact_match", "chrf", "rouge"],
            [e["answer"] for e in here], [e["wanted"] for e in here],
        )  # fmt: skip
        assert {key: step[key] for key in expected} == expected
    assert (
        len({json.dumps([e["answer"] for e in lines if e["step"] == s["step"]]) for s in steps}) > 1
    )


def test_the_best_weights_are_exported_and_the_run_says_which(
    recipe: Recipe, silent: RunFolder, tmp_path: Path
) -> None:
    """At this rate the held-out loss soon rises, so the best step is not the last."""
    wanted = {"every": 1, "export": "best"}
    run = train(changed(recipe, eval=wanted, checkpoint={"every": 1, "keep": 1}), tmp_path / "run")
    lines = list(read_jsonl(run.metrics))
    losses = {e["step"]: e["val_loss"] for e in lines}
    best = min(losses, key=lambda step: losses[step])
    assert best != lines[-1]["step"], "the test wants a run that overfits"
    info = run.info()
    assert info["best"] == {"metric": "val_loss", "step": best, "value": losses[best]}
    assert (info["exported_step"], info["stopped_early"]) == (best, False)
    assert weights_of(run) != weights_of(silent)
    kept = checkpoint.load(run.checkpoints / checkpoint.folder_name(best)).weights
    exported = load_file(run.adapter / "adapter_model.safetensors")
    found = {name.removeprefix("model.").replace(".default", ""): t for name, t in kept.items()}
    assert found.keys() == exported.keys()
    assert all(torch.equal(found[name], exported[name]) for name in exported)
    assert silent.info()["exported_step"] == lines[-1]["step"]


def test_patience_ends_a_run_and_its_last_checkpoint_is_that_step(
    recipe: Recipe, tmp_path: Path
) -> None:
    wanted = {"every": 1, "patience": 2}
    run = train(changed(recipe, eval=wanted), tmp_path / "run")
    lines = list(read_jsonl(run.metrics))
    losses = [e["val_loss"] for e in lines]
    best = losses.index(min(losses)) + 1
    info = run.info()
    assert info["stopped_early"] is True
    assert lines[-1]["step"] == best + 2 == info["exported_step"]
    assert info["best"]["step"] == best
    assert lines[-1]["share"] == 1.0 and lines[-1]["exact"]
