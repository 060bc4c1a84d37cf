"""XTuner configurations as their authors write them, made of the facts in tests/golden."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
FACTS: dict[str, Any] = json.loads((GOLDEN / "recipes.json").read_text(encoding="utf-8"))
PLACES = {
    "@hub_path": "hub_path", "@template": "template", "@stop_word": "stop_word",
    "@bot_name": "bot_name", "@tokenizer": "tokenizer", "@llm_class": "llm_class",
}  # fmt: skip


def filled(value: Any, model: dict[str, Any]) -> Any:
    """Put a model row's fields where the facts have placeholders; null removes the key."""
    if isinstance(value, dict):
        content = {key: filled(item, model) for key, item in value.items()}
        return {key: item for key, item in content.items() if item is not None}
    if isinstance(value, list):
        return [filled(item, model) for item in value]
    return model[PLACES[value]] if isinstance(value, str) and value in PLACES else value


def config_of(name: str) -> str:
    """Write the configuration of a shipped name."""
    entry = FACTS["names"].get(name) or _split(name)
    model = FACTS["models"][entry["model"]]
    row = filled(FACTS["recipes"][entry["recipe"]], model)
    parts = _huggingface(row) if row["framework"] == "huggingface" else _mmengine(row)
    return "\n".join([*_head(row), *_model(row), *_data(row), *parts]) + "\n"


def _split(name: str) -> dict[str, str]:
    model = max((m for m in FACTS["models"] if name.startswith(m + "_")), key=len)
    rest = name[len(model) + 1 :]
    recipe = next(key for key in FACTS["recipes"] if key.replace("/", "_") == rest)
    return {"model": model, "recipe": recipe}


def _head(row: dict[str, Any]) -> list[str]:
    maps = {d["dataset_map_fn"] for d in row["datasets"] if "dataset_map_fn" in d}
    return [
        "import torch",
        "from datasets import load_dataset",
        "from modelscope.msdatasets import MsDataset",
        "from bitsandbytes.optim import PagedAdamW32bit",
        "from torch.optim import AdamW",
        "from peft import LoraConfig",
        "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig",
        "from transformers import Trainer, TrainingArguments",
        "from mmengine.optim import AmpOptimWrapper, CosineAnnealingLR",
        "from mmengine.hooks import CheckpointHook, LoggerHook",
        "from xtuner.dataset import ConcatDataset, MOSSSFTDataset",
        "from xtuner.dataset import process_hf_dataset, process_ms_dataset",
        *(f"from xtuner.dataset.map_fns import {name}" for name in sorted(maps)),
        "from xtuner.dataset.map_fns import template_map_fn_factory",
        "from xtuner.engine import DatasetInfoHook, EvaluateChatHook",
        "from xtuner.model import SupervisedFinetune",
        "from xtuner.utils import PROMPT_TEMPLATE, SYSTEM_TEMPLATE",
        f"pretrained_model_name_or_path = {row['pretrained_model_name_or_path']!r}",
        f"batch_size, accumulative_counts = {row['batch_size']}, {row['accumulative_counts']}",
        f"lr, max_epochs = {row['lr']}, {row['max_epochs']}",
        f"max_length = {row['max_length']}",
    ]


def _model(row: dict[str, Any]) -> list[str]:
    tokenizer = {k: v for k, v in row["tokenizer"].items() if k != "type"}
    words = ", ".join(f"{key}={value!r}" for key, value in tokenizer.items())
    llm = "type=AutoModelForCausalLM.from_pretrained, trust_remote_code=True, "
    llm += "pretrained_model_name_or_path=pretrained_model_name_or_path, "
    if "torch_dtype" in row:
        llm += "torch_dtype=torch.float16, "
    bits = row.get("quantization", {}).get("bits")
    if bits == 4:
        llm += (
            "quantization_config=dict(type=BitsAndBytesConfig, load_in_4bit=True, "
            "bnb_4bit_compute_dtype=torch.float16, bnb_4bit_use_double_quant=True, "
            "bnb_4bit_quant_type='nf4')"
        )
    elif bits == 8:
        llm += "load_in_8bit=True"
    lora = row.get("lora")
    adapter = ""
    if lora is not None:
        targets = lora.get("target_modules")
        named = f", target_modules={targets!r}" if targets else ""
        adapter = (
            f"dict(type=LoraConfig, r={lora['r']}, lora_alpha={lora['alpha']}, lora_dropout="
            f"{lora['dropout']}, bias='none', task_type='CAUSAL_LM'{named})"
        )
    lines = [
        "tokenizer = dict(type=AutoTokenizer.from_pretrained, "
        f"pretrained_model_name_or_path=pretrained_model_name_or_path, {words})"
    ]
    if row["framework"] == "huggingface":
        return [*lines, f"model = dict({llm})", f"lora = {adapter}"]
    inner = f", lora={adapter}" if adapter else ""
    return [*lines, f"model = dict(type=SupervisedFinetune, llm=dict({llm}){inner})"]


