"""Shipped names: the whole list, and each name's values against XTuner v0.1.9's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config import catalog
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.data.rows.formats import MAP_FUNCTIONS
from raytune_ft.data.templating.templates import template_names
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


def test_newer_cards_are_listed_with_every_recipe() -> None:
    others = set(catalog.names()) - set(NAMES)
    newer = catalog.newer_models()
    assert {"qwen3_8b", "llama3_1_8b_instruct", "gemma2_9b_it", "phi4", "glm4_9b"} <= set(newer)
    assert others == {
        f"{model}_{recipe.replace('/', '_')}" for model in newer for recipe in catalog.recipes()
    }
    assert len(set(catalog.models()) - set(newer)) == 25
    assert len(set(catalog.recipes()) - {"full/identity", "lora/identity"}) == 33


def parts_of(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Find a name's rows in the facts, by their own rule: the longest model that fits."""
    model = max((m for m in FACTS["models"] if name.startswith(m + "_")), key=len)
    rest = name[len(model) + 1 :]
    recipe = next(k for k in FACTS["recipes"] if k.replace("/", "_") == rest)
    return FACTS["models"][model], FACTS["recipes"][recipe]


RECIPE_NAMES = [n for n in NAMES if not n.startswith("deepspeed")]

SEEN = {
    "method", "data_paths", "dataset_map_fn", "datasets", "max_length", "pack_to_max_length",
    "shuffle_before_pack", "max_dataset_length", "batch_size", "accumulative_counts",
    "max_epochs", "optim_type", "lr", "betas", "weight_decay", "max_norm", "scheduler",
    "logger_interval", "SYSTEM", "SYSTEM_template", "bot_name", "evaluation_freq",
    "evaluation_inputs", "custom_hooks", "save", "lora", "quantization", "prompt_template",
    "dataset_template", "pretrained_model_name_or_path", "tokenizer", "test", "val",
    "hf_training_args", "concat_dataset", "model_wrapper", "sampler",
}  # fmt: skip
"""Fields of the reference's table that the tests below compare."""
NO_COUNTERPART = {
    "framework": "one loop trains all",
    "llm_class": "families are recognised from config.json",
    "trust_remote_code": "never",
    "torch_dtype": "dtype auto; fp16 compute under bf16 is a defect of the reference",
    "optim_wrapper": "mixed precision is dtype's matter",
    "dataloader_num_workers": "Ray Data reads",
    "collate_fn": "one collation",
    "remove_unused_columns": "columns are chosen by the format",
    "template_map_fn": "a template is always applied",
    "hf_trainer": "one loop trains all",
}


