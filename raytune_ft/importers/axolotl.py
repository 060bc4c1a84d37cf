"""Axolotl's YAML becomes recipe fields. Where the file is silent, Axolotl's default counts."""

from __future__ import annotations

from typing import Any

from raytune_ft.importers import hf_arguments, preference
from raytune_ft.importers.axolotl_data import add_dataset
from raytune_ft.importers.draft import Draft, Keys
from raytune_ft.importers.values import Value

TELLING = ("base_model", "datasets", "sequence_len", "micro_batch_size")
DEFAULTS: dict[str, tuple[str, Any]] = {
    "sequence_len": ("data.max_length", 512),
    "micro_batch_size": ("train.micro_batch_size", 1),
    "gradient_accumulation_steps": ("train.accumulation", 1),
    "weight_decay": ("train.weight_decay", 0.0),
    "max_grad_norm": ("train.max_norm", 1.0),
    "seed": ("train.seed", 42),
}
DEFAULT_WARMUP = 0.03
"""Share of the steps, at most 100 of them, without warmup_steps and warmup_ratio."""
MACHINERY = (
    "model_type", "tokenizer_type", "tokenizer_config", "base_model_config", "strict", "tf32",
    "trust_remote_code", "tokenizer_use_fast", "tokenizer_legacy", "is_llama_derived_model",
    "is_mistral_derived_model", "is_qwen_derived_model", "is_falcon_derived_model",
    "dataset_prepared_path", "pad_to_sequence_len", "eval_sample_packing", "flash_attention",
    "sdp_attention", "xformers_attention", "eager_attention", "flex_attention",
    "flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_mlp", "local_rank",
    "dataset_processes", "dataloader_num_workers", "dataloader_prefetch_factor", "ddp_timeout",
    "dataloader_pin_memory", "sample_packing_eff_est", "sample_packing_bin_size",
    "sample_packing_group_size", "special_tokens", "eval_batch_size", "eval_table_size",
    "eval_max_new_tokens", "lora_fan_in_fan_out", "gradient_checkpointing_kwargs", "use_ray",
    "logging_first_step", "shuffle_merged_datasets", "remove_unused_columns", "debug",
    "lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "low_cpu_mem_usage", "device_map",
    "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy",
    "plugins", "save_safetensors", "hf_use_auth_token", "ddp_find_unused_parameters",
    "use_tensorboard", "attn_implementation", "skip_prepare_dataset", "liger_layer_norm",
)  # fmt: skip
ELSEWHERE = {
    "lora_model_dir": "merge that adapter first (raytune-ft merge)",
    "unfrozen_parameters": "choose model.method",
    "fsdp": "choose train.deepspeed",
    "fsdp_config": "choose train.deepspeed",
    "group_by_length": "data.pack fills packs evenly instead",
    "curriculum_sampling": "data.shuffle_before_pack: false keeps the order",
    "resume_from_checkpoint": "go on with a run by: raytune-ft train --resume RUN",
    "auto_resume_from_checkpoints": "go on with a run by: raytune-ft train --resume RUN",
    "early_stopping_patience": "set train.epochs or train.max_steps",
    "evals_per_epoch": "validation rows are evaluated after each epoch",
    "eval_steps": "validation rows are evaluated after each epoch",
    "eval_strategy": "validation rows are evaluated after each epoch",
    "load_best_model_at_end": "the last checkpoint is the result",
    "neftune_noise_alpha": "there is no noise on embeddings",
    "noisy_embedding_alpha": "there is no noise on embeddings",
    "tokens": "the vocabulary stays as it is",
    "added_tokens_overrides": "the vocabulary stays as it is",
    "loraplus_lr_ratio": "all trained weights share train.lr",
    "embedding_lr": "all trained weights share train.lr",
    "lr_groups": "all trained weights share train.lr",
    "peft_layers_to_transform": "adapters are put into every layer",
    "relora": "one adapter is trained to the end",
    "loftq_config": "adapters start from zero",
    "s2_attention": "attention is whole inside each row",
    "sequence_parallel_degree": "sequences stay whole on one GPU",
    "torch_compile": "the network is not compiled",
    "dataset_exact_deduplication": "remove doubles from the rows beforehand",
    "chat_template_jinja": "write it into the model folder as chat_template.jinja",
    "gptq": "name the model before it was quantised",
    "wandb_project": "run.trackers: [tensorboard]",
    "mlflow_tracking_uri": "run.trackers: [tensorboard]",
    "hub_model_id": "upload the exported adapter yourself",
    "save_only_model": "checkpoints hold the optimizer too, so that a run can go on",
    "adam_epsilon": "AdamW's own 1e-8 is used",
    "optim_args": "see train.optimizer",
    "lr_scheduler_kwargs": "see train.scheduler and train.min_lr",
}
BETAS = {"dpo": ("rl_beta", "dpo_beta"), "orpo": ("orpo_alpha", "rl_beta")}
PREFERENCE = {
    "dpo_label_smoothing": "the rows' choices are taken as certain",
    "rpo_alpha": "chosen answers are learned beside by rl: orpo",
    "dpo_use_weighting": "pairs weigh the same",
    "precompute_ref_log_probs": preference.REFERENCE,
}
TRACKERS = ("wandb_", "mlflow_", "comet_")


