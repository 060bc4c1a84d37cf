"""XTuner configurations (mmengine's and the Trainer's layout) become recipe fields.

Where a file is silent, the default of XTuner v0.1.9 counts, not ours. The layout of later
releases (warm-up schedulers, checkpoints by iteration, `strategy`) is read as well.
"""

from __future__ import annotations

import re

from raytune_ft.importers import hf_arguments, preference, xtuner_data, xtuner_train
from raytune_ft.importers.draft import Draft, Keys
from raytune_ft.importers.places import card_of, deepspeed_name
from raytune_ft.importers.python_file import PythonFile
from raytune_ft.importers.values import Value

TELLING = ("train_dataloader", "train_dataset", "optim_wrapper", "pretrained_model_name_or_path")
"""Variables that an XTuner configuration has."""
MACHINERY = (
    "env_cfg", "log_level", "log_processor", "runner_type", "default_scope", "framework",
    "launcher", "tokenizer", "trainer", "data_collator", "val_cfg", "test_cfg", "auto_scale_lr",
)  # fmt: skip
ELSEWHERE = {
    "load_from": "give a run or an adapter folder as model.load_from",
    "resume": "go on with a run by: raytune-ft train --resume RUN",
    "visualizer": "run.trackers: [tensorboard]",
    "sequence_parallel_size": "sequences stay whole on one GPU",
}
TRAINERS = ("SupervisedFinetune", "HybridFinetune", "AutoModelForCausalLM")
PREFERENCE = {"DPO": "dpo", "ORPO": "orpo"}
"""Networks of preference training -> the objective."""


def convert(file: PythonFile, draft: Draft) -> None:
    """Fill a draft from the variables of a file."""
    draft.notes += file.notes
    top = draft.open(Value(file.values, 1))
    top.unread_means = "nothing that is read here uses it"
    _model(top)
    xtuner_data.convert(top)
    if "training_args" in top:
        arguments = top.section("training_args")
        if arguments is not None:
            hf_arguments.convert(arguments)
        draft.set("chat_eval.every", None, top.line)
    else:
        xtuner_train.convert(top)
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
    if model.kind in PREFERENCE:
        _objective(model)
    elif model.kind not in TRAINERS:
        raise draft.refuse(
            model.line, f"model is trained by {model.kind or 'something unknown'}",
            "SupervisedFinetune, DPO and ORPO are what there is",
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


def _objective(model: Keys) -> None:
    objective = PREFERENCE[model.kind]
    if objective == "dpo":
        objective = preference.objective_of(model, "loss_type")
    preference.set_objective(model, objective, "type", "beta")
    model.drop(["ref_llm"])  # frozen there as here: the model that the run begins with
    if model.plain("label_smoothing"):
        model.leave({"label_smoothing": "the rows' choices are taken as certain"})


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
