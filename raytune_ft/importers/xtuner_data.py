"""XTuner's data sets become `data.sources`."""

from __future__ import annotations

from typing import Any

from raytune_ft.config.document import nearest
from raytune_ft.data.templating.prompts import PROMPTS
from raytune_ft.importers import preference
from raytune_ft.importers.draft import Draft, Keys
from raytune_ft.importers.values import Function, Value

MAPS = (
    "alpaca_map_fn", "alpaca_zh_map_fn", "arxiv_map_fn", "code_alpaca_map_fn", "colors_map_fn",
    "crime_kg_assitant_map_fn", "default_map_fn", "law_reference_map_fn", "medical_map_fn",
    "msagent_react_map_fn", "oasst1_map_fn", "openai_map_fn", "openorca_map_fn",
    "pretrain_map_fn", "sql_map_fn", "stack_exchange_map_fn", "tiny_codes_map_fn",
    "wizardlm_map_fn",
)  # fmt: skip
"""XTuner's map functions, which data.sources.map takes by the same names."""
BRING_NO_SYSTEM = frozenset({
    "default_map_fn", "oasst1_map_fn", "pretrain_map_fn", "stack_exchange_map_fn",
    "wizardlm_map_fn", "openai_map_fn", "msagent_react_map_fn", "openorca_map_fn",
})  # fmt: skip
"""Those whose rows have no system text, or their own; XTuner gives them no other."""
PLAIN_TEXT = "pretrain_map_fn"
FILE_FORMATS = ("json", "csv", "parquet", "arrow", "text")
"""What `load_dataset` takes instead of a name, with the files in data_files."""
READERS = ("process_hf_dataset", "process_ms_dataset")
OTHER_READERS = {
    "LLaVADataset": "images are not read",
    "RefCOCOJsonDataset": "images are not read",
    "process_intern_repo_dataset": "write the rows as jsonl with `messages`",
    "build_packed_dataset": "name the rows that were packed",
    "load_intern_repo_tokenized_dataset": "name the rows before they were tokenised",
}


def convert(top: Keys) -> None:
    """Read the training data, and where there are, the MMLU questions."""
    draft = top.draft
    loader = top.section("train_dataloader")
    value = loader.get("dataset") if loader is not None else top.get("train_dataset")
    if loader is not None:
        _loader(loader)
    if value is None:
        raise draft.refuse(top.line, "no training data set", "name one in the file")
    _dataset(draft, value, "train_dataset")
    if not draft.content.get("data", {}).get("sources"):
        reason = sorted(draft.notes)[-1].what if draft.notes else "no data set is known"
        raise draft.refuse(value.line, f"no data set can be carried over ({reason})", "write one")
    _questions(top)


def _loader(loader: Keys) -> None:
    loader.carry("batch_size", "train.micro_batch_size")
    loader.drop(
        ["num_workers", "collate_fn", "persistent_workers", "pin_memory", "prefetch_factor"]
    )
    sampler = loader.section("sampler")
    if sampler is None:
        return
    if sampler.kind not in ("DefaultSampler", "InternRepoSampler", "SequenceParallelSampler"):
        sampler.note("type", f"sampler {sampler.kind} has no counterpart", "packs fill evenly")
    if sampler.plain("shuffle", True) is False:
        loader.draft.set("data.shuffle_before_pack", False, sampler.line)
    sampler.drop(["seed", "round_up", "length_property", "per_device_batch_size"])


def _dataset(draft: Draft, value: Value, path: str) -> None:
    """Add the sources of one data set, or of several that are joined."""
    keys = draft.open(value, path)
    if keys.kind == "ConcatDataset":
        inner = keys.get("datasets_cfg") or keys.get("datasets")
        parts = inner.data if inner is not None else None
        listed = list(parts.values()) if isinstance(parts, dict) else parts
        for place, part in enumerate(listed if isinstance(listed, list) else []):
            _dataset(draft, part, f"{path}[{place}]")
    elif keys.kind == "MOSSSFTDataset":
        _moss(keys)
    elif keys.kind in READERS:
        _rows(keys)
    elif keys.kind == "build_preference_dataset":
        _pairs(keys)
    else:
        keys.read |= set(keys.values)
        keys.note(
            "type", f"data set {keys.kind or 'of unknown type'} is not carried over",
            OTHER_READERS.get(keys.kind, "add its rows to data.sources"),
        )  # fmt: skip


