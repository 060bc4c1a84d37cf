"""The classic InternLM recipe and a sweep on real commands, and a run of all weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from raytune_ft.chat import open_chat
from raytune_ft.config.loader import load_recipe
from raytune_ft.training.run_folder import read_json, read_jsonl
from tests import runs
from tests.conftest import ROOT, make_tiny_model
from tests.families import short_run

pytestmark = pytest.mark.slow

GUANACO = Path(os.environ.get("RAYTUNE_TEST_DATA", ROOT.parent / "shared/data"))


def make_internlm(folder: Path) -> None:
    """A random checkpoint in InternLM-7B's layout: Llama's names, biases, its own config."""
    import torch

    make_tiny_model(folder, num_key_value_heads=4, max_position_embeddings=2048)
    weights = load_file(folder / "model.safetensors")
    for name in [n for n in weights if n.endswith("_proj.weight") and "self_attn" in n]:
        weights[name.replace("weight", "bias")] = torch.zeros(len(weights[name]))
        head = name.rpartition(".self_attn.")[0]
        weights[f"{head}.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    llama = json.loads((folder / "config.json").read_text())
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "max_position_embeddings", "rms_norm_eps",
        "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    config = {
        **{key: llama[key] for key in kept}, "model_type": "internlm", "bias": True,
        "architectures": ["InternLMForCausalLM"], "tie_word_embeddings": False,
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.ray
@pytest.mark.skipif(not GUANACO.is_dir(), reason="the OASST1 rows are not on this machine")
def test_internlm_oasst1_trains_on_real_rows(tmp_path: Path) -> None:
    model = tmp_path / "internlm"
    model.mkdir()
    make_internlm(model)
    runs.train(
        ROOT / "configs/internlm_oasst1.yaml",
        f"model.path={model}", f"data.sources.0.path={GUANACO / 'openassistant-guanaco'}",
        f"run.storage={tmp_path}", "run.name=classic", "train.max_steps=2",
        "train.accumulation=1", "data.max_length=1024", "chat_eval.max_new_tokens=4",
    )  # fmt: skip
    data = read_json(tmp_path / "classic/data.json")
    assert data["rows"] == 950
    assert data["used"] + sum(data["dropped"].values()) == 950
    assert data["density"] > 0.97
    assert (tmp_path / "classic/adapter/adapter_model.safetensors").is_file()


def test_a_full_parameter_run_is_a_model_to_talk_to(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    written = runs.write_recipe(tmp_path, tiny_model, chats, "full")
    words = ["model.method=full", "train.max_steps=3", "checkpoint.every=2"]
    short_run.train(load_recipe(str(written), words))
    run = tmp_path / "runs/full"
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(run / "model/model.safetensors")
    assert before.keys() == after.keys()
    assert all((after[name] != before[name]).any() for name in before)
    message = [{"role": "user", "content": "what is red?"}]
    for path in (run, run / "model"):
        assert isinstance("".join(open_chat(str(path)).reply(message, max_new_tokens=3)), str)


@pytest.mark.ray
def test_a_sweep_keeps_its_best_trial(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    recipe = runs.write_recipe(tmp_path, tiny_model, chats, "sweep")
    with recipe.open("a") as file:
        file.write(
            "tune:\n  space: {train.lr: {low: 1.0e-3, high: 2.0e-2, log: 1}, lora.r: [2, 4]}\n"
            "  trials: 3\n  concurrent: 2\n"
        )
    command = [sys.executable, "-m", "raytune_ft.tune", "--config", recipe, "train.max_steps=4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "leaderboard" in done.stderr
    sweep = tmp_path / "runs/sweep"
    board = list(read_jsonl(sweep / "leaderboard.jsonl"))
    assert len(board) == 3
    finished = [t for t in board if t["state"] == "done"]
    assert finished and board[0] == min(finished, key=lambda t: t["loss"])
    assert all(1e-3 <= t["train.lr"] <= 2e-2 and t["lora.r"] in (2, 4) for t in board)
    assert runs.sha256(sweep / "best/adapter_model.safetensors") == runs.sha256(
        Path(board[0]["folder"]) / "adapter/adapter_model.safetensors"
    )
    assert (sweep / "best.yaml").is_file()
