"""A new run begins with trained weights: those very ones, and nothing that does not fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raytune_ft.config import loader
from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Position
from raytune_ft.data.places import Placed, iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.errors import CheckpointError
from raytune_ft.training import worker
from raytune_ft.training.build import build_engine
from raytune_ft.training.run_folder import RunFolder, read_jsonl, write_json
from raytune_ft.training.saving import checkpoint, load_from
from raytune_ft.training.worker import Job
from tests.conftest import make_tiny_model

CPU = torch.device("cpu")
ADAPTER = "adapter/adapter_model.safetensors"


def recipe_of(base: Path, rows: Path, /, **changes: dict[str, Any]) -> Recipe:
    sections: dict[str, dict[str, Any]] = {
        "model": {"path": str(base)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"sources": [{"path": str(rows)}], "max_length": 96, "window": 16},
        "train": {"epochs": 1, "accumulation": 4, "lr": 5e-3, "deepspeed": "none"},
        "checkpoint": {"every": 1, "keep": -1},
        "run": {"trackers": []},
        "tune": {},
    }
    return Recipe.model_validate({k: {**v, **changes.get(k, {})} for k, v in sections.items()})


def train(recipe: Recipe, folder: Path) -> RunFolder:
    """Train as `preparation` and the trainer would, in this process."""
    run = RunFolder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model_folder = Path(recipe.model.path)
    begin = load_from.prepare(recipe, model_folder, run)
    run.create("a", loader.dump_yaml(recipe), method=recipe.model.method)
    write_json(folder / "data.json", {"rows": 40, "steps": 9})
    source = sources.open_sources(recipe.data, recipe.train.seed)
    encoder = Encoder.of(recipe, TextTokenizer.from_folder(model_folder))
    feed = make_feed(source, encoder, recipe.train.seed)

    def packs(start: Position) -> Iterator[Placed]:
        return iter_packs(feed, start, epochs=recipe.train.epochs)

    job = Job(
        recipe.model_dump(mode="json"), str(folder), str(model_folder), 9, sharing=64, begin=begin
    )
    worker.run(job, packs, None, lambda _: None)
    run.update(status="done")
    return run


@pytest.fixture(scope="module")
def trained(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return train(recipe_of(tiny_model, chats), tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def whole(tiny_model: Path, chats: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    recipe = recipe_of(tiny_model, chats, model={"method": "full"}, train={"max_steps": 2})
    return train(recipe, tmp_path_factory.mktemp("whole") / "run")


def begun(recipe: Recipe, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a new run before its first step."""
    model_folder = Path(recipe.model.path)
    begin = load_from.prepare(recipe, model_folder, RunFolder(folder))
    return build_engine(recipe, model_folder, CPU, begin=begin)[0].weights()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("what", ["", "checkpoints/{last}", "adapter"])
def test_a_run_begins_with_the_last_weights_of_another(
    trained: RunFolder, chats: Path, tiny_model: Path, tmp_path: Path, what: str
) -> None:
    """By the run, its last checkpoint or its adapter; step, optimizer and data begin anew."""
    last = checkpoint.latest(trained.checkpoints)
    assert last is not None
    path = trained.path / what.format(last=last.name)
    recipe = recipe_of(tiny_model, chats, model={"load_from": str(path)}, lora={"dropout": 0.3})
    assert same(begun(recipe, tmp_path / "new"), checkpoint.load(last).weights)


def test_an_earlier_checkpoint_is_another_beginning(
    trained: RunFolder, chats: Path, tiny_model: Path, tmp_path: Path
) -> None:
    first, last = (trained.checkpoints / checkpoint.folder_name(step) for step in (1, 3))
    recipe = recipe_of(tiny_model, chats, model={"load_from": str(first)})
    weights = begun(recipe, tmp_path / "new")
    assert same(weights, checkpoint.load(first).weights)
    assert not same(weights, checkpoint.load(last).weights)


