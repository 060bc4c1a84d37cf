"""What a path given to chat or serve is, found from small files alone: no torch, no weights.

A run folder, `adapter/`, `model/` or `merged/` inside one, an adapter or merged folder that was
moved elsewhere, a plain model folder, or the default model's name.

Facts are taken from the nearest record: `raytune_ft.json` beside the weights, then the run's
`run.json` and `recipe.yaml`, then PEFT's `adapter_config.json`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from raytune_ft.config.schema import ModelSection
from raytune_ft.errors import CheckpointError, ModelError, RecipeError
from raytune_ft.storing import fetching
from raytune_ft.storing.places import is_elsewhere

DEFAULT_MODEL = "smollm2-135m-instruct"
RECORD = "raytune_ft.json"
CONTAINS = "a run folder holds run.json and adapter/ or model/, a model folder config.json"

Quantization = Literal["none", "nf4", "int8"]
QUANTIZATION_OF_BITS: dict[int, Quantization] = {4: "nf4", 8: "int8", 16: "none", 32: "none"}


@dataclass(frozen=True)
class ChatSource:
    """Everything that decides how a trained result is opened."""

    name: str
    """Short name, shown to people and used as the endpoint's model id."""
    base: str
    """Folder or name of the model whose weights and tokenizer are loaded."""
    section: ModelSection
    """How the base is loaded: the precision that training saw, unless asked otherwise."""
    adapter: Path | None = None
    template: str = "tokenizer"
    system: str = ""
    """System text that the run's samples were asked with; for conversations that bring none."""


def find_source(path: str, bits: int | None = None) -> ChatSource:
    """Find out what `path` is.

    Args:
        path: a folder, or `smollm2-135m-instruct`.
        bits: 4 (nf4), 8 (int8), 16 or 32 (not quantised); none: as in training.

    Raises:
        CheckpointError: there is nothing at `path`, or a run without a result.
        ModelError: the folder is no model.
        RecipeError: `bits` is another number.
    """
    source = _source_at(path)
    if bits is None:
        return source
    if bits not in QUANTIZATION_OF_BITS:
        raise RecipeError(f"bits {bits}: not a precision; use 4 (nf4), 8 (int8), 16 or 32")
    return replace(source, section=_with(source.section, quantization=QUANTIZATION_OF_BITS[bits]))


def with_adapter(model: str, adapter: str, bits: int | None = None) -> ChatSource:
    """Return the source of an adapter folder, or of a run's adapter, on a base of the user's own.

    Args:
        model: folder or hub name of the base.
        adapter: PEFT folder, or a run that holds one; its template and system text are used.
        bits: as for `find_source`.

    Raises:
        CheckpointError, ModelError, RecipeError: one line that names the folder.
    """
    source = find_source(adapter, bits)
    if source.adapter is None:
        raise ModelError(f"{adapter}: no adapter; give a folder with adapter_config.json")
    folder = Path(model).expanduser()
    base = str(folder.resolve()) if folder.is_dir() else model
    return replace(source, base=base, section=_with(source.section, path=base))


def _source_at(path: str) -> ChatSource:
    if is_elsewhere(path):
        return _run(fetching.run_folder(path).path)
    folder = Path(path).expanduser().resolve()
    if not folder.is_dir():
        if path == DEFAULT_MODEL:
            return ChatSource(path, path, ModelSection(path=path))
        raise CheckpointError(_nothing_at(path, folder))
    if (folder / "run.json").is_file():
        return _run(folder)
    if folder.name in ("adapter", "model", "merged") and (folder.parent / "run.json").is_file():
        return _result(folder, folder.parent)
    if (folder / "adapter_config.json").is_file():
        return _adapter(folder)
    if (folder / "config.json").is_file():
        return _plain(folder)
    raise ModelError(f"{path}: neither a run folder nor a model folder; {CONTAINS}")


def _run(run: Path) -> ChatSource:
    for name, needed in (("adapter", "adapter_config.json"), ("model", "config.json")):
        if (run / name / needed).is_file():
            return _result(run / name, run)
    status = _read_json(run / "run.json").get("status", "unknown")
    raise CheckpointError(
        f"{run}: no adapter/ and no model/ in this run (status: {status}); let it end, or go on "
        f"with --resume {run}"
    )


