"""XTuner configurations (mmengine's and the Trainer's layout) become recipe fields.

Where a file is silent, the default of XTuner v0.1.9 counts, not ours. The layout of later
releases (warm-up schedulers, checkpoints by iteration, `strategy`) is read as well.
"""

from __future__ import annotations

import math
import re

from raytune_ft.config.document import nearest
from raytune_ft.data.prompts import SYSTEMS
from raytune_ft.importers import hf_arguments, xtuner_data
from raytune_ft.importers.draft import Draft, Keys
from raytune_ft.importers.places import card_of, deepspeed_name
from raytune_ft.importers.python_file import PythonFile
from raytune_ft.importers.values import Name, Value

TELLING = ("train_dataloader", "train_dataset", "optim_wrapper", "pretrained_model_name_or_path")
"""Variables that an XTuner configuration has."""
MACHINERY = (
    "env_cfg", "log_level", "log_processor", "runner_type", "default_scope", "framework",
    "launcher", "tokenizer", "trainer", "data_collator", "val_cfg", "test_cfg", "auto_scale_lr",
)  # fmt: skip
ELSEWHERE = {
    "load_from": "give the weights to start from as model.path",
    "resume": "go on with a run by: raytune-ft train --resume RUN",
    "visualizer": "run.trackers: [tensorboard]",
    "sequence_parallel_size": "sequences stay whole on one GPU",
}
OPTIMIZERS = {
    "AdamW": "adamw",
    "PagedAdamW": "paged_adamw_32bit",
    "PagedAdamW32bit": "paged_adamw_32bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "AdamW8bit": "adamw_8bit",
}
TRAINERS = ("SupervisedFinetune", "HybridFinetune", "AutoModelForCausalLM")


def convert(file: PythonFile, draft: Draft) -> None:
    """Fill a draft from the variables of a file."""
    draft.notes += file.notes
    top = draft.open(Value(file.values, 1))
    _model(top)
    xtuner_data.convert(top)
    if "training_args" in top:
        arguments = top.section("training_args")
        if arguments is not None:
            hf_arguments.convert(arguments)
        draft.set("chat_eval.every", None, top.line)
    else:
        _optimizer(top)
        _schedule(top)
        _length(top)
        _hooks(top)
    _runtime(top)
    _settle(draft)
    top.read |= file.used
    draft.close()


def _settle(draft: Draft) -> None:
    """Decide what several parts decide together: the template, and who gets no system text."""
    if draft.get("model.template") is None:
        draft.set("model.template", "none", 1)
    if not draft.get("data.system"):
        for source in draft.content["data"]["sources"]:
            source.pop("system", None)


def _model(top: Keys) -> None:
    """Read the network, its precision and the adapter."""
    draft = top.draft
    model = top.section("model")
    if model is None:
        raise draft.refuse(1, "no `model = dict(...)`", "name an XTuner configuration")
    if model.kind not in TRAINERS:
        raise draft.refuse(
            model.line, f"model is trained by {model.kind or 'something unknown'}",
            "supervised tuning (SupervisedFinetune) is what there is",
        )  # fmt: skip
    llm = model.section("llm") if "llm" in model else model
    if llm is None:
        raise draft.refuse(model.line, "model.llm is no dict(...)", "write it out in this file")
    llm.carry("pretrained_model_name_or_path", "model.path")
    llm.drop(["trust_remote_code", "attn_implementation", "use_cache", "low_cpu_mem_usage"])
    _dtype(llm)
    _quantization(llm)
    lora = model.section("lora") or top.section("lora")
    _lora(draft, lora, model.line)
    _tokenizer(top)
    checkpointing = model.plain("use_activation_checkpointing", True)
    draft.set("model.gradient_checkpointing", bool(checkpointing), model.line)
    model.drop(["use_varlen_attn", "tokenizer"])
    model.leave({
        "peft_model": "merge that adapter first (raytune-ft merge), then train the merged model",
        "max_position_embeddings": "longer contexts are for models that were trained for them",
    })  # fmt: skip


