"""XTuner's optimizer, schedule, length and hooks become `train`, `chat_eval` and `checkpoint`."""

from __future__ import annotations

import math

from raytune_ft.config.document import nearest
from raytune_ft.data.templating.prompts import SYSTEMS
from raytune_ft.importers import xtuner_data
from raytune_ft.importers.draft import Draft, Keys
from raytune_ft.importers.values import Name, Value

OPTIMIZERS = {
    "AdamW": "adamw",
    "PagedAdamW": "paged_adamw_32bit",
    "PagedAdamW32bit": "paged_adamw_32bit",
    "PagedAdamW8bit": "paged_adamw_8bit",
    "AdamW8bit": "adamw_8bit",
}


def convert(top: Keys) -> None:
    """Read what mmengine's runner would do with the model and the data."""
    _optimizer(top)
    _schedule(top)
    _length(top)
    _hooks(top)


def _optimizer(top: Keys) -> None:
    wrapper = top.section("optim_wrapper")
    if wrapper is None:
        return
    draft = top.draft
    wrapper.drop(["loss_scale", "dtype"])
    count = wrapper.number("accumulative_counts", 1)
    draft.set("train.accumulation", count, wrapper.line)
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
        end = keys.number("end")
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
    ratio, lr = keys.number("eta_min_ratio"), keys.draft.get("train.lr")
    if ratio is not None and isinstance(lr, int | float):
        keys.draft.set("train.min_lr", ratio * lr, keys.line)
    if name == "constant":
        keys.drop(["factor"])


def _epochs(top: Keys) -> float | None:
    train = top.values.get("train_cfg")
    content = train.plain() if train is not None else None
    epochs = content.get("max_epochs") if isinstance(content, dict) else None
    return epochs if isinstance(epochs, int | float) else None


def steps_of(draft: Draft, batches: float) -> int:
    """Turn XTuner's iterations, which are micro-batches, into optimizer steps."""
    return max(1, math.ceil(batches / max(draft.get("train.accumulation") or 1, 1)))


def _length(top: Keys) -> None:
    train = top.section("train_cfg")
    if train is None:
        return
    train.carry("max_epochs", "train.epochs")
    batches = train.number("max_iters")
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
    every = hook.number("every_n_iters")
    draft.set("chat_eval.every", every, hook.line)
    count = draft.get("train.accumulation") or 1
    if every is not None and count > 1:
        hook.note(
            "every_n_iters", f"every_n_iters {every} counts micro-batches there, "
            f"chat_eval.every optimizer steps of {count} micro-batches",
            f"for the same rhythm set chat_eval.every: {steps_of(draft, every)}",
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
    interval = hook.number("interval", -1)
    if hook.plain("by_epoch", True) or interval < 1:
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