def _moss(keys: Keys) -> None:
    file = keys.get("data_file")
    keys.carry("max_length", "data.max_length")
    name = keys.get("bot_name")
    if name is not None:
        keys.draft.set("data.fill", {"bot_name": name.plain()}, name.line)
    keys.drop(["tokenizer"])
    keys.draft.set("data.pack", False, keys.line)
    if file is not None:
        keys.draft.add_source({"path": file.plain()}, file.line)


def _rows(keys: Keys) -> None:
    """Read process_hf_dataset and its ModelScope sister."""
    draft = keys.draft
    keys.drop([
        "tokenizer", "remove_unused_columns", "map_num_proc", "use_varlen_attn", "with_image_token",
    ])  # fmt: skip
    keys.carry("max_length", "data.max_length")
    for key, name in (("pack_to_max_length", "pack"), ("shuffle_before_pack", None)):
        field = f"data.{name or key}"
        if draft.get(field) is not False or "data.sources" not in draft.content:
            draft.set(field, bool(keys.plain(key, True)), keys.line)
    factory = keys.section("template_map_fn")
    if factory is not None:
        template = factory.get("template")
        if template is not None:
            set_template(draft, template)
    keys.leave({"rename_maps": "write them as columns: {expected: yours} of the source"})
    fields = _map(keys)
    fields["limit"] = keys.plain("max_dataset_length")
    loader = keys.get("dataset")
    if loader is None:
        keys.note("dataset", "the data set is not known", "add it to data.sources")
        return
    split = keys.plain("split")
    _place(draft.open(loader, keys.name("dataset")), loader, fields, split)


def _pairs(keys: Keys) -> None:
    """Read build_preference_dataset; the rows' columns are recognised."""
    draft = keys.draft
    if keys.plain("is_reward", False):
        keys.note("is_reward", "rows of a reward model are not trained on", "is_dpo are")
        return
    packed = bool(keys.plain("use_varlen_attn", False))
    draft.set("data.pack", packed, keys.line_of("use_varlen_attn"))
    if packed:
        keys.carry("max_packed_length", "data.max_length")
        keys.drop(["max_length"])
    else:
        preference.set_length(keys, "max_length", 2048)
    draft.set("data.shuffle_before_pack", bool(keys.plain("shuffle_before_pack", True)), keys.line)
    draft.set("model.template", "tokenizer", keys.line)  # the tokenizer's own writes them there
    keys.drop(["tokenizer", "is_dpo", "reward_token_id", "num_proc", "max_packed_length"])
    function = keys.get("dataset_map_fn")
    name = None if function is None else (function.kind or str(function.plain()))
    if name is not None and name not in preference.XTUNER_MAPS:
        keys.note(
            "dataset_map_fn", f"map function {name} is not carried over",
            "columns chosen and rejected are recognised; raytune-ft inspect shows the rows",
        )  # fmt: skip
    loader = keys.get("dataset")
    if loader is None:
        keys.note("dataset", "the data set is not known", "add it to data.sources")
        return
    _place(draft.open(loader, keys.name("dataset")), loader, {}, None)


def _map(keys: Keys) -> dict[str, Any]:
    """Return the source's fields that the map function decides."""
    value = keys.get("dataset_map_fn")
    if value is None:
        return {"system": ""}
    name = str(value.plain()) if not isinstance(value.data, dict) else value.kind
    if isinstance(value.data, Function):
        _own_function(keys, value.data)
        return {"system": ""}
    if name not in MAPS:
        near = nearest(name, MAPS)
        keys.note(
            "dataset_map_fn", f"map function {name} is not known",
            f"did you mean {near}?" if near else "the columns decide; raytune-ft inspect shows it",
        )  # fmt: skip
        return {"system": ""}
    if name == PLAIN_TEXT:
        keys.draft.set("data.over_length", "split", value.line)  # no answer whose end may be lost
    return {"map": name, "system": "" if name in BRING_NO_SYSTEM else None}