def test_the_new_run_counts_from_one_and_keeps_what_it_began_with(
    trained: RunFolder, chats: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Taken up again, it needs its source no more, and ends with the same bytes."""
    source = tmp_path / "source"
    shutil.copytree(trained.path, source)
    recipe = recipe_of(tiny_model, chats, model={"load_from": str(source)})
    run = train(recipe, tmp_path / "new")
    steps = list(read_jsonl(run.metrics))
    assert [e["step"] for e in steps] == list(range(1, len(steps) + 1))
    old = list(read_jsonl(trained.metrics))
    assert steps[0]["rows"] == old[0]["rows"]
    assert steps[0]["loss"] < old[0]["loss"]
    expected = (run.path / ADAPTER).read_bytes()
    shutil.rmtree(source)
    shutil.rmtree(run.adapter)
    for folder in checkpoint.step_folders(run.checkpoints)[1:]:
        shutil.rmtree(folder)
    assert (train(recipe, run.path).path / ADAPTER).read_bytes() == expected


@pytest.mark.parametrize("what", ["", "checkpoints/step_000002", "model"])
def test_all_weights_of_a_run_in_full_are_taken(
    whole: RunFolder, chats: Path, tiny_model: Path, tmp_path: Path, what: str
) -> None:
    method = {"method": "full", "load_from": str(whole.path / what)}
    weights = begun(recipe_of(tiny_model, chats, model=method), tmp_path / "new")
    assert same(weights, checkpoint.load(whole.checkpoints / "step_000002").weights)


LORA = "this recipe's is"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"lora": {"r": 8}}, f"lora.r of {{run}} is 4, {LORA} 8; set lora.r: 4"),
        ({"lora": {"alpha": 16}}, f"lora.alpha of {{run}} is 8, {LORA} 16; set lora.alpha: 8"),
        ({"lora": {"use_rslora": True}}, f"lora.use_rslora of {{run}} is False, {LORA} True"),
        ({"lora": {"use_dora": True}}, f"lora.use_dora of {{run}} is False, {LORA} True"),
        ({"lora": {"bias": "all"}}, f"lora.bias of {{run}} is none, {LORA} all"),
        ({"lora": {"modules_to_save": ["lm_head"]}},
         f"lora.modules_to_save of {{run}} is [], {LORA} ['lm_head']"),
        ({"lora": {"targets": ["q_proj", "v_proj"]}},
         "lora.targets of {run} are down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj, "
         "this recipe's are q_proj, v_proj; set lora.targets: [down_proj, gate_proj"),
        ({"model": {"method": "full"}},
         "{run} was trained with model.method 'lora', this recipe has 'full'; set model.method: "
         "lora"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("what", ["", "checkpoints/step_000001"])
def test_what_means_something_else_is_refused_with_both_values(
    trained: RunFolder, chats: Path, tiny_model: Path, tmp_path: Path, what: str,
    changes: dict[str, Any], says: str,
) -> None:  # fmt: skip
    path = str(trained.path / what)
    model = {**changes.get("model", {}), "load_from": path}
    recipe = recipe_of(tiny_model, chats, **{**changes, "model": model})
    with pytest.raises(CheckpointError) as caught:
        load_from.prepare(recipe, tiny_model, RunFolder(tmp_path / "new"))
    assert str(caught.value).startswith(f"model.load_from: {says.format(run=path)}")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new" / load_from.BEGINNING).exists()


def test_another_network_is_refused_by_the_first_tensor(
    trained: RunFolder, whole: RunFolder, chats: Path, tmp_path: Path
) -> None:
    wider = tmp_path / "wider"
    wider.mkdir()
    make_tiny_model(wider, intermediate_size=160)
    recipe = recipe_of(wider, chats, model={"load_from": str(trained.path)})
    with pytest.raises(CheckpointError, match=r"tensor '.*lora_A.*' of .* is \(4, 128\), .*160"):
        load_from.prepare(recipe, wider, RunFolder(tmp_path / "new"))
    full = {"method": "full", "load_from": str(whole.checkpoints / "step_000001")}
    with pytest.raises(CheckpointError, match=r"tensor 'model.layers.0.mlp.* is \(64, 128\)"):
        recipe = recipe_of(wider, chats, model=full)
        load_from.prepare(recipe, wider, RunFolder(tmp_path / "new"))


def test_a_tensor_too_few_is_named(
    trained: RunFolder, chats: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(trained.adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    gone = next(name for name in tensors if "layers.1.self_attn.q_proj.lora_B" in name)
    save_file({k: v for k, v in tensors.items() if k != gone}, folder / "adapter_model.safetensors")
    recipe = recipe_of(tiny_model, chats, model={"load_from": str(folder)})
    with pytest.raises(CheckpointError, match=rf"tensor '{gone}' of {folder} is not there"):
        load_from.prepare(recipe, tiny_model, RunFolder(tmp_path / "new"))


def test_nothing_to_begin_with_is_said_in_one_line(
    trained: RunFolder, chats: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def said(path: Path) -> str:
        recipe = recipe_of(tiny_model, chats, model={"load_from": str(path)})
        with pytest.raises(CheckpointError) as caught:
            load_from.prepare(recipe, tiny_model, RunFolder(tmp_path / "new"))
        return str(caught.value)

    assert said(tmp_path / "none").startswith(f"model.load_from: '{tmp_path / 'none'}' is no run")
    empty = RunFolder(tmp_path / "empty")
    empty.create("empty", "", method="lora")
    assert said(empty.path).endswith("has no result and no whole checkpoint yet")
    away = tmp_path / "away"
    shutil.copytree(trained.checkpoints / "step_000001", away)
    assert "is not inside its run, so its lora.alpha is not known" in said(away)
    (away / "weights.safetensors").write_bytes(b"")
    assert "'weights.safetensors' is missing or has another size" in said(away)


def test_a_checkpoint_whose_base_was_moved_is_refused(
    trained: RunFolder, chats: Path, tiny_model: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    moved = recipe_of(tiny_model, chats, lora={"init_lora_weights": "pissa"})
    (run / "recipe.yaml").write_text(loader.dump_yaml(moved))
    path = run / "checkpoints/step_000001"
    recipe = recipe_of(tiny_model, chats, model={"load_from": str(path)})
    with pytest.raises(CheckpointError, match="'pissa' has changed; let its run end"):
        load_from.prepare(recipe, tiny_model, RunFolder(tmp_path / "new"))


def test_weights_in_full_that_changed_since_are_refused(
    whole: RunFolder, chats: Path, tiny_model: Path, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(whole.model, source)
    recipe = recipe_of(tiny_model, chats, model={"method": "full", "load_from": str(source)})
    run = RunFolder(tmp_path / "new")
    begin = load_from.prepare(recipe, tiny_model, run)
    assert begin is not None
    run.create("new", "", load_from_sha256=begin.sha256)
    assert load_from.prepare(recipe, tiny_model, run) == begin
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="has changed since this run began"):
        load_from.prepare(recipe, tiny_model, run)


def test_peft_s_own_adapter_is_taken(chats: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Written by plain PEFT, with a dropout and a base path of its own."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.4, target_modules=["q_proj", "v_proj"],
                        init_lora_weights=False, task_type="CAUSAL_LM")  # fmt: skip
    get_peft_model(base, config).save_pretrained(tmp_path / "theirs")
    recipe = recipe_of(
        tiny_model, chats, model={"load_from": str(tmp_path / "theirs")},
        lora={"targets": ["v_proj", "q_proj"], "dropout": 0.2},
    )  # fmt: skip
    weights = begun(recipe, tmp_path / "new")
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    ours = {n.removeprefix("model.").replace(".default", ""): t for n, t in weights.items()}
    assert same(ours, theirs)
    kept = json.loads((tmp_path / "new/beginning/adapter_config.json").read_text())
    assert kept["lora_dropout"] == 0.2


def test_a_sweep_cannot_vary_what_is_given(chats: Path, tiny_model: Path) -> None:
    given = {"load_from": "runs/a"}
    recipe_of(tiny_model, chats, model=given, tune={"space": {"train.lr": [1e-4, 1e-3]}})
    with pytest.raises(ValueError, match=r"tune.space 'lora.r': model.load_from gives the adapter"):
        recipe_of(tiny_model, chats, model=given, tune={"space": {"lora.r": [4, 8]}})
