"""From a finished run to files that other tools load: the adapter, or the merged model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.data.rows.formats import fill_text
from raytune_ft.data.tokenizing import hf_files
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.training.run_folder import RunFolder, write_json

MARKER = "raytune_ft.json"
"""Beside exported weights: the template and system text that they were trained with."""


def export(run: str, out: str | None = None) -> Path:
    """Copy a run's adapter, as plain peft loads it, to `out`; default: the run's own folder.

    Raises:
        CheckpointError: no such run, or it has no result yet.
        RecipeError: `out` exists and is not empty.
    """
    folder = RunFolder.existing(run)
    result = result_folder(folder)
    write_json(result / MARKER, marker(folder))
    if out is None or Path(out).resolve() == result:
        return result
    target = _fresh(Path(out))
    shutil.copytree(result, target, dirs_exist_ok=True)
    return target


def merge(
    run: str,
    out: str | None = None,
    max_shard_size: str = "2GB",
    base: str | None = None,
    layout: Literal["original", "native"] = "original",
) -> Path:
    """Merge a run's adapter into its base model; return the folder of the merged model.

    Args:
        run: run folder.
        out: target folder; default `merged` in the run's folder, replaced if it is there.
        max_shard_size: such as 2GB or 500MB.
        base: `original` weights, or `dequantized`: the NF4 weights that training saw. Default:
            `dequantized` where the run trained on NF4, so that the merged model answers as the
            trained one did.
        layout: `original` keeps the base's tensor names, config.json, tokenizer and Python files,
            for the tools that knew it; `native` is what transformers and vLLM read without the
            model's own code: translated config.json, tokenizer.json and chat template.

    Raises:
        RecipeError: nothing to merge, `out` is not empty, or the model has no native form.
    """
    from raytune_ft.model import adapter, new_tokens

    folder = RunFolder.existing(run)
    recipe = load_recipe(str(folder.recipe))
    result = result_folder(folder)
    target = _fresh(Path(out)) if out else folder.merged
    if recipe.model.method == "full":
        raise RecipeError(
            f"{run}: a full-parameter run has nothing to merge; its model is {result}"
        )
    added, base_folder = folder.info().get("new_tokens"), Path(folder.info()["model_folder"])
    if added and layout == "original":
        new_tokens.check_place(base_folder)
    chosen = base or ("dequantized" if recipe.model.quantization == "nf4" else "original")
    if out is None and target.exists():
        shutil.rmtree(target)
    adapter.merge_to(
        base_folder, result, target, max_shard_size, base=chosen,
        section=recipe.model, layout=layout,
    )  # fmt: skip
    if added or (layout == "native" and not (target / "tokenizer.json").is_file()):
        write_tokenizer(folder, target)
    write_json(target / MARKER, {**marker(folder), "merged_into": chosen})
    return target


def write_tokenizer(run: RunFolder, target: Path) -> None:
    """Write a run's tokenizer and template as transformers reads them, without code."""
    info = run.info()
    tokenizer = TextTokenizer.from_folder(
        info["model_folder"], info.get("eos_token"), info.get("new_tokens") or ()
    )
    hf_files.write(tokenizer, target, hf_files.chat_template(info["template"], tokenizer))


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


def marker(folder: RunFolder) -> dict[str, Any]:
    """Describe how trained weights want to be asked."""
    info = folder.info()
    return {
        "template": info["template"],
        "system": info["system"],
        "base": info["model_folder"],
        "quantization": info["quantization"],
        "double_quant": info["double_quant"],
        "eos_token": info.get("eos_token"),
        "new_tokens": info.get("new_tokens") or [],
        "run": info["name"],
        "version": info["version"],
    }


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Read the marker beside exported weights, if there is one."""
    path = folder / MARKER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def system_of(recipe: Recipe) -> str:
    """Return the system text that a chat with the trained model starts with."""
    text = recipe.data.system if recipe.chat_eval.system is None else recipe.chat_eval.system
    return fill_text(text, recipe.data.fill)


def _fresh(path: Path) -> Path:
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise RecipeError(f"{path}: exists and is not empty; name a new folder with --out")
    return path


if __name__ == "__main__":
    from raytune_ft.cli import run_verb

    run_verb("export")