def _dtype(llm: Keys) -> None:
    name = llm.plain("torch_dtype")
    if name in ("bfloat16", "float32", "auto"):
        llm.carry("torch_dtype", "model.dtype")
    elif name is not None:
        llm.note(
            "torch_dtype", f"torch_dtype {name}: model.dtype stays auto, bfloat16 where the GPU "
            "has it, as DeepSpeed chose it there", f"or set model.dtype: {name}",
        )  # fmt: skip


def _quantization(llm: Keys) -> None:
    """Read BitsAndBytesConfig, or `load_in_8bit` beside the path."""
    config = llm.section("quantization_config") or llm
    four, eight = config.plain("load_in_4bit", False), config.plain("load_in_8bit", False)
    line = config.line
    if four:
        kind = config.plain("bnb_4bit_quant_type", "fp4")
        if kind != "nf4":
            config.note(
                "bnb_4bit_quant_type", f"4-bit type {kind} is not carried over", "nf4 is used"
            )
        llm.draft.set("model.quantization", "nf4", line)
        doubled = bool(config.plain("bnb_4bit_use_double_quant", False))
        llm.draft.set("model.double_quant", doubled, line)
    elif eight:
        llm.draft.set("model.quantization", "int8", line)
        if config.plain("llm_int8_threshold", 6.0) != 6.0:
            config.note("llm_int8_threshold", "llm_int8_threshold is not carried over", "6.0 rules")
    config.drop([
        "llm_int8_threshold", "llm_int8_has_fp16_weight", "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage",
    ])  # fmt: skip


def _lora(draft: Draft, lora: Keys | None, line: int) -> None:
    """Read LoraConfig; without one the whole model is trained. Defaults are PEFT's."""
    draft.set("model.method", "full" if lora is None else "lora", line)
    if lora is None:
        return
    for key, name, default in (("r", "r", 8), ("lora_alpha", "alpha", 8)):
        draft.set(f"lora.{name}", lora.plain(key, default), lora.line)
    draft.set("lora.dropout", lora.plain("lora_dropout", 0.0), lora.line)
    targets = lora.get("target_modules")
    if targets is not None and targets.plain() not in ("all", "all-linear"):
        names = targets.plain()
        draft.set("lora.targets", [names] if isinstance(names, str) else names, targets.line)
    lora.carry_all({
        "bias": "lora.bias", "modules_to_save": "lora.modules_to_save",
        "use_rslora": "lora.use_rslora", "use_dora": "lora.use_dora",
    })  # fmt: skip
    lora.drop(["task_type", "inference_mode"])


def _tokenizer(top: Keys) -> None:
    """Take the token that ends an answer: from the tokenizer's settings, or the model's card."""
    draft, eos = top.draft, None
    tokenizer = top.section("tokenizer")
    if tokenizer is not None:
        tokenizer.read |= set(tokenizer.values)
        eos = tokenizer.plain("eos_token")
    if eos is not None and tokenizer is not None:
        draft.set("model.eos_token", eos, tokenizer.line)
        return
    found = card_of(str(draft.get("model.path") or ""))
    if found is not None and found.eos_token is not None:
        draft.set("model.eos_token", found.eos_token, top.line)


def _optimizer(top: Keys) -> None:
    wrapper = top.section("optim_wrapper")
    if wrapper is None:
        return
    draft = top.draft
    wrapper.drop(["loss_scale", "dtype"])
    wrapper.carry("accumulative_counts", "train.accumulation")
    if "accumulative_counts" not in wrapper:
        draft.set("train.accumulation", 1, wrapper.line)
    wrapper.leave({
        "paramwise_cfg": "all trained weights share train.lr and train.weight_decay",
        "constructor": "all trained weights share train.lr and train.weight_decay",
    })  # fmt: skip
    optimizer = wrapper.section("optimizer")
    if optimizer is not None:
        name = OPTIMIZERS.get(optimizer.kind)
        if name is None:
            optimizer.note(
                "type", f"optimizer {optimizer.kind} has no counterpart", "adamw is used"
            )
        draft.set("train.optimizer", name or "adamw", optimizer.line)
        optimizer.carry_all({"lr": "train.lr", "betas": "train.betas"})
        draft.set("train.weight_decay", optimizer.plain("weight_decay", 0.01), optimizer.line)
        optimizer.leave({"eps": "AdamW's own 1e-8 is used"})
    clip = wrapper.section("clip_grad")
    if clip is None or clip.plain("max_norm") is None:
        draft.note(wrapper.line, "gradients are not clipped there", "train.max_norm is 1.0 here")
    else:
        clip.carry("max_norm", "train.max_norm")
        clip.drop(["error_if_nonfinite", "norm_type"])