def convert(content: Value, draft: Draft) -> None:
    """Fill a draft from the YAML's values."""
    keys = draft.open(content)
    for key in ("reward_model", "process_reward_model"):
        if keys.plain(key):
            raise preference.not_trained(keys, key, keys.plain(key))
    _model(keys)
    _lora(keys)
    _train(keys)
    _objective(keys)
    _data(keys)
    keys.drop(k for k in keys.values if k.startswith(TRACKERS) and k not in ELSEWHERE)
    keys.drop(MACHINERY)
    keys.leave(ELSEWHERE)
    draft.close()


def _model(keys: Keys) -> None:
    draft = keys.draft
    keys.carry("base_model", "model.path")
    adapter = keys.plain("adapter")
    if adapter not in (None, "", "lora", "qlora"):
        raise draft.refuse(
            keys.line_of("adapter"), f"adapter {adapter} is not trained here", "use lora or qlora"
        )
    draft.set("model.method", "lora" if adapter else "full", keys.line_of("adapter"))
    four, eight = keys.plain("load_in_4bit", False), keys.plain("load_in_8bit", False)
    if adapter and (four or adapter == "qlora"):
        draft.set("model.quantization", "nf4", keys.line_of("load_in_4bit"))
        draft.set("model.double_quant", True, keys.line_of("load_in_4bit"))
    elif adapter and eight:
        draft.set("model.quantization", "int8", keys.line_of("load_in_8bit"))
    bf16 = keys.plain("bf16", "auto")
    if bf16 is True or keys.plain("bfloat16", False):
        draft.set("model.dtype", "bfloat16", keys.line_of("bf16"))
    elif keys.plain("fp16", False) or keys.plain("float16", False):
        keys.note(
            "fp16", "fp16: model.dtype stays auto, bfloat16 where the GPU has it",
            "or set model.dtype: float16",
        )  # fmt: skip
    checkpointing = keys.get("gradient_checkpointing")
    on = checkpointing is not None and bool(checkpointing.plain())
    draft.set("model.gradient_checkpointing", on, keys.line_of("gradient_checkpointing"))
    _template(keys)


def _template(keys: Keys) -> None:
    name = keys.plain("chat_template", "tokenizer_default")
    if not str(name).startswith("tokenizer_default"):
        keys.note(
            "chat_template", f"chat_template {name}: the model's own is used",
            "raytune-ft inspect shows the text; model.template takes another",
        )  # fmt: skip
    keys.draft.set("model.template", "tokenizer", keys.line_of("chat_template"))
    special = keys.plain("special_tokens", {})
    eos = special.get("eos_token") if isinstance(special, dict) else None
    if eos is not None:
        keys.draft.set("model.eos_token", eos, keys.line_of("special_tokens"))
    keys.carry("default_system_message", "data.system")


def _lora(keys: Keys) -> None:
    draft = keys.draft
    if draft.get("model.method") != "lora":
        keys.drop(k for k in keys.values if k.startswith("lora_"))
        return
    for key, name, default in (("lora_r", "r", 8), ("lora_alpha", "alpha", 8)):
        draft.set(f"lora.{name}", keys.plain(key, default), keys.line_of(key))
    draft.set("lora.dropout", keys.plain("lora_dropout", 0.0), keys.line_of("lora_dropout"))
    named = keys.get("lora_target_modules")
    every = keys.plain("lora_target_linear", False)
    if named is not None and not every and named.plain() != "all-linear":
        given = named.plain()
        draft.set("lora.targets", [given] if isinstance(given, str) else given, named.line)
    elif named is None and not every:
        keys.note("lora_target_linear", "no LoRA targets are named", "lora.targets is all-linear")
    keys.carry_all({
        "lora_modules_to_save": "lora.modules_to_save", "peft_use_dora": "lora.use_dora",
        "peft_use_rslora": "lora.use_rslora",
    })  # fmt: skip


