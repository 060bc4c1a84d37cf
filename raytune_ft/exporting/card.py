"""Model card: a run folder in, README.md out, with the recipe, the rows and the figures.

Only what is listed here is written: no paths of this machine but the names of files, no setting
that could hold a secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.model.merge import MergeReport
from raytune_ft.training.run_folder import RunFolder, read_json, read_jsonl

CARD = "README.md"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
RECIPE_FIELDS = {
    "model": ("quantization", "template", "method"),
    "lora": ("r", "alpha", "dropout", "targets", "use_dora", "use_rslora", "init_lora_weights"),
    "data": ("max_length", "pack"),
    "train": ("objective", "epochs", "max_steps", "micro_batch_size", "accumulation", "lr",
              "scheduler", "optimizer", "seed"),
}  # fmt: skip
"""What of a recipe stands in a card."""

ADAPTER_USE = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""
MODEL_USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
"""


def write(run: RunFolder, folder: Path, report: MergeReport | None = None) -> None:
    """Write README.md into a folder of weights; `report`: they are a merged model's."""
    recipe = load_recipe(str(run.recipe))
    text = "\n".join(_lines(run, recipe, folder, report)) + "\n"
    (folder / CARD).write_text(text, encoding="utf-8")


def base_name(recipe: Recipe) -> str:
    """Return the base's name as others may read it: a hub name, else the folder's own name."""
    path = recipe.model.path
    is_hub_name = HUB_NAME.fullmatch(path) is not None and not Path(path).expanduser().exists()
    return path if is_hub_name else Path(path).expanduser().name or path


def _lines(
    run: RunFolder, recipe: Recipe, folder: Path, report: MergeReport | None
) -> Iterator[str]:
    is_adapter = (folder / "adapter_config.json").is_file()
    name, info = run.path.name, run.info()
    yield from ("---", yaml.safe_dump(_head(recipe, is_adapter=is_adapter)).rstrip(), "---", "")
    yield from (f"# {info.get('name', name)}", "")
    what = "A LoRA adapter for" if is_adapter else "A model made from"
    how = "" if is_adapter or recipe.model.method == "full" else ", its adapter merged in"
    yield f"{what} {base_name(recipe)}{how}, trained by raytune_ft {info['version']}."
    if report is not None:
        yield from ("", _merged_into(report))
    use = ADAPTER_USE if is_adapter else MODEL_USE
    yield from ("", "## Use", "", "```python", use.format(name=name).rstrip(), "```", "")
    template, system = info["template"], info["system"]
    yield f"Prompt template: `{template}`, as the tokenizer's chat template has it."
    if system:
        yield f"System text in training: {json.dumps(system, ensure_ascii=False)}"
    yield from ("", "## Recipe", "", *_table(_fields(recipe)))
    yield from ("", "## Data", "", *_table(_data(run, recipe)))
    yield from ("", "## Training", "", *_table(_figures(run)))


def _head(recipe: Recipe, *, is_adapter: bool) -> dict[str, Any]:
    base = base_name(recipe)
    head: dict[str, Any] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["raytune_ft", "lora" if recipe.model.method == "lora" else "full"],
    }
    return head | ({"base_model": base} if HUB_NAME.fullmatch(base) else {})


def _merged_into(report: MergeReport) -> str:
    if report.base == "dequantized":
        return (
            "Merged into the dequantised weights, which training saw: it answers as the trained "
            "adapter did on its quantised base."
        )
    return "Merged into the original weights of the base."


def _fields(recipe: Recipe) -> Iterator[tuple[str, str]]:
    content = recipe.model_dump(mode="json")
    for section, names in RECIPE_FIELDS.items():
        if section == "lora" and recipe.model.method == "full":
            continue
        for name in names:
            if name in content[section]:
                yield f"{section}.{name}", _shown(content[section][name])


def _data(run: RunFolder, recipe: Recipe) -> Iterator[tuple[str, str]]:
    for source in recipe.data.sources:
        hub = HUB_NAME.fullmatch(source.path) and not Path(source.path).expanduser().exists()
        yield "source", source.path if hub else Path(source.path.split("?")[0]).name
    path = run.path / "data.json"
    if path.is_file():
        told = read_json(path)
        for key in ("rows", "used", "cut", "split", "tokens", "packs"):
            if key in told:
                yield key, _shown(told[key])
        for reason, count in sorted(told.get("dropped", {}).items()):
            yield f"dropped, {reason}", _shown(count)


def _figures(run: RunFolder) -> Iterator[tuple[str, str]]:
    steps = list(read_jsonl(run.metrics))
    if steps:
        yield "steps", _shown(steps[-1]["step"])
        yield "last loss", f"{steps[-1]['loss']:.4f}"
    measured = [row for row in steps if row.get("val_loss") is not None]
    if measured:
        yield (
            "held-out loss, first and last",
            " and ".join(f"{row['val_loss']:.4f}" for row in (measured[0], measured[-1])),
        )
    best = run.info().get("best")
    if best:
        yield f"best {best['metric']}", f"{best['value']:.4f} at step {best['step']}"


def _table(rows: Iterator[tuple[str, str]]) -> Iterator[str]:
    yield from ("| | |", "| --- | --- |")
    for key, value in rows:
        yield f"| {key} | {value.replace('|', chr(92) + '|')} |"


def _shown(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value) if not isinstance(value, list) else ", ".join(map(str, value))