def test_every_field_of_the_reference_is_compared_or_has_none_of_ours() -> None:
    known = {field for recipe in FACTS["recipes"].values() for field in recipe}
    assert known == SEEN | set(NO_COUNTERPART)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_name_has_the_reference_model(name: str) -> None:
    card, facts = parts_of(name)
    model = load_recipe(name).model
    assert model.path == card["hub_path"]
    template = facts.get("prompt_template")
    if template is not None:
        assert model.template == (card["template"] if template == "@template" else template)
        assert facts.get("dataset_template", template) == template
    else:
        assert (card["template"], model.template) == ("None", "none")
    assert model.template in template_names()
    quantization = facts.get("quantization", {})
    assert model.quantization == QUANTIZATION[quantization.get("bits")]
    if "double_quant" in quantization:
        assert model.double_quant == quantization["double_quant"]
    assert model.method == ("full" if facts["method"] == "full" else "lora")
    assert model.gradient_checkpointing is True  # SupervisedFinetune's own default
    assert model.eos_token == card["eos_token"]


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_name_has_the_reference_optimisation(name: str) -> None:
    _, facts = parts_of(name)
    recipe = load_recipe(name)
    train, schedule = recipe.train, facts["scheduler"]
    for ours, theirs in {
        "epochs": "max_epochs",
        "micro_batch_size": "batch_size",
        "accumulation": "accumulative_counts",
        "lr": "lr",
        "weight_decay": "weight_decay",
        "log_every": "logger_interval",
    }.items():
        assert getattr(train, ours) == facts[theirs], ours
    assert train.betas == tuple(facts.get("betas", (0.9, 0.999)))
    assert train.max_norm == facts.get("max_norm", 1)
    assert train.optimizer == OPTIMIZERS[facts["optim_type"]]
    assert "cosine" in schedule["type"].lower()
    assert train.scheduler == "cosine"
    assert train.min_lr == schedule.get("eta_min", 0.0)
    assert train.epochs == schedule.get("T_max", train.epochs)
    assert train.warmup_steps == schedule.get("warmup_steps")
    assert train.warmup_ratio == 0.0
    assert train.max_steps is None
    assert recipe.run.workers == (8 if name.endswith("_gpu8") else 1)


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_name_has_the_reference_adapter(name: str) -> None:
    _, facts = parts_of(name)
    if "lora" not in facts:
        return
    lora, ours = facts["lora"], load_recipe(name).lora
    assert (ours.r, ours.alpha, ours.dropout) == (lora["r"], lora["alpha"], lora["dropout"])
    assert (ours.bias, ours.use_dora, ours.use_rslora) == (lora["bias"], False, False)
    assert ours.targets == lora.get("target_modules", "all-linear")
    assert ours.modules_to_save == []


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_name_has_the_reference_samples_and_checkpoints(name: str) -> None:
    card, facts = parts_of(name)
    recipe = load_recipe(name)
    evaluation, save = recipe.chat_eval, facts["save"]
    hook = next((h for h in facts.get("custom_hooks", []) if "EvaluateChat" in h["type"]), {})
    assert evaluation.every == facts.get("evaluation_freq") == hook.get("every_n_iters")
    assert evaluation.prompts == facts.get("evaluation_inputs", [])
    assert evaluation.max_new_tokens == hook.get("max_new_tokens", 600)
    assert evaluation.system is None  # the same text as data.system
    tested = [facts[part]["dataset"] for part in ("val", "test") if part in facts]
    assert evaluation.mmlu == [d["data_files"][d["split"]] for d in tested]
    by_epoch = save["strategy"] != "steps"
    assert recipe.checkpoint.every == ("epoch" if by_epoch else save["interval"])
    default_keep = FACTS["defaults"]["CheckpointHook"]["max_keep_ckpts"]
    assert recipe.checkpoint.keep == save.get("max_keep_ckpts", default_keep)
    bot_name = card["bot_name"] if facts.get("bot_name") == "@bot_name" else None
    assert recipe.data.fill == ({"bot_name": bot_name} if bot_name else {})


@pytest.mark.parametrize("name", RECIPE_NAMES)
def test_name_has_the_reference_data(name: str) -> None:
    _, facts = parts_of(name)
    data = load_recipe(name).data
    assert data.max_length == facts["max_length"]
    assert data.pack == facts.get("pack_to_max_length", False)
    assert data.shuffle_before_pack == facts.get("shuffle_before_pack", True)
    assert data.system == facts.get("SYSTEM", "").replace("{{", "{").replace("}}", "}")
    for source, theirs in zip(data.sources, facts["datasets"], strict=True):
        files = theirs.get("data_files", {})
        places = [theirs.get("data_file"), files.get("train"), theirs.get("dataset_name")]
        assert source.path == next((p for p in places if p), theirs.get("path"))
        assert source.name == theirs.get("config_name")
        assert source.data_dir == theirs.get("data_dir")
        assert source.split == theirs.get("load_split", "train")
        assert source.limit == theirs.get("max_dataset_length")
        assert theirs["max_length"] == data.max_length
        assert theirs.get("pack_to_max_length", False) == data.pack
        assert source.weight == 1.0
        if "dataset_map_fn" in theirs:
            assert source.map == theirs["dataset_map_fn"]
            assert source.map in MAP_FUNCTIONS


@pytest.mark.parametrize("key", sorted(FACTS["recipes"]))
def test_rows_get_no_system_text_that_the_reference_keeps_for_samples(key: str) -> None:
    """SYSTEM is for sampled prompts; training rows have what their map function gives."""
    map_functions = json.loads((GOLDEN / "map_fns.json").read_text(encoding="utf-8"))
    data = load_recipe(next(n for n in NAMES if n.endswith(key.replace("/", "_")))).data
    for source in data.sources:
        if source.map is None:
            continue  # MOSS rows bring their own
        own = map_functions[source.map]["system_template"]
        assert own is not None or (data.system if source.system is None else source.system) == ""


