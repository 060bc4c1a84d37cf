"""LLaMA-Factory's YAML becomes recipe fields.

Its data sets are named in `dataset_info.json`, which stands in `dataset_dir`, or beside the YAML.
Where the file is silent, LLaMA-Factory's default counts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raytune_ft.errors import RecipeError
from raytune_ft.importers import hf_arguments, preference
from raytune_ft.importers.draft import Draft, Keys
from raytune_ft.importers.values import Value

TELLING = ("stage", "finetuning_type", "dataset", "template", "lora_rank", "lora_target")
INFO = "dataset_info.json"
MACHINERY = (
    "trust_remote_code", "cache_dir", "use_fast_tokenizer", "flash_attn", "use_unsloth",
    "enable_liger_kernel", "low_cpu_mem_usage", "overwrite_cache", "preprocessing_num_workers",
    "preprocessing_batch_size", "streaming", "buffer_size", "media_dir", "hf_hub_token",
    "ms_hub_token", "quantization_method", "upcast_layernorm", "upcast_lmhead_output",
    "disable_gradient_checkpointing", "infer_backend", "print_param_status", "split_special_tokens",
    "eval_on_each_dataset", "ignore_pad_token_for_loss", "compute_accuracy", "ray_storage_path",
    "resources_per_worker", "placement_strategy", "quantization_device_map", "use_ray",
)  # fmt: skip
ELSEWHERE = {
    "adapter_name_or_path": "merge that adapter first (raytune-ft merge)",
    "rope_scaling": "the model's own config.json decides",
    "resize_vocab": "the vocabulary stays as it is",
    "add_tokens": "the vocabulary stays as it is",
    "add_special_tokens": "the vocabulary stays as it is",
    "shift_attn": "attention is whole inside each row",
    "tokenized_path": "name the rows before they were tokenised",
    "interleave_probs": "set weight at each of data.sources",
    "tool_format": "the model's own chat template writes tools",
    "enable_thinking": "the model's own chat template decides",
    "loraplus_lr_ratio": "all trained weights share train.lr",
    "loraplus_lr_embedding": "all trained weights share train.lr",
    "pissa_init": "adapters start from zero",
    "use_galore": "choose train.optimizer",
    "use_apollo": "choose train.optimizer",
    "use_badam": "choose train.optimizer",
    "use_muon": "choose train.optimizer",
    "use_adam_mini": "choose train.optimizer",
    "use_llama_pro": "choose model.method",
    "use_swanlab": "run.trackers: [tensorboard]",
    "early_stopping_steps": "set train.epochs or train.max_steps",
    "predict_with_generate": "chat_eval.prompts are answered during training",
}
STAGES = ("sft", "pt", "dpo")
PREFERENCE = {
    "ref_model": preference.REFERENCE,
    "ref_model_adapters": preference.REFERENCE,
    "dpo_label_smoothing": "the rows' choices are taken as certain",
    "pref_ftx": "chosen answers are learned beside by train.objective: orpo",
    "ld_alpha": "answers count whole",
}


def convert(content: Value, draft: Draft, folder: Path) -> None:
    """Fill a draft from the YAML's values; `folder` is where the file stands."""
    keys = draft.open(content)
    stage = keys.plain("stage", "sft")
    if stage not in STAGES:
        raise draft.refuse(
            keys.line_of("stage"), f"stage {stage} is not trained here", "sft, pt and dpo are"
        )
    if stage == "dpo":
        objective = preference.objective_of(keys, "pref_loss")
        preference.set_objective(keys, objective, "stage", "pref_beta")
        keys.leave({key: advice for key, advice in PREFERENCE.items() if keys.plain(key)})
        keys.drop(key for key in PREFERENCE if not keys.plain(key))
    _model(keys)
    _lora(keys)
    hf_arguments.convert(keys)
    if "gradient_checkpointing" not in keys:
        off = keys.plain("disable_gradient_checkpointing", False)
        draft.set("model.gradient_checkpointing", not off, keys.line)
    _data(keys, folder, str(stage))
    workers = keys.get("ray_num_workers")
    if workers is not None:
        draft.set("run.workers", workers.plain(), workers.line)
    keys.drop(MACHINERY)
    keys.leave(ELSEWHERE)
    draft.close()