def _schedule(top: Keys) -> None:
    """Read one scheduler, or a warm-up followed by one."""
    value = top.get("param_scheduler")
    if value is None:
        top.draft.set("train.scheduler", "constant", top.line)
        return
    parts = value.data if isinstance(value.data, list) else [value]
    for place, part in enumerate(parts):
        keys = top.draft.open(part, f"param_scheduler[{place}]")
        keys.drop(["by_epoch", "convert_to_iter_based", "T_max", "verbose", "end_factor"])
        end = keys.plain("end")
        if keys.kind == "LinearLR" and place + 1 < len(parts):
            _warmup(top, keys, end)
            continue
        keys.drop(["begin"])
        _decay(keys)


def _warmup(top: Keys, keys: Keys, end: float | None) -> None:
    keys.drop(["start_factor", "begin"])
    epochs = _epochs(top)
    if end is None:
        return
    if keys.plain("by_epoch", True) and epochs:
        top.draft.set("train.warmup_ratio", round(end / epochs, 6), keys.line)
    else:
        top.draft.set("train.warmup_steps", steps_of(top.draft, end), keys.line)


def _decay(keys: Keys) -> None:
    names = {"CosineAnnealingLR": "cosine", "LinearLR": "linear", "ConstantLR": "constant"}
    name = names.get(keys.kind)
    if name is None:
        keys.note("type", f"scheduler {keys.kind} has no counterpart", "cosine is used")
    keys.draft.set("train.scheduler", name or "cosine", keys.line)
    keys.carry("eta_min", "train.min_lr")
    ratio, lr = keys.plain("eta_min_ratio"), keys.draft.get("train.lr")
    if ratio is not None and isinstance(lr, int | float):
        keys.draft.set("train.min_lr", ratio * lr, keys.line)
    if name == "constant":
        keys.drop(["factor"])


def _epochs(top: Keys) -> float | None:
    train = top.values.get("train_cfg")
    content = train.plain() if train is not None else None
    return content.get("max_epochs") if isinstance(content, dict) else None


def steps_of(draft: Draft, batches: float) -> int:
    """Turn XTuner's iterations, which are micro-batches, into optimizer steps."""
    return max(1, math.ceil(batches / (draft.get("train.accumulation") or 1)))


def _length(top: Keys) -> None:
    train = top.section("train_cfg")
    if train is None:
        return
    train.carry("max_epochs", "train.epochs")
    batches = train.plain("max_iters")
    if batches is not None:
        top.draft.set("train.max_steps", steps_of(top.draft, batches), train.line)
        top.draft.set("train.epochs", 1_000_000, train.line)
    train.drop(["by_epoch", "val_interval", "val_begin"])


def _hooks(top: Keys) -> None:
    custom = top.get("custom_hooks")
    if custom is not None and isinstance(custom.data, list):
        for place, hook in enumerate(custom.data):
            _custom_hook(top.draft.open(hook, f"custom_hooks[{place}]"))
    else:
        top.draft.set("chat_eval.every", None, top.line)
    hooks = top.section("default_hooks")
    if hooks is None:
        return
    hooks.drop(["timer", "param_scheduler", "sampler_seed", "runtime_info"])
    logger, checkpoint = hooks.section("logger"), hooks.section("checkpoint")
    if logger is not None:
        logger.carry("interval", "train.log_every")
        logger.drop(["log_metric_by_epoch", "ignore_last"])
    if checkpoint is not None:
        _checkpoint(top.draft, checkpoint)


def _custom_hook(hook: Keys) -> None:
    known = {
        "DatasetInfoHook": "raytune-ft inspect shows the rows",
        "VarlenAttnArgsToMessageHubHook": "",
        "ThroughputHook": "",
        "HFCheckpointHook": "raytune-ft export writes the adapter",
    }
    if hook.kind == "EvaluateChatHook":
        _samples(hook)
    elif hook.kind in known:
        hook.read |= set(hook.values)
        hook.draft.machinery.append(hook.kind)
    else:
        hook.read |= set(hook.values)
        hook.note("type", f"hook {hook.kind or '?'} is not carried over", "see docs/recipe.md")


