"""Key: recipe, tokenizer and rows in, the name under which their tokens are kept out.

Two runs share a key exactly if each row number stands for the same tokens in both, and the same
rows make a window of epoch 0. `FIELDS` says for every field of the recipe how it counts; a field
that is not listed there fails a test.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from raytune_ft.data.examples import Encoder
from raytune_ft.data.files.readers import FileReader, Reader
from raytune_ft.data.sources import RowSource
from raytune_ft.data.templating.templates import PROMPTS

Effect = Literal["value", "content", "cut", "order", "rows", "none"]

SOURCE = "data.sources[]."

FIELDS: dict[Effect, frozenset[str]] = {
    # its value counts, for a data set that of the data set
    "value": frozenset(
        {"data.compat", "data.fill", "data.system", "model.new_tokens", "train.objective"}
        | {SOURCE + name for name in ("columns", "loss", "map", "system")}
    ),
    # what it names counts: the tokenizer's files, the template's text
    "content": frozenset({"model.eos_token", "model.path", "model.template"}),
    # what they make together counts: how many tokens of a row are kept
    "cut": frozenset({"data.max_length", "data.over_length", "data.pack"}),
    # decides with the rows' chunks which rows make a window
    "order": frozenset(
        {"data.shuffle_before_pack", "data.shuffle_rows", "data.window", "train.seed"}
    ),
    # the rows that it gives count, by the files' contents and the numbers that are used
    "rows": frozenset(
        {"data.validation"}
        | {SOURCE + name for name in ("access", "data_dir", "limit", "name", "path")}
        | {SOURCE + name for name in ("split", "weight")}
    ),
    "none": frozenset(
        {"data.cache", "data.on_error"}
        | {"eval." + name for name in ("every", "export", "max_new_tokens", "metric", "metrics")}
        | {"eval." + name for name in ("min_delta", "mode", "patience", "rows")}
        | {"chat_eval.temperature", "chat_eval.top_p", "run.collective_timeout"}
        | {"run.min_workers"}
        | {"lora.init_lora_weights", "lora.loraplus_lr_ratio", "model.load_from"}
        | {"train." + name for name in ("beta", "loss_spike", "neftune_noise_alpha", "on_oom")}
        | {"model." + name for name in ("compute", "double_quant", "dtype", "fast_path")}
        | {"model.gradient_checkpointing"}
        | {"model.method", "model.quantization"}
        | {"lora." + name for name in ("alpha", "bias", "dropout", "modules_to_save", "r")}
        | {"lora.targets", "lora.use_dora", "lora.use_rslora"}
        | {"train." + name for name in ("accumulation", "betas", "deepspeed", "epochs")}
        | {"train." + name for name in ("layout", "log_every", "lr", "max_norm", "max_steps")}
        | {"train." + name for name in ("micro_batch_size", "min_lr", "optimizer", "scheduler")}
        | {"train." + name for name in ("warmup_ratio", "warmup_steps", "weight_decay")}
        | {"chat_eval." + name for name in ("every", "max_new_tokens", "mmlu", "prompts")}
        | {"chat_eval.system", "checkpoint.every", "checkpoint.keep"}
        | {"run." + name for name in ("max_failures", "name", "storage", "trackers", "workers")}
        | {"tune." + name for name in ("concurrent", "metric", "mode", "scheduler", "space")}
        | {"tune.search", "tune.shared_base", "tune.trials"}
    ),
}
"""How a recipe's field counts -> the fields."""

_LIBRARIES = ("jinja2", "tokenizers")
"""Write templates and make ids; another version may do so otherwise."""


def token_key(source: RowSource, encoder: Encoder, seed: int) -> str:
    """Return the key of a run's tokens, 64 hexadecimal digits.

    Args:
        source: rows, formats being decided.
        encoder: makes examples of rows.
        seed: decides the order.
    """
    data = encoder.data
    parts = {
        "code": _code_hash(),
        "libraries": [version(name) for name in _LIBRARIES],
        "tokenizer": _plain(encoder.tokenizer.spec),
        "template": _plain(PROMPTS.get(encoder.template)),
        "cut_at": encoder.cut_at,
        "objective": encoder.objective,
        "data": _values(data, "data."),
        "sources": [_values(one, SOURCE) for one in source.sources],
        "rows": source.fingerprint,
        "places": [_place(reader) for reader in source.readers],
        "chunks": hashlib.sha256(source.chunk_ends().tobytes()).hexdigest(),
        "order": [seed, data.window, data.shuffle_rows, data.shuffle_before_pack],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _place(reader: Reader) -> str:
    """Return where a file lies that is known by size and time: two may have both in common."""
    if not isinstance(reader, FileReader) or reader.fingerprint != reader.version:
        return ""
    return reader.blob.place


def _values(section: Any, prefix: str) -> dict[str, Any]:
    """Return a section's fields that count by value."""
    names = {field.removeprefix(prefix) for field in FIELDS["value"] if field.startswith(prefix)}
    found: dict[str, Any] = section.model_dump(mode="json")
    return {name: found[name] for name in names & found.keys()}


def _plain(content: Any) -> Any:
    """Return a dataclass's fields as JSON takes them."""
    if content is None:
        return None
    fields = dataclasses.asdict(content)
    return {
        name: sorted(value) if isinstance(value, frozenset) else value
        for name, value in fields.items()
    }


@lru_cache(maxsize=1)
def _code_hash() -> str:
    """Return a hash of this package's data code: a number to be raised by hand gets forgotten."""
    folder = Path(__file__).resolve().parents[1]
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        found.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return found.hexdigest()