def _model(keys: Keys) -> None:
    draft = keys.draft
    keys.carry("model_name_or_path", "model.path")
    kind = keys.plain("finetuning_type", "lora")
    line = keys.line_of("finetuning_type")
    if kind not in ("lora", "full"):
        raise draft.refuse(line, f"finetuning_type {kind} is not trained here", "use lora or full")
    draft.set("model.method", kind, line)
    bits = keys.number("quantization_bit")
    if bits is not None:
        names = {4: "nf4", 8: "int8"}
        where = keys.line_of("quantization_bit")
        if bits not in names or keys.plain("quantization_method", "bnb") not in (
            "bnb", "bitsandbytes",
        ):  # fmt: skip
            raise draft.refuse(where, f"quantization_bit {bits} by this method", "use bnb, 4 or 8")
        draft.set("model.quantization", names[bits], where)
        draft.set("model.double_quant", keys.plain("double_quantization", True), where)
        if keys.plain("quantization_type", "nf4") != "nf4":
            keys.note("quantization_type", "4-bit type fp4 is not carried over", "nf4 is used")
    template = keys.get("template")
    if template is not None:
        keys.note(
            "template", f"template {template.plain()}: the model's own chat template is used",
            "raytune-ft inspect shows the text; model.template takes another",
        )  # fmt: skip
    draft.set("model.template", "tokenizer", keys.line_of("template"))


def _lora(keys: Keys) -> None:
    draft = keys.draft
    if draft.get("model.method") != "lora":
        return
    rank = keys.number("lora_rank", 8)
    draft.set("lora.r", rank, keys.line_of("lora_rank"))
    alpha = keys.plain("lora_alpha") or 2 * rank
    draft.set("lora.alpha", alpha, keys.line_of("lora_alpha"))
    draft.set("lora.dropout", keys.plain("lora_dropout", 0.0), keys.line_of("lora_dropout"))
    targets = keys.texts("lora_target")
    if targets not in ([], ["all"]):
        draft.set("lora.targets", targets, keys.line_of("lora_target"))
    extra = keys.texts("additional_target")
    if extra:
        draft.set("lora.modules_to_save", extra, keys.line_of("additional_target"))
    keys.carry_all({"use_rslora": "lora.use_rslora", "use_dora": "lora.use_dora"})


def _data(keys: Keys, folder: Path, stage: str) -> None:
    draft = keys.draft
    packing = keys.plain("packing", stage == "pt") or keys.plain("neat_packing", False)
    if stage == "dpo":
        preference.set_length(keys, "cutoff_len", 2048)
        packing = False  # pairs are not packed there
    else:
        draft.set("data.max_length", keys.plain("cutoff_len", 2048), keys.line_of("cutoff_len"))
    draft.set("data.pack", bool(packing), keys.line_of("packing"))
    if keys.plain("disable_shuffling", False):
        draft.set("data.shuffle_before_pack", False, keys.line_of("disable_shuffling"))
    keys.carry("default_system", "data.system")
    if keys.plain("mix_strategy", "concat") != "concat":
        keys.note("mix_strategy", "data sets are mixed there", "set weight at each of data.sources")
    loss = "all" if keys.plain("train_on_prompt", False) else None
    loss = "last" if keys.plain("mask_history", False) else loss
    loss = None if stage == "dpo" else loss
    sets = _Sets(keys, folder, stage, loss)
    names, line = keys.texts("dataset"), keys.line_of("dataset")
    if not names:
        raise draft.refuse(line, "no `dataset`", "name one, or write data.sources yourself")
    for name in names:
        sets.add(name, line)
    if not draft.content["data"].get("sources"):
        raise draft.refuse(line, "no data set can be carried over", "see the lines above")
    _validation(keys, sets)


def _validation(keys: Keys, sets: _Sets) -> None:
    size, named = keys.number("val_size"), keys.texts("eval_dataset")
    if size and 0 < size < 1:
        keys.draft.set("data.validation", size, keys.line_of("val_size"))
    elif size:
        keys.note("val_size", f"val_size {size} rows", "data.validation is a fraction")
    if named:
        line = keys.line_of("eval_dataset")
        keys.draft.set("data.validation", sets.place(named[0], line)["path"], line)
        if named[1:]:
            keys.note("eval_dataset", f"eval_dataset {named[1:]}", "one file is evaluated")


