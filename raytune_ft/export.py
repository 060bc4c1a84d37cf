"""From a finished run to files that other tools load: the adapter, or the merged model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.data.rows.formats import fill_text
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.exporting import beside, card
from raytune_ft.exporting.beside import MARKER, marker, read_marker, write_tokenizer
from raytune_ft.model.adapter import WEIGHTS_FILE
from raytune_ft.model.tensors import save_tensors
from raytune_ft.model.writing import new_folder
from raytune_ft.storing import fetching
from raytune_ft.training.run_folder import RunFolder

__all__ = [
    "DEQUANTIZED", "MARKER", "export", "marker", "merge", "read_marker", "result_folder",
    "system_of", "write_tokenizer",
]  # fmt: skip

ADAPTER_CONFIG = "adapter_config.json"
REPORT = "merge_report.json"
DEQUANTIZED = (
    "merging into the dequantised NF4 weights, which training saw, so that answers stay; "
    "--base original takes those of the files"
)

Tell = Callable[[str], None]


def _silent(_line: str) -> None:
    pass


def export(
    run: str,
    out: str | None = None,
    *,
    again: bool = False,
    weights: dict[str, Any] | None = None,
) -> Path:
    """Write a run's adapter as plain peft loads it, with tokenizer and model card.

    Args:
        run: run folder.
        out: target, missing or empty; default: the run's own folder of the result.
        again: an earlier export of this run in `out` is replaced.
        weights: tensors of the adapter in place of its last ones, such as a checkpoint's.

    Raises:
        CheckpointError: no such run, or it has no result yet.
        RecipeError: `out` exists and is not empty, or cannot be written.
    """
    folder = fetching.run_folder(run, with_model=True)
    result = result_folder(folder)
    target = Path(out).expanduser() if out else result
    own = target.resolve() == result or (again and _is_of(folder, target))
    needed = sum(file.stat().st_size for file in result.iterdir() if file.is_file())
    with new_folder(target, needed, replace=own) as place:
        shutil.copytree(result, place, dirs_exist_ok=True)
        if weights is not None:
            save_tensors(weights, place / WEIGHTS_FILE)
        if (place / ADAPTER_CONFIG).is_file():
            _name_base(folder, place)
            write_tokenizer(folder, place)
        else:
            beside.write_chat_files(folder, place)
        beside.write_marker(place, marker(folder))
        card.write(folder, place)
    return target


def merge(
    run: str,
    out: str | None = None,
    max_shard_size: str = "2GB",
    base: str | None = None,
    layout: Literal["original", "native"] = "original",
    *,
    form: str = "safetensors",
    held_out: bool | None = None,
    again: bool = False,
    tell: Tell = _silent,
) -> Path:
    """Merge a run's adapter into its base model; return the folder of the merged model.

    Args:
        run: run folder.
        out: target folder; default `merged` in the run's folder, replaced if it is there.
        max_shard_size: such as 2GB or 500MB.
        base: `original` weights, or `dequantized`: the quantised weights that training saw.
            Default: `dequantized` where the run trained on NF4, so that the merged model answers
            as the trained one did.
        layout: `original` keeps the base's tensor names, config.json, tokenizer and Python files,
            for the tools that knew it; `native` is what transformers and vLLM read without the
            model's own code: translated config.json, tokenizer.json and chat template.
        form: `safetensors`, or another tool's format (`exporting.targets`); default folder
            `merged-FORM`, always in the native layout.
        held_out: measure held-out rows on both bases; None: where the model is small enough.
        again: an earlier merge of this run in `out` is replaced.
        tell: gets lines for people: which base was taken and why, how far layers moved.

    Raises:
        RecipeError: nothing to merge, `out` is not empty, or the model has no native form.
    """
    from raytune_ft.model import merge as merging

    if form != "safetensors":
        return _to_format(run, out, max_shard_size, base, form, tell, again=again)
    folder = fetching.run_folder(run, with_model=True)
    recipe = load_recipe(str(folder.recipe))
    result, source = result_folder(folder), Path(folder.info()["model_folder"])
    target = Path(out).expanduser() if out else folder.merged
    chosen = base_of(folder, recipe, base, layout, tell)

    def finish(place: Path, report: Any) -> None:
        _write_beside(folder, place, layout)
        beside.write_marker(place, {**marker(folder), "merged_into": chosen})
        card.write(folder, place, report)
        _report(folder, recipe, place, report, held_out, tell)

    merging.merge_to(
        source, result, target, max_shard_size, chosen, recipe.model, layout, finish,
        replace=out is None or (again and _is_of(folder, target)),
    )  # fmt: skip
    return target


def _to_format(
    run: str,
    out: str | None,
    max_shard_size: str,
    base: str | None,
    form: str,
    tell: Tell,
    *,
    again: bool,
) -> Path:
    """Write a run's model in another tool's format; a full-parameter run's as well."""
    from raytune_ft.exporting import targets
    from raytune_ft.model import merge as merging
    from raytune_ft.model.tensors import size_bytes

    target, limit = targets.Target.of(form), size_bytes(max_shard_size)
    folder = fetching.run_folder(run, with_model=True)
    recipe, result = load_recipe(str(folder.recipe)), result_folder(folder)
    if recipe.model.method == "full":
        read, chosen = merging.as_it_is(result), "original"
    else:
        chosen = base_of(folder, recipe, base, "native", tell)
        source = Path(folder.info()["model_folder"])
        read = merging.read_merge(source, result, chosen, recipe.model)
    targets.check(target, folder, read)
    place = Path(out).expanduser() if out else folder.path / f"merged-{form}"
    needed = merging.bytes_of(read.original.folder) * target.room
    replace = out is None or (again and _is_of(folder, place))
    with new_folder(place, needed, replace=replace) as inside:
        targets.write(target, folder, read, inside, limit, tell)
        if target.gguf is None:
            _write_beside(folder, inside, "native")
        beside.write_marker(inside, {**marker(folder), "merged_into": chosen, "format": form})
        card.write(folder, inside)
    return place


