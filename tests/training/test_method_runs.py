"""Runs with every method: taken up again they end with the same bytes; results answer alike."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from raytune_ft import convert, export
from raytune_ft.chat.model import open_chat
from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Position
from raytune_ft.data.places import Placed, iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.training import worker
from raytune_ft.training.run_folder import RunFolder, write_json
from raytune_ft.training.worker import Job
from tests.conftest import make_tiny_model, write_chats

TOKENS = ["<call>", "</call>", "zyx"]
IDS = [*range(3, 20), 297, 5, 299, 298]
"""New tokens among others, as ids of the tiny model with `TOKENS` behind its 297."""

PLAIN = """
import sys, torch, warnings
warnings.simplefilter("ignore")
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel
ids, out = [int(i) for i in sys.argv[1].split(",")], {}
for name, base, adapter in zip(*[iter(sys.argv[3:])] * 3):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter != "-":
        tokenizer = AutoTokenizer.from_pretrained(adapter)
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        out[name] = model.eval()(torch.tensor([ids])).logits
save_file(out, sys.argv[2])
"""


def recipe_of(base: Path, rows: Path, **changes: dict[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(base)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"sources": [{"path": str(rows)}], "max_length": 96, "window": 16},
        "train": {"max_steps": 4, "accumulation": 3, "lr": 2e-2, "deepspeed": "none"},
        "checkpoint": {"every": 1, "keep": -1},
        "chat_eval": {"every": None},
        "run": {"trackers": []},
    }
    for name, change in changes.items():
        sections[name] = {**sections[name], **change}
    return Recipe.model_validate(sections)


def train(recipe: Recipe, folder: Path) -> RunFolder:
    """Run a worker to the end, as `preparation` and the trainer would."""
    section = recipe.model
    tokenizer = TextTokenizer.from_folder(section.path, section.eos_token, section.new_tokens)
    feed = make_feed(
        sources.open_sources(recipe.data, recipe.train.seed), Encoder.of(recipe, tokenizer), 42
    )
    run = RunFolder(folder)
    if not run.run_json.is_file():
        run.create(
            "run", loader.dump_yaml(recipe), model_folder=section.path, template=section.template,
            system="", quantization=section.quantization, double_quant=section.double_quant,
            new_tokens=section.new_tokens,
        )  # fmt: skip
        write_json(folder / "data.json", {"rows": 1, "used": 1, "formats": [], "steps": 9})

    def packs(start: Position) -> Iterator[Placed]:
        return iter_packs(feed, start, epochs=recipe.train.epochs)

    content = recipe.model_dump(mode="json")
    # one thread: two of them wait for each other longer than these small products take
    job = Job(content, str(folder), section.path, expected_steps=4, sharing=64)
    worker.run(job, packs, None, lambda _event: None)
    return run


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats in whose answers the new tokens stand."""
    path = write_chats(tmp_path_factory.mktemp("rows") / "train.jsonl", 30)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["messages"][1]["content"] += " <call>zyx stone</call>"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module", params=["tied", "untied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    make_tiny_model(folder, tie_word_embeddings=request.param == "tied")
    return folder