def _result(folder: Path, run: Path) -> ChatSource:
    """Return the source of `adapter/`, `model/` or `merged/` inside the run folder `run`."""
    info, recipe, record = _read_json(run / "run.json"), _read_recipe(run), _record(folder)
    trained = _section(run / "recipe.yaml", recipe.get("model"))
    source = ChatSource(
        name=str(info.get("name") or run.name),
        base=str(folder),
        # a model's own tokenizer has them
        section=_with(trained, path=str(folder), quantization="none", new_tokens=[]),
        template=str(record.get("template") or info.get("template") or trained.template),
        system=_system(record, info, recipe),
    )
    if folder.name != "adapter":
        return source
    base = next((b for b in _bases(info, trained, record) if Path(b).is_dir()), trained.path)
    return replace(source, base=base, adapter=folder, section=_with(trained, path=base))


def _bases(info: dict[str, Any], trained: ModelSection, record: dict[str, Any]) -> Iterator[str]:
    """Yield where the base of a run may lie; the first that exists is it."""
    for place in (info.get("model_folder"), record.get("base"), trained.path):
        if place:
            yield str(place)


def _adapter(folder: Path) -> ChatSource:
    record = _record(folder)
    base = record.get("base") or _read_json(folder / "adapter_config.json").get(
        "base_model_name_or_path"
    )
    if not base:
        raise ModelError(
            f"{folder}: adapter_config.json names no base model; write it into "
            f'{RECORD} as {{"base": FOLDER}}'
        )
    kept = ("quantization", "double_quant", "eos_token", "new_tokens")
    given = {key: record[key] for key in kept if key in record}
    return ChatSource(
        name=_folder_name(folder),
        base=str(base),
        section=_section(folder / RECORD, {"path": str(base), **given}),
        adapter=folder,
        template=str(record.get("template") or "tokenizer"),
        system=str(record.get("system", "")),
    )


def _plain(folder: Path) -> ChatSource:
    record = _record(folder)
    return ChatSource(
        name=_folder_name(folder),
        base=str(folder),
        section=_section(
            folder / RECORD, {"path": str(folder), "eos_token": record.get("eos_token")}
        ),
        template=str(record.get("template") or "tokenizer"),
        system=str(record.get("system", "")),
    )


def _folder_name(folder: Path) -> str:
    generic = folder.name in ("adapter", "merged", "model")
    return (folder.parent.name if generic else folder.name) or "model"


def _record(folder: Path) -> dict[str, Any]:
    return _read_json(folder / RECORD) if (folder / RECORD).is_file() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}); the folder is damaged") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object; the folder is damaged")
    return content


def _read_recipe(run: Path) -> dict[str, Any]:
    path = run / "recipe.yaml"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: missing or damaged; copy the whole run folder") from None
    return content if isinstance(content, dict) else {}


def _section(where: Path, fields: Any) -> ModelSection:
    try:
        section = ModelSection.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            f"{where}: model.{key}: {first['msg']}; the folder is damaged"
        ) from None
    return _with(section, gradient_checkpointing=False, method="lora")


def _with(section: ModelSection, **changes: Any) -> ModelSection:
    return section.model_copy(update=changes)


def _system(record: dict[str, Any], info: dict[str, Any], recipe: dict[str, Any]) -> str:
    """Return the system text of a run's chats with the recipe's words filled in."""
    data, sampled = recipe.get("data") or {}, recipe.get("chat_eval") or {}
    given = (record.get("system"), info.get("system"), sampled.get("system"), data.get("system"))
    text = str(next((system for system in given if system is not None), ""))
    for key, word in (data.get("fill") or {}).items():
        text = text.replace("{" + key + "}", word)
    return text


def _nothing_at(path: str, folder: Path) -> str:
    near = _nearest(folder)
    hint = f"nearest: {near}" if near else f"or give the name {DEFAULT_MODEL}"
    return f"{path}: no such folder; {CONTAINS}; {hint}"


def _nearest(folder: Path) -> str | None:
    """Return the existing folder whose name is most like `folder`, beside it or under runs/."""
    places = [folder.parent, Path("runs").resolve()]
    known = {
        child.name: child
        for place in places
        if place.is_dir()
        for child in place.iterdir()
        if child.is_dir() and not child.name.startswith(".")
    }
    match = difflib.get_close_matches(folder.name, known, n=1, cutoff=0.5)
    if not match:
        return None
    found = known[match[0]]
    return str(found.relative_to(Path.cwd())) if found.is_relative_to(Path.cwd()) else str(found)