def _own_function(keys: Keys, function: Function) -> None:
    """Say which format comes nearest to a function that the file defines."""
    columns = set(function.columns)
    if "messages" in columns:
        advice = "rows with `messages` are read as they are"
    elif columns & {"conversation", "conversations"}:
        advice = "rows with `conversation` or `conversations` are read as they are"
    elif {"instruction", "output"} <= columns:
        advice = "rows with instruction, input, output are read as they are"
    elif "text" in columns and len(columns) == 1:
        advice = "rows with `text` are read as they are"
    elif len(columns) >= 2:
        first, *_, last = function.columns
        advice = f"the nearest is: map: default_map_fn, columns: {{input: {first}, output: {last}}}"
    else:
        advice = "write the rows as jsonl with `messages`: {role, content}"
    keys.note(
        "dataset_map_fn",
        f"map function {function.name} of this file is not carried over"
        + (f" (it reads {', '.join(function.columns)})" if function.columns else ""),
        advice,
    )


def _place(loader: Keys, value: Value, fields: dict[str, Any], split: str | None) -> None:
    """Add the source that `load_dataset` and its like name."""
    draft = loader.draft
    if not isinstance(value.data, dict):
        draft.add_source({"path": value.plain(), "split": split, **fields}, value.line)
        return
    path = loader.get("path") or loader.get("dataset_path") or loader.get("dataset_name")
    path = path or loader.get("0")
    name, data_dir = loader.plain("name") or loader.plain("subset_name"), loader.plain("data_dir")
    name = name or loader.plain("1")
    split = loader.plain("split") or split or "train"
    files = loader.get("data_files")
    loader.drop(["cache_dir", "num_proc", "trust_remote_code", "streaming", "namespace"])
    if files is not None and (path is None or path.plain() in FILE_FORMATS):
        chosen = files.plain()
        if isinstance(chosen, dict):
            chosen = chosen.get(split, list(chosen.values()))
        for file in [chosen] if isinstance(chosen, str) else chosen:
            draft.add_source({"path": file, **fields}, files.line)
        return
    if path is None:
        loader.note("path", "the data set has no known path", "add it to data.sources")
        return
    if files is not None:
        loader.note("data_files", f"data_files {files.short()} of a hub data set", "use data_dir")
    chosen_split = split if split != "train" else None
    draft.add_source(
        {"path": path.plain(), "name": name, "data_dir": data_dir, "split": chosen_split, **fields},
        path.line,
    )


def set_template(draft: Draft, template: Value) -> None:
    """Set model.template from PROMPT_TEMPLATE.x; another one is noted."""
    name = template.plain()
    if isinstance(name, str) and name in PROMPTS:
        draft.set("model.template", name, template.line)
        return
    if isinstance(name, str):
        near = nearest(name, PROMPTS)
        hint = f"; the nearest is {near}" if near else ""
        advice = f"the model's own chat template is used (tokenizer){hint}"
        draft.note(template.line, f"prompt template {name} is not known", advice)
    else:
        draft.note(
            template.line, "a prompt template of the file's own is not carried over",
            f"the model's own chat template is used; others: {', '.join(PROMPTS)}",
        )  # fmt: skip
    draft.set("model.template", "tokenizer", template.line)


def _questions(top: Keys) -> None:
    """Carry MMLU over; other validation data is noted."""
    files: dict[str, str] = {}
    for part in ("val", "test"):
        loader, evaluator = top.get(f"{part}_dataloader"), top.get(f"{part}_evaluator")
        if loader is None:
            continue
        data = loader.plain().get("dataset", {}) if isinstance(loader.data, dict) else {}
        places = data.get("dataset", {}) if isinstance(data, dict) else {}
        given = places.get("data_files") if isinstance(places, dict) else None
        if evaluator is not None and evaluator.kind == "MMLUMetric" and isinstance(given, dict):
            files |= {part: given[part]} if part in given else {}
        else:
            top.note(
                f"{part}_dataloader", f"{part}_dataloader is not carried over",
                "set data.validation: a file, a split or a fraction",
            )  # fmt: skip
    top.read |= {"val_evaluator", "test_evaluator"}
    if files:
        top.draft.set("chat_eval.mmlu", list(files.values()), top.line)
