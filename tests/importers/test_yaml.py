"""LLaMA-Factory's and Axolotl's YAML become recipes; what has no counterpart is listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError
from raytune_ft.importers import read_config
from raytune_ft.importers.draft import Draft

FACTORY = """\
model_name_or_path: Qwen/Qwen3-4B
quantization_bit: 4
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
dataset: identity,chats
template: qwen3
cutoff_len: 1024
max_samples: 500
packing: true
output_dir: saves/qwen3/sft
logging_steps: 5
save_steps: 200
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
deepspeed: examples/deepspeed/ds_z2_offload_config.json
"""
AXOLOTL = """\
base_model: NousResearch/Llama-3.2-1B
load_in_4bit: true
adapter: qlora
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
  - path: chats.jsonl
    ds_type: json
    type: chat_template
    field_messages: conversations
    message_property_mappings:
      role: from
      content: value
val_set_size: 0.05
output_dir: ./outputs/out
sequence_len: 2048
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 2e-4
warmup_steps: 10
saves_per_epoch: 1
bf16: auto
wandb_project:
gradient_checkpointing: true
deepspeed: deepspeed_configs/zero1.json
weight_decay: 0.01
"""
INFO = {
    "identity": {"file_name": "identity.json"},
    "chats": {
        "file_name": "chats.jsonl",
        "formatting": "sharegpt",
        "num_samples": 20,
        "columns": {"messages": "turns"},
        "tags": {"role_tag": "role", "content_tag": "content"},
    },
    "qa": {"hf_hub_url": "org/qa", "columns": {"prompt": "q", "response": "a"}},
    "pairs": {"file_name": "p.json", "ranking": True},
    "script": {"script_url": "evil"},
    "pictures": {"file_name": "p.json", "columns": {"images": "images"}},
}


def read(folder: Path, text: str, info: dict[str, Any] | None = None) -> Draft:
    (folder / "f.yaml").write_text(text, encoding="utf-8")
    if info is not None:
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data/dataset_info.json").write_text(json.dumps(info))
    return read_config(str(folder / "f.yaml"))


def told(draft: Draft) -> str:
    return "\n".join(draft.report())


def test_llama_factory(tmp_path: Path) -> None:
    draft = read(tmp_path, FACTORY, INFO)
    recipe = draft.recipe()
    assert recipe.model.path == "Qwen/Qwen3-4B"
    assert (recipe.model.quantization, recipe.model.dtype) == ("nf4", "bfloat16")
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.dropout) == (8, 16, 0.0)
    assert recipe.lora.targets == ["q_proj", "v_proj"]
    first, second = recipe.data.sources
    assert first.path == str(tmp_path / "data/identity.json")
    assert (first.limit, second.limit) == (500, 20)
    assert second.columns == {"messages": "turns"}
    assert (recipe.data.max_length, recipe.data.pack, recipe.data.validation) == (1024, True, 0.1)
    train = recipe.train
    assert (train.micro_batch_size, train.accumulation, train.lr) == (2, 8, 1e-4)
    assert (train.epochs, train.warmup_ratio, train.scheduler) == (3, 0.1, "cosine")
    assert (train.log_every, train.deepspeed) == (5, "zero2_offload")
    assert (recipe.checkpoint.every, recipe.checkpoint.keep) == (200, -1)
    assert (recipe.run.storage, recipe.run.name) == ("saves/qwen3", "sft")
    assert "template qwen3: the model's own chat template is used" in told(draft)


def test_llama_factory_defaults_are_its_own(tmp_path: Path) -> None:
    text = "model_name_or_path: m/m\nstage: sft\ndataset: qa\ntemplate: llama3\n"
    recipe = read(tmp_path, text, INFO).recipe()
    train = recipe.train
    assert (recipe.lora.r, recipe.lora.alpha, recipe.data.max_length) == (8, 16, 2048)
    assert (train.lr, train.micro_batch_size, train.accumulation) == (5e-5, 8, 1)
    assert (train.scheduler, train.log_every, recipe.checkpoint.every) == ("linear", 500, 500)
    assert recipe.data.pack is False
    assert recipe.data.sources[0].columns == {"instruction": "q", "output": "a"}


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("train_on_prompt: true", "data.sources.0.loss", "all"),
        ("mask_history: true", "data.sources.0.loss", "last"),
        ("neat_packing: true", "data.pack", True),
        ("quantization_bit: 8", "model.quantization", "int8"),
        ("finetuning_type: full", "model.method", "full"),
        ("use_dora: true", "lora.use_dora", True),
        ("additional_target: embed_tokens,lm_head", "lora.modules_to_save",
         ["embed_tokens", "lm_head"]),
        ("default_system: Be kind.", "data.system", "Be kind."),
        ("seed: 7", "train.seed", 7),
        ("max_steps: 30", "train.max_steps", 30),
        ("save_strategy: epoch", "checkpoint.every", "epoch"),
        ("optim: adamw_8bit", "train.optimizer", "adamw_8bit"),
        ("num_train_epochs: 0.5", "train.epochs", 1),
        ("warmup_steps: 20", "train.warmup_steps", 20),
        ("deepspeed: examples/deepspeed/ds_z3_config.json", "train.deepspeed", "zero3"),
        ("eval_dataset: chats", "data.validation", "chats.jsonl"),
        ("ray_num_workers: 4", "run.workers", 4),
    ],
)  # fmt: skip
def test_llama_factory_field(tmp_path: Path, line: str, field: str, value: Any) -> None:
    text = f"model_name_or_path: m/m\ndataset: identity\ntemplate: llama3\n{line}\n"
    assert _at(read(tmp_path, text, INFO).recipe(), field, value)


def test_stage_pt_trains_on_text(tmp_path: Path) -> None:
    info = {"c4": {"file_name": "c4.json", "columns": {"prompt": "body"}}}
    text = "model_name_or_path: m/m\nstage: pt\ndataset: c4\ntemplate: x\n"
    source = read(tmp_path, text, info).recipe().data.sources[0]
    assert (source.map, source.columns) == ("pretrain_map_fn", {"text": "body"})


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        ("identity,pairs", "pairs: preference pairs are trained on by stage dpo"),
        ("identity,script", "script: its loading script is never run"),
        ("identity,pictures", "pictures: images, videos and audio are not read"),
        ("identity,nothing", "nothing is not in dataset_info.json"),
    ],
)
def test_data_sets_that_stay_behind_are_named(tmp_path: Path, dataset: str, says: str) -> None:
    text = f"model_name_or_path: m/m\ndataset: {dataset}\ntemplate: x\n"
    assert says in told(read(tmp_path, text, INFO))


def test_axolotl(tmp_path: Path) -> None:
    draft = read(tmp_path, AXOLOTL)
    recipe = draft.recipe()
    assert (recipe.model.quantization, recipe.model.method) == ("nf4", "lora")
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.targets) == (32, 16, "all-linear")
    first, second = recipe.data.sources
    assert (first.path, first.columns) == ("tatsu-lab/alpaca", {})
    assert (second.path, second.columns) == ("chats.jsonl", {})
    train = recipe.train
    assert (train.lr, train.epochs, train.warmup_steps) == (2e-4, 2, 10)
    assert (train.optimizer, train.deepspeed) == ("paged_adamw_8bit", "none")
    assert "zero1 does not go with paged_adamw_8bit; train.deepspeed is none" in told(draft)
    assert (recipe.data.validation, recipe.data.max_length, recipe.data.pack) == (0.05, 2048, True)
    assert (recipe.checkpoint.every, recipe.checkpoint.keep) == ("epoch", 4)
    assert (recipe.run.storage, recipe.run.name) == ("./outputs", "out")
    assert "wandb_project" not in told(draft)


@pytest.mark.parametrize(
    ("entry", "fields"),
    [
        ("{path: a.jsonl, type: completion, field: body}",
         {"map": "pretrain_map_fn", "columns": {"text": "body"}}),
        ("{path: a.jsonl, type: chat_template}", {"columns": {}}),
        ("{path: a.jsonl, type: alpaca_chat.load_qa}",
         {"columns": {"instruction": "question", "output": "answer"}}),
        ("{path: a.jsonl, type: {field_instruction: q, field_output: a}}",
         {"columns": {"instruction": "q", "output": "a"}}),
        ("{path: json, data_files: [b.jsonl], type: alpaca}", {"path": "b.jsonl"}),
        ("{path: o/d, name: sub, split: test, type: alpaca}", {"name": "sub", "split": "test"}),
    ],
)  # fmt: skip
def test_axolotl_rows(tmp_path: Path, entry: str, fields: dict[str, Any]) -> None:
    text = f"base_model: m/m\nlearning_rate: 1e-4\ndatasets: [{entry}]\n"
    source = read(tmp_path, text).recipe().data.sources[0]
    assert {key: getattr(source, key) for key in fields} == fields


def test_axolotl_defaults_are_its_own(tmp_path: Path) -> None:
    text = "base_model: m/m\nlearning_rate: 1e-4\ndatasets: [{path: a, type: alpaca}]\n"
    draft = read(tmp_path, text)
    recipe = draft.recipe()
    assert (recipe.model.method, recipe.data.max_length, recipe.data.pack) == ("full", 512, False)
    assert (recipe.train.epochs, recipe.train.micro_batch_size) == (1, 1)
    assert recipe.train.warmup_ratio == 0.03
    assert "at most 100" in told(draft)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (FACTORY.replace("stage: sft", "stage: kto"), r"f.yaml:4: stage kto is not trained here"),
        (
            FACTORY.replace("stage: sft", "stage: dpo") + "pref_loss: simpo\n",
            r"pref_loss simpo is not trained here; sft, dpo and orpo are",
        ),
        (FACTORY.replace("type: lora", "type: oft"), r"f.yaml:6: finetuning_type oft"),
        (FACTORY.replace("bit: 4", "bit: 2"), r"f.yaml:2: quantization_bit 2"),
        (FACTORY.replace("1.0e-4", "fast"), r"f.yaml:19: train.lr: expected a number, got 'fast'"),
        (FACTORY.replace("ds_z2_offload", "ds_z3"), "cannot shard nf4"),
        (FACTORY.replace("dataset:", "dataset_:"), "no `dataset`"),
        (AXOLOTL + "rl: grpo\n", r"rl grpo is not trained here; sft, dpo and orpo are"),
        (AXOLOTL.replace("adapter: qlora", "adapter: llama-adapter"), r"f.yaml:3: adapter"),
        (AXOLOTL.replace("datasets:", "data_sets:"), "no data set can be carried over"),
        ("a: 1", "neither base_model"),
        ("- a", "expected sections"),
        ("model: {path: x}\ndata: {}", "is a recipe already"),
    ],
)
def test_what_cannot_be_a_recipe_is_one_line(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        read(tmp_path, text, INFO).recipe()
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("text", [FACTORY, AXOLOTL], ids=["factory", "axolotl"])
def test_unknown_keys_are_listed_and_secrets_are_not_shown(tmp_path: Path, text: str) -> None:
    draft = read(tmp_path, text + "frobnicate: 3\nmy_api_key: hush\n", INFO)
    lines = told(draft)
    assert "frobnicate = 3 is left out" in lines
    assert "my_api_key is left out" in lines
    assert "hush" not in lines


def _at(recipe: Recipe, field: str, value: Any) -> bool:
    here: Any = recipe.model_dump(mode="json")
    for part in field.split("."):
        here = here[int(part)] if isinstance(here, list) else here[part]
    return bool(here == value or (isinstance(value, str) and str(here).endswith(value)))


@pytest.mark.parametrize("text", [FACTORY, AXOLOTL], ids=["factory", "axolotl"])
def test_odd_values_are_lines_not_tracebacks(tmp_path: Path, text: str) -> None:
    content = yaml.safe_load(text)
    for key in content:
        for odd in ("abc", [1, "x"], {"a": 1}, -1, True, [], 1.5):
            try:
                read(tmp_path, yaml.safe_dump({**content, key: odd}), INFO).recipe()
            except RecipeError as error:
                assert str(tmp_path) in str(error)
