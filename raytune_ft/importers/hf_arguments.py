"""Arguments of transformers' Trainer: XTuner's Trainer layout and LLaMA-Factory have them alike.

What a file leaves out has the default of transformers' TrainingArguments.
"""

from __future__ import annotations

import math
from typing import Any

from raytune_ft.importers.draft import Draft, Keys
from raytune_ft.importers.places import deepspeed_name, split_folder

DEFAULTS: dict[str, tuple[str, Any]] = {
    "per_device_train_batch_size": ("train.micro_batch_size", 8),
    "gradient_accumulation_steps": ("train.accumulation", 1),
    "learning_rate": ("train.lr", 5e-5),
    "weight_decay": ("train.weight_decay", 0.0),
    "max_grad_norm": ("train.max_norm", 1.0),
    "logging_steps": ("train.log_every", 500),
    "seed": ("train.seed", 42),
}
XTUNER_DEFAULTS: dict[str, Any] = {
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 1,
    "lr_scheduler_type": "cosine",
    "save_strategy": "epoch",
    "logging_steps": 5,
    "output_dir": "./work_dirs",
}
"""Of XTuner's own DefaultTrainingArguments."""
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw_32bit",
    "paged_adamw": "paged_adamw_32bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
SCHEDULERS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
MACHINERY = (
    "do_train", "do_eval", "overwrite_output_dir", "ddp_find_unused_parameters", "ddp_timeout",
    "ddp_backend", "remove_unused_columns", "dataloader_num_workers", "dataloader_pin_memory",
    "per_device_eval_batch_size", "logging_strategy", "logging_first_step", "logging_dir",
    "plot_loss", "save_only_model", "local_rank", "tf32", "disable_tqdm", "log_level",
    "include_num_input_tokens_seen", "save_safetensors", "include_tokens_per_second",
    "dataloader_persistent_workers", "eval_accumulation_steps", "optim_args", "run_name",
)  # fmt: skip
ELSEWHERE = {
    "eval_strategy": "validation rows are evaluated after each epoch; set data.validation",
    "evaluation_strategy": "validation rows are evaluated after each epoch; set data.validation",
    "eval_steps": "validation rows are evaluated after each epoch",
    "load_best_model_at_end": "the last checkpoint is the result; see checkpoint.keep",
    "metric_for_best_model": "the last checkpoint is the result",
    "resume_from_checkpoint": "go on with a run by: raytune-ft train --resume RUN",
    "group_by_length": "data.pack fills packs evenly instead",
    "push_to_hub": "upload the exported adapter yourself",
    "fsdp": "choose train.deepspeed",
    "fsdp_config": "choose train.deepspeed",
    "neftune_noise_alpha": "there is no noise on embeddings",
    "torch_compile": "the network is not compiled",
    "lr_scheduler_kwargs": "see train.scheduler and train.min_lr",
    "adam_epsilon": "AdamW's own 1e-8 is used",
}


def convert(keys: Keys) -> None:
    """Fill the draft's train, checkpoint and run sections."""
    draft = keys.draft
    own = XTUNER_DEFAULTS if keys.kind == "DefaultTrainingArguments" else {}
    for key, (name, default) in DEFAULTS.items():
        draft.set(name, keys.plain(key, own.get(key, default)), keys.line_of(key))
    _length(keys)
    _schedule(keys, own.get("lr_scheduler_type", "linear"))
    draft.set(
        "train.betas", [keys.plain("adam_beta1", 0.9), keys.plain("adam_beta2", 0.999)], keys.line
    )
    _optimizer(keys)
    _checkpoint(keys, own.get("save_strategy", "steps"))
    _precision(keys)
    folder = keys.text("output_dir", own.get("output_dir"))
    if folder is not None:
        set_folder(draft, str(folder), keys.line_of("output_dir"))
    set_deepspeed(keys)
    _trackers(keys)
    keys.drop(MACHINERY)
    keys.leave({k: v for k, v in ELSEWHERE.items() if keys.plain(k) not in ("no", "none", "")})


def _length(keys: Keys) -> None:
    steps = keys.number("max_steps", -1)
    if steps > 0:
        keys.carry("max_steps", "train.max_steps")
    set_epochs(keys, "num_train_epochs", 3)


