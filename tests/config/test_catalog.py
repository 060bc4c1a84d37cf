"""Shipped names: the whole list, and each name's values against XTuner v0.1.9's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config import catalog
from raytune_ft.config.loader import load_recipe
from raytune_ft.data.formats import MAP_FUNCTIONS
from raytune_ft.data.templates import template_names
from raytune_ft.errors import RecipeError

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
FACTS: dict[str, Any] = json.loads((GOLDEN / "recipes.json").read_text(encoding="utf-8"))
NAMES = (GOLDEN / "names.txt").read_text(encoding="utf-8").split()
OPTIMIZERS = {
    "bitsandbytes.optim.PagedAdamW32bit": "paged_adamw_32bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "torch.optim.AdamW": "adamw",
    "adamw_torch": "adamw",
}
QUANTIZATION = {4: "nf4", 8: "int8", None: "none"}


def test_reference_names_are_the_301() -> None:
    assert catalog.reference_names() == sorted(NAMES)
    assert len(NAMES) == 301


def test_own_names_are_listed_too() -> None:
    own = set(catalog.names()) - set(NAMES)
    assert own == {"smollm2_135m_full_identity", "smollm2_135m_lora_identity"}


def parts_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find a name's rows in the facts, by their own rule: the longest model that fits."""
    model = max((m for m in FACTS["models"] if name.startswith(m + "_")), key=len)
    rest = name[len(model) + 1 :]
    recipe = next(k for k in FACTS["recipes"] if k.replace("/", "_") == rest)
    return FACTS["models"][model], FACTS["recipes"][recipe]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("deepspeed")])
def test_name_has_the_reference_values(name: str) -> None:
    card, facts = parts_of(name)
    recipe = load_recipe(name)
    assert recipe.model.path == card["hub_path"]
    template = facts.get("prompt_template")
    if template == "@template":
        assert recipe.model.template == card["template"]
    elif template is not None:
        assert recipe.model.template == template
    assert recipe.model.template in template_names()
    assert recipe.model.quantization == QUANTIZATION[facts.get("quantization", {}).get("bits")]
    assert recipe.model.method == ("full" if facts["method"] == "full" else "lora")
    for ours, theirs in {
        "epochs": "max_epochs",
        "micro_batch_size": "batch_size",
        "accumulation": "accumulative_counts",
        "lr": "lr",
        "weight_decay": "weight_decay",
        "log_every": "logger_interval",
    }.items():
        assert getattr(recipe.train, ours) == facts[theirs], ours
    assert recipe.train.betas == tuple(facts.get("betas", (0.9, 0.999)))
    assert recipe.train.max_norm == facts.get("max_norm", 1)
    assert recipe.train.optimizer == OPTIMIZERS[facts["optim_type"]]
    assert recipe.train.scheduler == "cosine"
    assert recipe.chat_eval.every == facts.get("evaluation_freq")
    assert recipe.chat_eval.prompts == facts.get("evaluation_inputs", [])
    assert recipe.run.workers == (8 if name.endswith("_gpu8") else 1)
    if "lora" in facts:
        lora = facts["lora"]
        assert (recipe.lora.r, recipe.lora.alpha) == (lora["r"], lora["alpha"])
        assert (recipe.lora.dropout, recipe.lora.bias) == (lora["dropout"], lora["bias"])
        assert recipe.lora.targets == lora.get("target_modules", "all-linear")


@pytest.mark.parametrize("key", sorted(FACTS["recipes"]))
def test_recipe_has_the_reference_data(key: str) -> None:
    facts = FACTS["recipes"][key]
    model = next(n for n in NAMES if n.endswith(key.replace("/", "_")))
    data = load_recipe(model).data
    assert data.max_length == facts["max_length"]
    assert data.pack == facts.get("pack_to_max_length", False)
    system = facts.get("SYSTEM", "")
    assert data.system == system.replace("{{", "{").replace("}}", "}")
    assert [source.map for source in data.sources] == [
        d.get("dataset_map_fn") for d in facts["datasets"]
    ]
    assert all(s.map is None or s.map in MAP_FUNCTIONS for s in data.sources)
    places = [
        d.get("data_file") or d.get("data_files", {}).get("train") or d.get("dataset_name")
        or d["path"]
        for d in facts["datasets"]
    ]  # fmt: skip
    assert [source.path for source in data.sources] == places
    assert [s.limit for s in data.sources] == [
        d.get("max_dataset_length") for d in facts["datasets"]
    ]


def test_bot_name_comes_from_the_card() -> None:
    assert load_recipe("qwen_7b_qlora_moss_sft_all_e1").data.fill == {"bot_name": "Qwen"}
    assert load_recipe("qwen_7b_chat_qlora_moss_sft_all_e1").data.fill == {}


def test_presets_are_the_reference_json() -> None:
    for name, content in FACTS["deepspeed"].items():
        assert catalog.preset(name) == content


def test_longest_card_wins() -> None:
    assert catalog.split("llama2_7b_chat_qlora_sql_e3") == ("llama2_7b_chat", "qlora/sql_e3")
    assert catalog.split("llama2_7b_qlora_sql_e3") == ("llama2_7b", "qlora/sql_e3")


def test_any_card_goes_with_any_recipe() -> None:
    recipe = load_recipe("smollm2_135m_qlora_oasst1_e3")
    assert recipe.model.path == "smollm2-135m-instruct"
    assert recipe.data.sources[0].map == "oasst1_map_fn"


@pytest.mark.parametrize(
    ("name", "part", "nearest"),
    [
        ("internlm_7b_qlora_oast1_e3", "recipe 'qlora_oast1_e3'", "internlm_7b_qlora_oasst1_e3"),
        ("intrnlm_7b_qlora_oasst1_e3", "no model card", "internlm_7b_qlora_oasst1_e3"),
        ("smollm2_135m_lora_identty", "recipe 'lora_identty'", "smollm2_135m_lora_identity"),
    ],
)
def test_error_names_the_part_and_the_nearest(name: str, part: str, nearest: str) -> None:
    with pytest.raises(RecipeError) as caught:
        catalog.resolve(name)
    message = str(caught.value)
    assert part in message
    assert message.endswith(f"nearest: {nearest}")
    assert "\n" not in message


def test_card_config_is_found_by_hub_path_and_by_folder_name() -> None:
    by_path = catalog.card_config("internlm/internlm-chat-7b")
    assert by_path == catalog.card_config("./internlm-chat-7b")
    assert by_path is not None
    assert (by_path["hidden_size"], by_path["num_hidden_layers"]) == (4096, 32)
    assert catalog.card_config("./no-such-model") is None


def test_every_card_has_a_shape() -> None:
    for model in catalog.models():
        card = catalog.resolve(f"{model}_qlora_oasst1_e3")["model"]
        config = catalog.card_config(card["path"])
        assert config is not None, model
        assert {"hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size"} <= set(
            config
        )


def test_list_imports_nothing_heavy() -> None:
    code = (
        "import sys; from raytune_ft.cli import dispatch; dispatch(['list']);"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(catalog.names())