def test_bot_name_comes_from_the_card() -> None:
    assert load_recipe("qwen_7b_qlora_moss_sft_all_e1").data.fill == {"bot_name": "Qwen"}
    # the name in the rows themselves, where a card has none: {bot_name} is filled all the same
    assert load_recipe("qwen_7b_chat_qlora_moss_sft_all_e1").data.fill == {"bot_name": "MOSS"}


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


def test_targets_are_named_as_the_network_names_them() -> None:
    def targets(name: str) -> object:
        return load_recipe(name).lora.targets

    assert targets("phi4_qlora_open_platypus_e1") == ["gate_up_proj", "down_proj"]
    assert targets("qwen3_8b_qlora_open_platypus_e1") == ["gate_proj", "down_proj", "up_proj"]
    assert targets("qwen3_8b_qlora_stack_exchange_example") == "all-linear"
    assert targets("starcoder_qlora_stack_exchange_example") == ["c_proj", "c_attn", "q_attn"]


@pytest.mark.parametrize(
    ("name", "part", "nearest"),
    [
        ("internlm_7b_qlora_oast1_e3", "recipe 'qlora_oast1_e3' is not",
         "internlm_7b_qlora_oasst1_e3"),
        ("intrnlm_7b_qlora_oasst1_e3", "model 'intrnlm_7b' is not", "internlm_7b_qlora_oasst1_e3"),
        ("smollm2_135m_lora_identty", "recipe 'lora_identty' is not", "smollm2_135m_lora_identity"),
        ("qwen3_9b_qlora_alpaca_e3", "model 'qwen3_9b' is not", "qwen3_8b_qlora_alpaca_e3"),
        ("qwen3_8b_qlora_alpca_e3", "recipe 'qlora_alpca_e3' is not", "qwen3_8b_qlora_alpaca_e3"),
        ("intrnlm_7b_qlra_oasst1_e3", "no model card fits its beginning, no recipe its end",
         "internlm_7b_qlora_oasst1_e3"),
        ("deepspeed_zero4", "no model card", "deepspeed_zero3"),
    ],
)  # fmt: skip
def test_error_names_the_part_and_the_nearest(name: str, part: str, nearest: str) -> None:
    with pytest.raises(RecipeError) as caught:
        catalog.resolve(name)
    message = str(caught.value)
    assert part in message
    assert message.endswith(f"nearest: {nearest}")
    assert "\n" not in message


def test_a_preset_is_no_recipe() -> None:
    with pytest.raises(RecipeError, match=r"set train\.deepspeed=zero2_offload"):
        catalog.resolve("deepspeed_zero2_offload")


def test_card_config_is_found_by_hub_path_and_by_folder_name() -> None:
    by_path = catalog.card_config("internlm/internlm-chat-7b")
    assert by_path == catalog.card_config("./internlm-chat-7b")
    assert by_path is not None
    assert (by_path["hidden_size"], by_path["num_hidden_layers"]) == (4096, 32)
    assert catalog.card_config("./no-such-model") is None


def test_all_names_resolve() -> None:
    """Prints the time: `pytest -s tests/config/test_catalog.py -k all_names`."""
    start = time.perf_counter()
    recipes = [load_recipe(name) for name in RECIPE_NAMES]
    presets = [catalog.preset(name) for name in catalog.PRESETS]
    seconds = time.perf_counter() - start
    print(f"{len(recipes) + len(presets)} names in {seconds:.2f} s")
    assert len(recipes) + len(presets) == 301
    assert all(catalog.resolve(name)["model"]["path"] for name in catalog.recipe_names())


def test_newer_recipes_are_valid() -> None:
    for name in catalog.recipe_names():
        Recipe.model_validate(catalog.resolve(name))


def test_list_imports_nothing_heavy() -> None:
    code = (
        "import sys; from raytune_ft.cli import dispatch; dispatch(['list']);"
        "heavy = {'torch', 'ray', 'transformers', 'numpy', 'rich'} & set(sys.modules);"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(catalog.names())