METHODS: dict[str, dict[str, dict[str, Any]]] = {
    "pissa": {"lora": {"init_lora_weights": "pissa_niter_2"}},
    "eva": {"lora": {"init_lora_weights": "eva"}, "train": {"deepspeed": "zero2"}},
    "loftq": {"lora": {"init_lora_weights": "loftq"}, "model": {"quantization": "nf4"}},
    "neftune": {"train": {"neftune_noise_alpha": 5.0}},
    "lora+": {"lora": {"loraplus_lr_ratio": 8.0}, "train": {"deepspeed": "zero2"}},
    "muon": {"model": {"method": "full"}, "train": {"optimizer": "muon"}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_run_taken_up_again_ends_with_the_same_bytes(
    tiny_model: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    recipe = recipe_of(tiny_model, rows, **METHODS[method])
    whole = train(recipe, tmp_path / "whole")
    shutil.copytree(whole.path, tmp_path / "again")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "again" / "checkpoints" / f"step_{step:06d}")
    result = export.result_folder(whole).name
    shutil.rmtree(tmp_path / "again" / result)
    train(recipe, tmp_path / "again")
    for file in sorted((whole.path / result).iterdir()):
        assert file.read_bytes() == (tmp_path / "again" / result / file.name).read_bytes(), file
    kept = whole.path / "beginning" / "adapter_model.safetensors"
    assert kept.is_file() is (method in {"pissa", "eva", "loftq"})
    if result == "adapter":  # a checkpoint made into an adapter is for the base as it was, too
        step = whole.checkpoints / "step_000004"
        made = convert.to_adapter(str(whole.recipe), str(step), str(tmp_path / "made"))
        found = load_file(made / "adapter_model.safetensors")
        for name, value in load_file(whole.adapter / "adapter_model.safetensors").items():
            assert torch.equal(found[name], value), name


@dataclass(frozen=True)
class Results:
    """Of runs with new tokens: an adapter, and all weights."""

    base: Path
    adapted: RunFolder
    full: RunFolder
    merged: Path
    last: dict[RunFolder, torch.Tensor]
    """What each model in training said to `IDS` at the end."""


@pytest.fixture(scope="module")
def results(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    folder, seen = tmp_path_factory.mktemp("runs"), []
    real = worker.export

    def look(recipe: Recipe, voice: Any, run: RunFolder, *where: Any) -> None:
        voice.model.eval()
        seen.append(logits(voice.model))
        real(recipe, voice, run, *where)

    new = {"new_tokens": TOKENS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "export", look)
        adapted = train(recipe_of(model, rows, model=new), folder / "lora")
        full = train(recipe_of(model, rows, model={**new, "method": "full"}), folder / "full")
    merged = export.merge(str(adapted.path))
    return Results(model, adapted, full, merged, dict(zip((adapted, full), seen, strict=True)))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=torch.tensor([IDS])).logits
    return found


def plain_logits(out: Path, *results: tuple[str, Path, Path | str]) -> dict[str, torch.Tensor]:
    """Ask transformers and peft in a process of their own, without anything of ours."""
    words = [str(word) for result in results for word in result]
    command = [sys.executable, "-c", PLAIN, ",".join(map(str, IDS)), str(out), *words]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return load_file(out)


def test_new_tokens_are_trained_exported_and_read_by_all(results: Results, tmp_path: Path) -> None:
    """C39: a run's last logits, those of every reader of its result, in a fresh process as well."""
    adapted, full, merged, last = results.adapted, results.full, results.merged, results.last
    assert last[adapted].shape[-1] == 300
    found = plain_logits(
        tmp_path / "logits.safetensors", ("adapter", results.base, adapted.adapter),
        ("merged", merged, "-"), ("full", full.model, "-"),
    )  # fmt: skip
    for name, run in (("adapter", adapted), ("merged", adapted), ("full", full)):
        torch.testing.assert_close(found[name], last[run], rtol=1e-5, atol=1e-5)
    for folder, run in ((adapted.path, adapted), (merged, adapted), (full.path, full)):
        chat = open_chat(str(folder))
        torch.testing.assert_close(logits(chat.model), last[run], rtol=1e-5, atol=1e-5)
        assert chat.tokenizer.encode("zyx<call>") == [299, 297]
    for folder in (adapted.adapter, merged, full.model):
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs("zyx<call>", add_special_tokens=False).input_ids == [299, 297]


def test_tied_stays_tied_and_the_vocabulary_s_size_is_said(results: Results) -> None:
    """C40."""
    tied = json.loads((results.base / "config.json").read_text())["tie_word_embeddings"]
    for folder in (results.merged, results.full.model):
        config = json.loads((folder / "config.json").read_text())
        assert (config["vocab_size"], config["tie_word_embeddings"]) == (300, tied)
        assert ("lm_head.weight" in load_file(folder / "model.safetensors")) is not tied


def test_only_the_new_rows_are_trained_beside_the_adapter(results: Results) -> None:
    base = load_file(results.base / "model.safetensors")
    merged = load_file(results.merged / "model.safetensors")
    assert base.keys() == merged.keys()
    tables = {name for name in base if "embed_tokens" in name or "lm_head" in name}
    for name in tables:
        assert torch.equal(merged[name][:297], base[name]), name
        assert merged[name].shape == (300, 64)
    saved = load_file(results.adapted.adapter / "adapter_model.safetensors")
    deltas = [name for name in saved if "trainable_tokens_delta" in name]
    assert len(deltas) == len(tables)
    assert all(saved[name].shape == (3, 64) for name in deltas)


def test_an_exported_adapter_keeps_its_tokens_wherever_it_is(
    results: Results, tmp_path: Path
) -> None:
    exported = export.export(str(results.adapted.path), str(tmp_path / "elsewhere"))
    chat = open_chat(str(exported))
    torch.testing.assert_close(
        logits(chat.model), results.last[results.adapted], rtol=1e-5, atol=1e-5
    )
    assert chat.tokenizer.encode("zyx") == [299]
    assert chat.tokenizer.decode([297, 299]) == "<call>zyx"