def _train(keys: Keys) -> None:
    draft = keys.draft
    for key, (name, default) in DEFAULTS.items():
        draft.set(name, keys.plain(key, default), keys.line_of(key))
    keys.carry_all({"learning_rate": "train.lr", "logging_steps": "train.log_every"})
    hf_arguments.set_epochs(keys, "num_epochs", 1)
    keys.carry("max_steps", "train.max_steps")
    hf_arguments.set_optimizer(keys, "optimizer", "adamw_torch_fused")
    hf_arguments.set_scheduler(keys, "lr_scheduler", "cosine")
    betas = [keys.plain("adam_beta1", 0.9), keys.plain("adam_beta2", 0.999)]
    draft.set("train.betas", betas, keys.line_of("adam_beta1"))
    ratio, lr = keys.number("cosine_min_lr_ratio"), draft.get("train.lr")
    if ratio and isinstance(lr, int | float):
        draft.set("train.min_lr", ratio * lr, keys.line_of("cosine_min_lr_ratio"))
    _warmup(keys)
    _checkpoint(keys)
    hf_arguments.set_deepspeed(keys)
    folder = keys.text("output_dir", "./model-out")
    hf_arguments.set_folder(draft, str(folder), keys.line_of("output_dir"))
    keys.carry("ray_num_workers", "run.workers")
    if "batch_size" in keys:
        keys.note("batch_size", "batch_size over all GPUs", "train.accumulation decides")


def _warmup(keys: Keys) -> None:
    if hf_arguments.set_warmup(keys):
        return
    keys.draft.set("train.warmup_ratio", DEFAULT_WARMUP, keys.line)
    keys.draft.note(
        keys.line, "no warm-up is named: Axolotl takes 3 % of the steps, at most 100",
        f"train.warmup_ratio is {DEFAULT_WARMUP}",
    )  # fmt: skip


def _checkpoint(keys: Keys) -> None:
    steps, per_epoch = keys.plain("save_steps"), keys.plain("saves_per_epoch")
    if isinstance(steps, int) and steps >= 1:
        keys.carry("save_steps", "checkpoint.every")
    elif steps is not None or (per_epoch or 1) != 1:
        key = "save_steps" if steps is not None else "saves_per_epoch"
        keys.note(key, f"{key} {steps or per_epoch}", "checkpoint.every is epoch; or set steps")
    keys.drop(["save_strategy"])
    keep = keys.plain("save_total_limit", 4)
    keys.draft.set("checkpoint.keep", keep, keys.line_of("save_total_limit"))


def _objective(keys: Keys) -> None:
    """Read `rl`: pairs have twice the length of an answer, and are not packed there."""
    method = keys.plain("rl")
    if not method:
        return
    if method not in preference.OBJECTIVES:
        raise preference.not_trained(keys, "rl", method)
    beta = next((key for key in BETAS[method] if key in keys), BETAS[method][0])
    preference.set_objective(keys, method, "rl", beta)
    preference.set_length(keys, "sequence_len", 512)
    keys.leave(PREFERENCE)


def _data(keys: Keys) -> None:
    draft = keys.draft
    draft.set(
        "data.pack", bool(keys.plain("sample_packing", False)), keys.line_of("sample_packing")
    )
    pairs = draft.get("train.objective") is not None
    if pairs:
        draft.set("data.pack", False, keys.line_of("sample_packing"))
    loss = "all" if keys.plain("train_on_inputs", False) and not pairs else None
    for key in ("datasets", "pretraining_dataset"):
        sets = keys.get(key)
        items = sets.data if sets is not None and isinstance(sets.data, list) else []
        for place, item in enumerate(items):
            is_text = key == "pretraining_dataset"
            opened = draft.open(item, f"{key}[{place}]")
            add_dataset(opened, loss, is_text=is_text, are_pairs=pairs)
    if not draft.content["data"].get("sources"):
        raise draft.refuse(
            keys.line_of("datasets"), "no data set can be carried over", "name one in `datasets`"
        )
    _validation(keys)


def _validation(keys: Keys) -> None:
    size, sets = keys.number("val_set_size"), keys.get("test_datasets")
    if size and 0 < size < 1:
        keys.draft.set("data.validation", size, keys.line_of("val_set_size"))
    elif size:
        keys.note("val_set_size", f"val_set_size {size} rows", "data.validation is a fraction")
    if sets is not None and isinstance(sets.data, list) and sets.data:
        first = keys.draft.open(sets.data[0], "test_datasets[0]")
        keys.draft.set("data.validation", first.text("path"), sets.line)
        first.read |= {"ds_type", "split"}
        if len(sets.data) > 1:
            keys.note("test_datasets", "only the first of test_datasets is read", "join them")
