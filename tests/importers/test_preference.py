"""Preference training of XTuner, LLaMA-Factory and Axolotl becomes train.objective."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import Recipe
from tests.importers import test_xtuner as xtuner
from tests.importers.test_yaml import read, told

INFO: dict[str, Any] = {
    "flat": {
        "file_name": "flat.json", "ranking": True,
        "columns": {"prompt": "instruction", "query": "input", "chosen": "best",
                    "rejected": "worst"},
    },
    "turns": {
        "file_name": "turns.json", "ranking": True, "formatting": "sharegpt",
        "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
    },
    "single": {"file_name": "single.json"},
}  # fmt: skip
FACTORY = """
model_name_or_path: m/m
stage: dpo
finetuning_type: lora
dataset: flat,turns
template: llama3
cutoff_len: 1024
pref_beta: 0.2
"""
AXOLOTL = """
base_model: m/m
learning_rate: 1e-4
sequence_len: 1024
rl: dpo
rl_beta: 0.2
sample_packing: true
datasets:
  - {path: a.jsonl, type: chatml.intel}
  - {path: b.jsonl, type: chat_template.default, field_messages: talk, field_chosen: best}
  - {path: c.jsonl, type: {field_prompt: q, field_chosen: good, field_rejected: bad}}
"""
XTUNER = """
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from xtuner.dataset.preference_dataset import build_preference_dataset, orpo_dpo_mix_40k_map_fn
from xtuner.model.dpo import DPO
use_varlen_attn = VARLEN
tokenizer = dict(type=AutoTokenizer.from_pretrained, pretrained_model_name_or_path='m/m')
model = dict(type=DPO, loss_type='sigmoid', beta=0.2, use_varlen_attn=use_varlen_attn,
    llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path='m/m'),
    ref_llm=dict(type=AutoModelForCausalLM.from_pretrained, pretrained_model_name_or_path='m/m'),
    lora=dict(type=LoraConfig, r=64, lora_alpha=16))
train_dataset = dict(type=build_preference_dataset,
    dataset=dict(type=load_dataset, path='mlabonne/orpo-dpo-mix-40k'), tokenizer=tokenizer,
    max_length=2048, dataset_map_fn=orpo_dpo_mix_40k_map_fn, is_dpo=True, is_reward=False,
    reward_token_id=-1, num_proc=32, use_varlen_attn=use_varlen_attn, max_packed_length=16384,
    shuffle_before_pack=True)
train_dataloader = dict(batch_size=1, num_workers=0, dataset=train_dataset)
train_cfg = dict(by_epoch=True, max_epochs=1)
"""


def check(recipe: Recipe, objective: str, length: int, *, pack: bool = False) -> None:
    assert (recipe.train.objective, recipe.train.beta) == (objective, 0.2)
    assert (recipe.data.max_length, recipe.data.pack) == (length, pack)
    assert all(source.loss == "assistant" for source in recipe.data.sources)


@pytest.mark.parametrize(("loss", "objective"), [("sigmoid", "dpo"), ("orpo", "orpo")])
def test_llama_factory(tmp_path: Path, loss: str, objective: str) -> None:
    text = FACTORY + f"pref_loss: {loss}\nmask_history: true\nref_model: other\npref_ftx: 0.5\n"
    draft = read(tmp_path, text, INFO)
    recipe = draft.recipe()
    check(recipe, objective, 2048)
    flat, turns = recipe.data.sources
    assert flat.columns == {"chosen": "best", "rejected": "worst"}
    assert (turns.columns, turns.map) == ({}, None)
    lines = told(draft)
    assert "cutoff_len 1024 is the length of one answer there; data.max_length is 2048" in lines
    for key in ("ref_model", "pref_ftx"):
        assert re.search(rf"{key} = .* is not carried over", lines), key


def test_llama_factory_names_rows_of_the_other_kind(tmp_path: Path) -> None:
    lines = told(read(tmp_path, FACTORY.replace("turns", "single"), INFO))
    assert "single: its rows have one answer, and stage dpo compares two" in lines


@pytest.mark.parametrize(("method", "beta"), [("dpo", "rl_beta"), ("orpo", "orpo_alpha")])
def test_axolotl(tmp_path: Path, method: str, beta: str) -> None:
    text = AXOLOTL.replace("rl: dpo", f"rl: {method}").replace("rl_beta", beta)
    recipe = read(tmp_path, text).recipe()
    check(recipe, method, 2048)
    assert [source.columns for source in recipe.data.sources] == [
        {}, {"messages": "talk", "chosen": "best"},
        {"prompt": "q", "chosen": "good", "rejected": "bad"},
    ]  # fmt: skip


@pytest.mark.parametrize(("varlen", "length"), [(False, 4096), (True, 16384)])
def test_xtuner(tmp_path: Path, varlen: bool, length: int) -> None:
    draft = xtuner.read(tmp_path, XTUNER.replace("VARLEN", str(varlen)))
    recipe = draft.recipe()
    check(recipe, "dpo", length, pack=varlen)
    (source,) = recipe.data.sources
    assert (source.path, source.map, source.system) == ("mlabonne/orpo-dpo-mix-40k", None, None)
    assert (recipe.model.template, recipe.model.method, recipe.lora.r) == ("tokenizer", "lora", 64)
    assert not any("is left out" in line or "not carried" in line for line in xtuner.told(draft))


def test_xtuner_orpo(tmp_path: Path) -> None:
    text = XTUNER.replace("type=DPO, loss_type='sigmoid'", "type=ORPO").replace("VARLEN", "True")
    check(xtuner.read(tmp_path, text.replace("dpo import DPO", "orpo import ORPO")).recipe(),
          "orpo", 16384, pack=True)  # fmt: skip
