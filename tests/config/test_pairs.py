"""Pairs of training settings that do not work are refused in one line; their neighbours train."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from raytune_ft.config.loader import load_recipe
from raytune_ft.errors import RecipeError

FILE_OF_STAGE_3 = {"zero_optimization": {"stage": 3}}
FILE_OFFLOADING = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}

REFUSED: dict[str, tuple[list[str], str, list[str]]] = {
    "4 bits under stage 3": (
        ["model.quantization=nf4", "train.deepspeed=zero3"], "use zero2",
        ["model.quantization=nf4", "train.deepspeed=zero2"],
    ),
    "8 bits under stage 3": (
        ["model.quantization=int8", "train.deepspeed=zero3_offload"], "use zero2",
        ["model.quantization=int8", "train.deepspeed=zero1"],
    ),
    "4 bits under a file of stage 3": (
        ["model.quantization=nf4", "train.deepspeed=FILE_OF_STAGE_3"], "use zero2",
        ["model.quantization=none", "train.deepspeed=FILE_OF_STAGE_3"],
    ),
    "full training of 4 bits": (
        ["model.quantization=nf4", "model.method=full"], "or model.method: lora",
        ["model.quantization=none", "model.method=full"],
    ),
    "Muon on a stretch of matrices": (
        ["train.optimizer=muon", "train.deepspeed=zero2"], "set it to none",
        ["train.optimizer=muon", "train.deepspeed=none"],
    ),
    "8-bit blocks on a stretch": (
        ["train.optimizer=paged_adamw_8bit", "train.deepspeed=zero1"], "use paged_adamw_32bit",
        ["train.optimizer=paged_adamw_32bit", "train.deepspeed=zero1"],
    ),
    "8-bit blocks on parts": (
        ["train.optimizer=adamw_8bit", "train.deepspeed=zero3"], "use paged_adamw_32bit",
        ["train.optimizer=adamw_8bit", "train.deepspeed=none"],
    ),
    "Lion on the host": (
        ["train.optimizer=lion", "train.deepspeed=zero2_offload"], "use adamw, or zero2",
        ["train.optimizer=lion", "train.deepspeed=zero2"],
    ),
    "Lion beside weights on the host": (
        ["train.optimizer=lion", "train.deepspeed=zero3_offload"], "use adamw, or zero3",
        ["train.optimizer=paged_adamw_32bit", "train.deepspeed=zero3_offload"],
    ),
    "a file that offloads": (
        ["train.optimizer=lion", "train.deepspeed=FILE_OFFLOADING"], "use adamw, or zero2",
        ["train.optimizer=adamw", "train.deepspeed=FILE_OFFLOADING"],
    ),
    "DoRA under stage 3": (
        ["lora.use_dora=true", "train.deepspeed=zero3"], "use zero2",
        ["lora.use_dora=true", "train.deepspeed=zero2"],
    ),
    "float8 of trained weights": (
        ["model.compute=fp8", "model.method=full"], "or set model.method: lora",
        ["model.compute=fp8", "model.method=lora"],
    ),
    "float8 off the fast path": (
        ["model.compute=fp8", "model.fast_path=false"], "leave model.fast_path out",
        ["model.compute=fp8", "model.fast_path=true"],
    ),
    "float8 of int8": (
        ["model.compute=fp8", "model.quantization=int8"], "set model.quantization: nf4, or none",
        ["model.compute=fp8", "model.quantization=nf4"],
    ),
    "float8 beside float16": (
        ["model.compute=fp8", "model.dtype=float16"], "use auto",
        ["model.compute=fp8", "model.dtype=bfloat16"],
    ),
    "float8 and DoRA": (
        ["model.compute=fp8", "lora.use_dora=true"], "leave one out",
        ["model.compute=fp8", "lora.use_rslora=true"],
    ),
    "float8 under stage 3": (
        ["model.compute=fp8", "train.deepspeed=zero3"], "use zero2",
        ["model.compute=fp8", "train.deepspeed=zero2_offload"],
    ),
    "new tokens under stage 3": (
        ["model.new_tokens=['<|note|>']", "train.deepspeed=zero3"], "use zero2",
        ["model.new_tokens=['<|note|>']", "train.deepspeed=zero2"],
    ),
    "DPO under stage 3": (
        ["train.objective=dpo", "train.deepspeed=zero3"], "use zero2",
        ["train.objective=dpo", "train.deepspeed=zero2"],
    ),
    "a learning rate that rises to its end": (
        ["train.min_lr=1.0", "train.lr=0.1"], "lower train.min_lr",
        ["train.min_lr=0.1", "train.lr=0.1"],
    ),
    "fewer workers than are asked for, and more": (
        ["run.workers=2", "run.min_workers=3"], "lower run.min_workers",
        ["run.workers=2", "run.min_workers=2"],
    ),
    "numbers of a file for any number of workers": (
        ["run.workers=2", "run.min_workers=1", "train.deepspeed=FILE_OFFLOADING"],
        "use a preset such as zero2",
        ["run.workers=2", "run.min_workers=1", "train.deepspeed=none"],
    ),
}  # fmt: skip
"""What it is -> settings, words of the advice, and settings beside them that work."""


@pytest.fixture
def config(tmp_path: Path) -> str:
    """A recipe without anything of its own."""
    file = tmp_path / "recipe.yaml"
    file.write_text("model: {path: m}\ndata: {sources: [{path: rows.jsonl}]}\n")
    return str(file)


def with_files(settings: list[str], folder: Path) -> list[str]:
    """Write the DeepSpeed file that a setting names."""
    found = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if value.startswith("FILE_"):
            file = folder / "zero.json"
            file.write_text(json.dumps(globals()[value]))
            setting = f"{key}={file}"  # noqa: PLW2901
        found.append(setting)
    return found


@pytest.mark.parametrize("name", REFUSED)
def test_a_pair_is_refused_and_its_neighbour_is_not(name: str, config: str, tmp_path: Path) -> None:
    settings, advice, neighbour = REFUSED[name]
    with pytest.raises(RecipeError) as refused:
        load_recipe(config, with_files(settings, tmp_path))
    line = str(refused.value)
    assert advice in line and "\n" not in line
    assert any(setting.partition("=")[0] in line for setting in settings)
    load_recipe(config, with_files(neighbour, tmp_path))


def test_a_file_that_is_not_here_is_told_elsewhere(config: str) -> None:
    """A recipe may be looked at on a machine that has no such file; a run says what is missing."""
    recipe = load_recipe(config, ["train.deepspeed=elsewhere.json", "model.quantization=nf4"])
    assert recipe.train.deepspeed == "elsewhere.json"
