"""What a path is, from small files alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raytune_ft.chat.source import find_source
from raytune_ft.errors import CheckpointError, ModelError, RecipeError


def write_run(
    run: Path, base: Path, *, result: str | None = "adapter", quantization: str = "none"
) -> Path:
    """Write the small files of a run folder, without weights."""
    run.mkdir(parents=True)
    info = {"name": run.name, "status": "done", "model_folder": str(base), "template": "zephyr"}
    (run / "run.json").write_text(json.dumps(info))
    recipe = {
        "model": {"path": str(base), "template": "zephyr", "quantization": quantization},
        "data": {
            "sources": [{"path": "x.jsonl"}],
            "system": "You are {bot}.",
            "fill": {"bot": "Ada"},
        },
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if result:
        name = "adapter_config.json" if result == "adapter" else "config.json"
        (run / result).mkdir()
        (run / result / name).write_text(json.dumps({"base_model_name_or_path": "elsewhere"}))
    return run


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_run_is_opened_as_it_was_trained(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "runs" / "ada", base, quantization="nf4")
    source = find_source(str(run))
    assert source.name == "ada"
    assert source.base == str(base)
    assert source.adapter == run / "adapter"
    assert source.template == "zephyr"
    assert source.system == "You are Ada."
    assert source.section.quantization == "nf4"
    assert find_source(str(run / "adapter")) == source


@pytest.mark.parametrize(
    ("bits", "quantization"), [(4, "nf4"), (8, "int8"), (16, "none"), (32, "none")]
)
def test_bits_override_the_precision_of_training(
    tmp_path: Path, base: Path, bits: int, quantization: str
) -> None:
    run = write_run(tmp_path / "ada", base, quantization="nf4")
    assert find_source(str(run), bits).section.quantization == quantization


@pytest.mark.parametrize("place", ["chat_eval", "run.json", "record"])
def test_the_system_text_is_the_one_that_samples_were_asked_with(
    tmp_path: Path, base: Path, place: str
) -> None:
    run = write_run(tmp_path / "ada", base)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["chat_eval"] = {"system": "I am {bot}."}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    if place == "run.json":
        info = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps({**info, "system": "I am Ada."}))
    if place == "record":
        (run / "adapter" / "raytune_ft.json").write_text('{"system": "I am Ada."}')
    assert find_source(str(run)).system == "I am Ada."


def test_another_number_of_bits_is_refused(base: Path) -> None:
    with pytest.raises(RecipeError, match="bits 5: not a precision; use 4"):
        find_source(str(base), 5)


@pytest.mark.parametrize("name", ["merged", "model"])
def test_whole_weights_in_a_run_are_not_quantised_again(
    tmp_path: Path, base: Path, name: str
) -> None:
    run = write_run(tmp_path / "ada", base, result=name, quantization="nf4")
    source = find_source(str(run / name))
    assert source.base == str(run / name)
    assert source.adapter is None
    assert source.section.quantization == "none"
    assert (source.template, source.system) == ("zephyr", "You are Ada.")


def test_a_merged_folder_alone_brings_its_record(tmp_path: Path, base: Path) -> None:
    record = {"template": "qwen_chat", "system": "Be short.", "base": "gone"}
    (base / "raytune_ft.json").write_text(json.dumps(record))
    source = find_source(str(base))
    assert (source.template, source.system) == ("qwen_chat", "Be short.")
    assert source.adapter is None


def test_an_adapter_alone_brings_base_template_and_precision(tmp_path: Path, base: Path) -> None:
    adapter = tmp_path / "moved" / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "old"}))
    assert find_source(str(adapter)).base == "old"
    record = {"template": "zephyr", "system": "", "base": str(base), "quantization": "nf4"}
    (adapter / "raytune_ft.json").write_text(json.dumps(record))
    source = find_source(str(adapter))
    assert (source.base, source.adapter, source.name) == (str(base), adapter, "moved")
    assert (source.template, source.section.quantization) == ("zephyr", "nf4")


def test_a_plain_model_speaks_its_own_template(base: Path) -> None:
    source = find_source(str(base))
    assert (source.template, source.system, source.name) == ("tokenizer", "", "base")


def test_the_default_model_has_a_name() -> None:
    assert find_source("smollm2-135m-instruct").base == "smollm2-135m-instruct"


def test_a_run_moved_away_from_its_base_asks_the_recipe(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "ada", base)
    info = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**info, "model_folder": "/gone"}))
    assert find_source(str(run)).base == str(base)


def test_a_missing_folder_is_named_with_the_nearest(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "runs" / "identity", base)
    monkeypatch.chdir(tmp_path)
    for wrong in ("runs/identiy", "identiti"):
        with pytest.raises(CheckpointError) as caught:
            find_source(wrong)
        message = str(caught.value)
        assert message.startswith(f"{wrong}: no such folder; a run folder holds run.json")
        assert message.endswith("nearest: runs/identity")
        assert "\n" not in message


def test_a_run_without_a_result_says_so(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "ada", base, result=None)
    with pytest.raises(CheckpointError, match=r"no adapter/ and no model/ .* \(status: done\)"):
        find_source(str(run))


def test_a_folder_of_something_else_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="neither a run folder nor a model folder"):
        find_source(str(tmp_path))


@pytest.mark.parametrize("content", ["{", "[1]", "\udcff"])
def test_a_damaged_record_is_named(tmp_path: Path, base: Path, content: str) -> None:
    run = write_run(tmp_path / "ada", base)
    (run / "run.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"run\.json: .*; the folder is damaged"):
        find_source(str(run))


def test_a_damaged_recipe_is_named(tmp_path: Path, base: Path) -> None:
    run = write_run(tmp_path / "ada", base)
    (run / "recipe.yaml").write_text("model: {path: x, quantization: nf5}")
    with pytest.raises(CheckpointError, match=r"recipe\.yaml: model\.quantization"):
        find_source(str(run))


def test_a_wrong_path_is_found_before_torch_is_loaded() -> None:
    code = (
        "import sys; from raytune_ft.chat import find_source\n"
        "find_source('smollm2-135m-instruct'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