class _Sets:
    """The data sets that dataset_info.json describes."""

    def __init__(self, keys: Keys, folder: Path, stage: str, loss: str | None) -> None:
        self.draft, self.stage, self.loss = keys.draft, stage, loss
        self.limit = keys.number("max_samples")
        self.folder = keys.text("dataset_dir", "data")
        self.is_online = self.folder == "ONLINE"
        places = [Path(self.folder), folder / self.folder, folder]
        self.root = next((p for p in places if (p / INFO).is_file()), None)
        self.known = _read_info(self.root / INFO) if self.root is not None else {}
        if self.root is None and not self.is_online:
            self.draft.note(
                keys.line_of("dataset_dir"), f"no {INFO} in {self.folder} or beside the file",
                "each data set is taken as a file or hub name; correct data.sources",
            )  # fmt: skip

    def add(self, name: str, line: int) -> None:
        """Add one data set to the recipe, or say why not."""
        info = self.known.get(name, {})
        if self.known and name not in self.known:
            self.draft.note(line, f"data set {name} is not in {INFO}", "correct its path")
        reason = _cannot(info, self.stage)
        if reason is not None:
            self.draft.note(line, f"data set {name}: {reason}", "write its rows as jsonl")
            return
        limits = [n for n in (self.limit, info.get("num_samples")) if n]
        fields = {**self.place(name, line), "limit": min(limits) if limits else None}
        fields |= {"loss": self.loss, **self._columns(name, info, line)}
        self.draft.add_source(fields, line)

    def place(self, name: str, line: int) -> dict[str, Any]:
        """Return where the rows of a data set are."""
        info = self.known.get(name, {})
        hub = info.get("hf_hub_url") or info.get("ms_hub_url") or info.get("om_hub_url")
        split = info.get("split") or "train"
        more = {
            "name": info.get("subset"), "data_dir": info.get("folder"),
            "split": split if split != "train" else None,
        }  # fmt: skip
        if hub:
            if "hf_hub_url" not in info:
                self.draft.note(line, f"{name} is on another hub", f"bring {hub} here as files")
            return {"path": hub, **more}
        if info.get("cloud_file_name"):
            return {"path": info["cloud_file_name"], **more}
        if info.get("file_name"):
            root = self.root if self.root is not None else Path(self.folder)
            return {"path": str(root / info["file_name"]), **more}
        return {"path": name, **more}

    def _columns(self, name: str, info: Mapping[str, Any], line: int) -> dict[str, Any]:
        """Return how the row's columns are called, as ours -> theirs where they differ."""
        columns, tags = info.get("columns") or {}, info.get("tags") or {}
        if self.stage == "pt":
            column = columns.get("prompt", "text")
            return {"map": "pretrain_map_fn", "columns": _differing({"text": column})}
        if info.get("formatting", "alpaca") == "alpaca":
            if columns.get("history"):
                self.draft.note(line, f"{name}: earlier turns (history)", "write them as messages")
            ours = {"instruction": "prompt", "input": "query"}
            if self.stage != "dpo":
                ours["output"] = "response"
            named = {our: columns[their] for our, their in ours.items() if their in columns}
            named |= self._answers(columns)
            return {"columns": _differing({**named, "system": columns.get("system", "system")})}
        by_role = tags.get("role_tag") == "role" or info.get("formatting") == "openai"
        default = "messages" if by_role else "conversations"
        odd = {k: v for k, v in tags.items() if k.endswith("_tag") and v not in _KNOWN_TAGS}
        if odd:
            self.draft.note(line, f"{name}: tags {odd}", "rename them in the rows: user, assistant")
        named = {default: columns.get("messages", "conversations"), **self._answers(columns)}
        return {"columns": _differing(named)}

    def _answers(self, columns: Mapping[str, str]) -> dict[str, str]:
        """Return the columns of a pair's answers, as ours -> theirs; none but in stage dpo."""
        if self.stage != "dpo":
            return {}
        return {side: columns.get(side, side) for side in ("chosen", "rejected")}


_KNOWN_TAGS = frozenset({
    "from", "value", "role", "content", "human", "gpt", "user", "assistant", "system",
    "observation", "function_call", "tool",
})  # fmt: skip


def _differing(columns: dict[str, str]) -> dict[str, str] | None:
    return {ours: theirs for ours, theirs in columns.items() if ours != theirs} or None


def _cannot(info: Mapping[str, Any], stage: str) -> str | None:
    if info.get("ranking") and stage != "dpo":
        return "preference pairs are trained on by stage dpo"
    if info and stage == "dpo" and not info.get("ranking"):
        return "its rows have one answer, and stage dpo compares two"
    if "script_url" in info:
        return "its loading script is never run"
    if any((info.get("columns") or {}).get(kind) for kind in ("images", "videos", "audios")):
        return "images, videos and audio are not read"
    return None


def _read_info(file: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{file}: cannot be read ({error}); correct it") from None
    if not isinstance(content, dict) or not all(isinstance(v, dict) for v in content.values()):
        raise RecipeError(f"{file}: expected an object of data sets; correct it")
    for name, info in content.items():
        for key, value in info.items():
            wanted = _KINDS.get(key, object)
            if value is not None and not isinstance(value, wanted):
                raise RecipeError(f"{file}: {name}.{key}: not of the kind that is read; correct it")
            if isinstance(value, dict) and not all(isinstance(v, str) for v in value.values()):
                raise RecipeError(f"{file}: {name}.{key}: expected texts; correct it")
    return content


_KINDS: dict[str, type] = {
    "file_name": str, "hf_hub_url": str, "ms_hub_url": str, "om_hub_url": str, "subset": str,
    "cloud_file_name": str, "split": str, "folder": str, "formatting": str, "num_samples": int,
    "columns": dict, "tags": dict,
}  # fmt: skip