def _data(row: dict[str, Any]) -> list[str]:
    template = row.get("dataset_template")
    lines = [f"prompt_template = PROMPT_TEMPLATE.{template}"] if template else []
    names = []
    for place, data in enumerate(row["datasets"]):
        names.append(f"data_{place}")
        lines.append(f"data_{place} = {_moss(data) if 'data_file' in data else _rows(data, row)}")
    joined = "datasets_cfg=dict(" + ", ".join(f"{n}={n}" for n in names) + ")"
    whole = f"dict(type=ConcatDataset, {joined})" if len(names) > 1 else names[0]
    return [*lines, f"train_dataset = {whole}"]


def _moss(data: dict[str, Any]) -> str:
    bot = f"bot_name={data['bot_name']!r}, " if "bot_name" in data else ""
    return (
        f"dict(type=MOSSSFTDataset, data_file={data['data_file']!r}, {bot}tokenizer=tokenizer, "
        "max_length=max_length)"
    )


def _rows(data: dict[str, Any], row: dict[str, Any]) -> str:
    if data["builder"].endswith("process_ms_dataset"):
        loader = f"dict(type=MsDataset.load, dataset_name={data['dataset_name']!r})"
    else:
        words = {"path": data["path"], "name": data.get("config_name")}
        words |= {"data_dir": data.get("data_dir"), "split": data.get("load_split")}
        words |= {"data_files": data.get("data_files")}
        given = ", ".join(f"{k}={v!r}" for k, v in words.items() if v is not None)
        loader = f"dict(type=load_dataset, {given})"
    template = (
        "template_map_fn=dict(type=template_map_fn_factory, template=prompt_template), "
        if "template" in data
        else ""
    )
    most = data.get("max_dataset_length")
    limit = f"max_dataset_length={most}, " if most is not None else ""
    return (
        f"dict(type={data['builder'].rpartition('.')[2]}, dataset={loader}, tokenizer=tokenizer, "
        f"max_length=max_length, dataset_map_fn={data['dataset_map_fn']}, {template}{limit}"
        f"remove_unused_columns=True, shuffle_before_pack=True, "
        f"pack_to_max_length={data['pack_to_max_length']})"
    )


def _mmengine(row: dict[str, Any]) -> list[str]:
    optimizer = row["optim_type"].rpartition(".")[2]
    named = row.get("SYSTEM_template")
    system = f"SYSTEM_TEMPLATE.{named}" if named else repr(row.get("SYSTEM", ""))
    hook = next(h for h in row["custom_hooks"] if h["type"].endswith("EvaluateChatHook"))
    words = f"evaluation_inputs={row['evaluation_inputs']!r}, system=SYSTEM, tokenizer=tokenizer"
    if "prompt_template" in hook:
        words += f", prompt_template=PROMPT_TEMPLATE.{hook['prompt_template']}"
    if "max_new_tokens" in hook:
        words += f", max_new_tokens={hook['max_new_tokens']}"
    return [
        f"SYSTEM = {system}",
        "train_dataloader = dict(batch_size=batch_size, num_workers=0, dataset=train_dataset)",
        f"optim_wrapper = dict(type=AmpOptimWrapper, optimizer=dict(type={optimizer}, lr=lr, "
        f"betas={tuple(row['betas'])}, weight_decay={row['weight_decay']}), "
        f"clip_grad=dict(max_norm={row['max_norm']}, error_if_nonfinite=False), "
        "accumulative_counts=accumulative_counts, loss_scale='dynamic', dtype='float16')",
        "param_scheduler = dict(type=CosineAnnealingLR, eta_min=0.0, by_epoch=True, "
        "T_max=max_epochs, convert_to_iter_based=True)",
        "train_cfg = dict(by_epoch=True, max_epochs=max_epochs, val_interval=1)",
        "custom_hooks = [dict(type=DatasetInfoHook, tokenizer=tokenizer), "
        f"dict(type=EvaluateChatHook, every_n_iters={hook['every_n_iters']}, {words})]",
        f"default_hooks = dict(logger=dict(type=LoggerHook, interval={row['logger_interval']}), "
        "checkpoint=dict(type=CheckpointHook, interval=1))",
        "randomness = dict(seed=None, deterministic=False)",
        *_mmlu(row),
    ]


def _mmlu(row: dict[str, Any]) -> list[str]:
    lines = []
    for part in ("val", "test"):
        if part in row:
            files = row[part]["dataset"]["data_files"]
            lines += [
                f"{part}_dataloader = dict(batch_size=1, dataset=dict(type=process_hf_dataset, "
                f"dataset=dict(type=load_dataset, path='json', data_files={files!r})))",
                f"{part}_evaluator = dict(type=MMLUMetric, prefix='mmlu')",
            ]
    return lines


def _huggingface(row: dict[str, Any]) -> list[str]:
    given = {k: v for k, v in row["hf_training_args"].items() if k != "type"}
    words = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return [
        "framework = 'huggingface'",
        "trainer = Trainer",
        f"training_args = dict(type=TrainingArguments, {words})",
    ]