def base_of(
    folder: RunFolder, recipe: Recipe, base: str | None, layout: str, tell: Tell
) -> Literal["original", "dequantized"]:
    """Return which base a run is merged into; say so where it is not the files' own.

    Raises:
        RecipeError: there is nothing to merge, or no such base.
    """
    from raytune_ft.model import new_tokens

    quantization = recipe.model.quantization
    if recipe.model.method == "full":
        raise RecipeError(
            f"{folder.path}: a full-parameter run has nothing to merge; its model is "
            f"{result_folder(folder)}"
        )
    if folder.info().get("new_tokens") and layout == "original":
        new_tokens.check_place(Path(folder.info()["model_folder"]))
    if base == "dequantized" and quantization == "none":
        raise RecipeError(
            f"{folder.path}: --base dequantized: the run trained on weights that were not "
            "quantised; leave it out"
        )
    if base is None and quantization == "nf4":
        tell(DEQUANTIZED)
        return "dequantized"
    return "dequantized" if base == "dequantized" else "original"


def result_folder(folder: RunFolder) -> Path:
    """Return the folder with a run's trained weights; CheckpointError if it has none yet."""
    for result in (folder.adapter, folder.model):
        if result.is_dir():
            return result
    status = folder.status()
    raise CheckpointError(
        f"{folder.path}: the run is '{status}' and has no adapter yet; "
        f"finish it with: raytune-ft train --resume {folder.path}"
    )


def system_of(recipe: Recipe) -> str:
    """Return the system text that a chat with the trained model starts with."""
    text = recipe.data.system if recipe.chat_eval.system is None else recipe.chat_eval.system
    return fill_text(text, recipe.data.fill)


def _is_of(run: RunFolder, place: Path) -> bool:
    return bool((read_marker(place) or {}).get("run") == run.info()["name"])


def _write_beside(folder: RunFolder, place: Path, layout: str) -> None:
    missing = layout == "native" and not (place / "tokenizer.json").is_file()
    if folder.info().get("new_tokens") or missing:
        write_tokenizer(folder, place)
    beside.write_chat_files(folder, place)


def _report(
    folder: RunFolder, recipe: Recipe, place: Path, report: Any, held_out: bool | None, tell: Tell
) -> None:
    """Tell, and write down, what a merge did."""
    from raytune_ft.exporting import held_out as measuring

    losses = measuring.of_both(folder, recipe, place, report.base, held_out, tell)
    for line in report.drift.table():
        tell(line)
    if report.n_merged and not any(layer.moved for layer in report.drift.layers):
        tell(f"{folder.path}: the adapter changes nothing, its updates are 0; was it trained?")
    content = {
        "base": report.base,
        "n_merged": report.n_merged,
        "n_tensors": report.n_tensors,
        "size_bytes": report.size_bytes,
        "held_out": losses,
        "layers": [layer.as_json() for layer in report.drift.layers],
    }
    (place / REPORT).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _name_base(folder: RunFolder, place: Path) -> None:
    """Let an adapter name its base as others find it, where the recipe has a hub name."""
    path = place / ADAPTER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    name = card.base_name(load_recipe(str(folder.recipe)))
    if "/" in name:
        content["base_model_name_or_path"] = name
        path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from raytune_ft.cli import run_verb

    run_verb("export")