def _samples(hook: Keys) -> None:
    """Read the sampled prompts: XTuner's SYSTEM is for them alone."""
    draft = hook.draft
    prompts = hook.get("evaluation_inputs")
    if prompts is not None:
        texts = prompts.plain()
        draft.set("chat_eval.prompts", [texts] if isinstance(texts, str) else texts, prompts.line)
    every = hook.get("every_n_iters")
    draft.set("chat_eval.every", None if every is None else every.plain(), hook.line)
    count = draft.get("train.accumulation") or 1
    if every is not None and count > 1:
        hook.note(
            "every_n_iters", f"every_n_iters {every.plain()} counts micro-batches there, "
            f"chat_eval.every optimizer steps of {count} micro-batches",
            f"for the same rhythm set chat_eval.every: {steps_of(draft, every.plain())}",
        )  # fmt: skip
    hook.carry("max_new_tokens", "chat_eval.max_new_tokens")
    hook.drop(["tokenizer", "stop_word", "stop_words"])
    _template(hook, hook.get("prompt_template"))
    system = hook.get("system")
    if system is not None:
        _system(draft, system)
    hook.leave({
        "evaluation_images": "images are not read",
        "generation_kwargs": "samples take temperature 0.1, top_p 0.75, top_k 40",
    })  # fmt: skip


def _template(hook: Keys, template: Value | None) -> None:
    if template is not None and hook.draft.get("model.template") is None:
        xtuner_data.set_template(hook.draft, template)


def _system(draft: Draft, system: Value) -> None:
    """Set the system text; XTuner formats it, so that doubled braces stand for one."""
    text = system.plain()
    if isinstance(system.data, Name):
        text = SYSTEMS.get(text)
        if text is None:
            near = nearest(system.data.last, SYSTEMS) or ", ".join(SYSTEMS)
            draft.note(system.line, f"system template {system.data.last} is not known", near)
            return
    text = str(text).replace("{{", "{").replace("}}", "}")
    if text:
        draft.set("data.system", text, system.line)


def _checkpoint(draft: Draft, hook: Keys) -> None:
    hook.drop(["save_optimizer", "save_param_scheduler", "save_last", "filename_tmpl", "out_dir"])
    draft.set("checkpoint.keep", hook.plain("max_keep_ckpts", -1), hook.line)
    interval = hook.plain("interval", -1)
    if hook.plain("by_epoch", True):
        if interval not in (1, -1):
            hook.note("interval", f"a checkpoint every {interval} epochs", "each epoch keeps one")
        draft.set("checkpoint.every", "epoch", hook.line)
        return
    steps = steps_of(draft, interval)
    draft.set("checkpoint.every", steps, hook.line)
    if steps != interval:
        hook.note(
            "interval", f"a checkpoint every {interval} micro-batches",
            f"checkpoint.every is {steps} optimizer steps",
        )  # fmt: skip


def _runtime(top: Keys) -> None:
    draft = top.draft
    randomness = top.section("randomness")
    if randomness is not None:
        randomness.carry("seed", "train.seed")
        randomness.drop(["deterministic", "diff_rank_seed"])
    folder = top.get("work_dir")
    if folder is not None:
        hf_arguments.set_folder(draft, str(folder.plain()), folder.line)
    strategy = top.section("strategy")
    if strategy is not None:
        _strategy(strategy)
    top.drop(MACHINERY)
    top.leave({key: advice for key, advice in ELSEWHERE.items() if top.plain(key) != 1})
    workers = re.search(r"_gpu(\d+)", draft.source)
    if workers is not None:
        draft.set("run.workers", int(workers[1]), 1)


def _strategy(strategy: Keys) -> None:
    zero = strategy.plain("zero_optimization")
    strategy.read |= set(strategy.values)
    if strategy.kind != "DeepSpeedStrategy" or not isinstance(zero, dict):
        strategy.note("type", f"strategy {strategy.kind or '?'}", "choose train.deepspeed")
        return
    strategy.draft.set("train.deepspeed", deepspeed_name(zero), strategy.line)