def set_epochs(keys: Keys, key: str, default: float) -> None:
    """Set whole epochs; a part of one is rounded up and noted."""
    epochs = keys.number(key, default)
    if epochs != int(epochs):
        keys.note(
            key, f"{key} {epochs:g} is no whole number",
            f"train.epochs is {math.ceil(epochs)}; train.max_steps ends a run sooner",
        )  # fmt: skip
        epochs = math.ceil(epochs)
    keys.draft.set("train.epochs", int(epochs), keys.line_of(key))


def _schedule(keys: Keys, default: str) -> None:
    set_scheduler(keys, "lr_scheduler_type", default)
    set_warmup(keys)


def set_warmup(keys: Keys) -> bool:
    """Set train.warmup_steps or train.warmup_ratio; tell whether one was named."""
    steps, ratio = keys.number("warmup_steps", 0), keys.number("warmup_ratio", 0.0)
    if isinstance(steps, float) and 0 < steps < 1:  # transformers 5 reads a fraction as a share
        steps, ratio = 0, steps
    if steps:
        keys.draft.set("train.warmup_steps", int(steps), keys.line_of("warmup_steps"))
    elif ratio:
        keys.draft.set("train.warmup_ratio", ratio, keys.line_of("warmup_ratio"))
    return "warmup_steps" in keys or "warmup_ratio" in keys


def set_scheduler(keys: Keys, key: str, default: str) -> None:
    """Set train.scheduler; one without counterpart is noted."""
    name = str(keys.plain(key, default))
    if name not in SCHEDULERS:
        keys.note(key, f"{key} {name} has no counterpart", "cosine is used")
    keys.draft.set("train.scheduler", SCHEDULERS.get(name, "cosine"), keys.line_of(key))


def _optimizer(keys: Keys) -> None:
    set_optimizer(keys, "optim", "adamw_torch")


def set_optimizer(keys: Keys, key: str, default: str) -> None:
    """Set train.optimizer; one without counterpart is noted."""
    name = str(keys.plain(key, default))
    if name not in OPTIMIZERS:
        keys.note(key, f"{key} {name} has no counterpart", "adamw is used")
    keys.draft.set("train.optimizer", OPTIMIZERS.get(name, "adamw"), keys.line_of(key))


def _checkpoint(keys: Keys, default: str) -> None:
    strategy = keys.plain("save_strategy", default)
    steps = keys.number("save_steps", 500)
    every = steps if strategy == "steps" and steps >= 1 else "epoch"
    if strategy not in ("steps", "epoch"):
        keys.note("save_strategy", f"save_strategy {strategy}", "each epoch ends in a checkpoint")
    keys.draft.set("checkpoint.every", every, keys.line_of("save_steps"))
    keys.draft.set("checkpoint.keep", keys.plain("save_total_limit", -1), keys.line)


def _precision(keys: Keys) -> None:
    """Set the compute type; float16 is left to the GPU, as everywhere."""
    if keys.plain("bf16", False) or keys.plain("pure_bf16", False):
        keys.draft.set("model.dtype", "bfloat16", keys.line_of("bf16"))
    elif keys.plain("fp16", False):
        keys.note(
            "fp16", "fp16: model.dtype stays auto, bfloat16 where the GPU has it",
            "or set model.dtype: float16",
        )  # fmt: skip
    checkpointing = keys.get("gradient_checkpointing")
    if checkpointing is not None:
        keys.draft.set(
            "model.gradient_checkpointing", bool(checkpointing.plain()), checkpointing.line
        )
    keys.drop(["gradient_checkpointing_kwargs"])


def set_folder(draft: Draft, folder: str, line: int) -> None:
    """Split an output folder into run.storage and run.name."""
    storage, name = split_folder(folder)
    draft.set("run.storage", storage, line)
    draft.set("run.name", name, line)


def set_deepspeed(keys: Keys) -> None:
    """Set train.deepspeed from a file's name or from the file's content."""
    value = keys.get("deepspeed")
    if value is None:
        return
    given = keys.mapping("deepspeed") if isinstance(value.data, dict) else keys.text("deepspeed")
    if given:
        keys.draft.set("train.deepspeed", deepspeed_name(given), value.line)


def _trackers(keys: Keys) -> None:
    others = [
        name for name in keys.texts("report_to") if name not in ("tensorboard", "none", "all")
    ]
    if others:
        keys.note("report_to", f"report_to {', '.join(others)} has no counterpart", "tensorboard")
