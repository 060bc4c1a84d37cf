"""Survey: what can be known of a run before it starts, in one process, without Ray and weights.

The recipe is valid by now; here its names meet the machine: model folder, tokenizer, template,
map functions, DeepSpeed file, rows. What is wrong raises; what is merely not here yet is a note.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytune_ft import row_counts
from raytune_ft.config import catalog
from raytune_ft.config.cache import cache_dir
from raytune_ft.config.schema import Recipe, Source
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.files import locate
from raytune_ft.data.files.kinds import is_data_file
from raytune_ft.data.files.remote import is_url
from raytune_ft.data.rows import formats
from raytune_ft.data.templating import templates
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import ModelError, RecipeError
from raytune_ft.model.default_model import NAME as DEFAULT_MODEL
from raytune_ft.training.watching import trackers

if TYPE_CHECKING:
    from raytune_ft.config.estimates.pace import Device
    from raytune_ft.model.memory import MemoryPlan

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_FEW_STEPS = 5


@dataclass
class Survey:
    """Everything found out about a recipe."""

    recipe: Recipe
    folder: Path | None
    tokenizer: TextTokenizer | None
    config: dict[str, Any] | None
    """The model's config.json, or its card's numbers."""
    counted: row_counts.Counted | None = None
    notes: list[str] = field(default_factory=list)


def survey(recipe: Recipe) -> Survey:
    """Check a recipe against this machine and count what is here.

    Raises:
        RecipeError: a name means nothing here.
        ModelError: the model's folder is none.
        DataError: a row cannot be used and `data.on_error` is `stop`.
    """
    check_names(recipe)
    trackers.check_installed(recipe.run.trackers)
    folder = model_folder(recipe.model.path)
    found = Survey(recipe, folder, None, None)
    if folder is None:
        found.config = catalog.card_config(recipe.model.path)
        found.notes.append(f"model.path: {recipe.model.path} is not here; rows are not tokenised")
    else:
        found.config = read_config(folder)
        found.tokenizer = TextTokenizer.from_folder(
            folder, recipe.model.eos_token, recipe.model.new_tokens
        )
        templates.get_template(recipe.model.template, found.tokenizer)
        if recipe.model.new_tokens and recipe.model.method == "full":
            from raytune_ft.model import new_tokens  # torch takes seconds to import

            new_tokens.check_place(folder)
    check_deepspeed(recipe)
    count_rows(found)
    found.notes += remarks(found)
    return found


def check_names(recipe: Recipe) -> None:
    """Check the names that need neither model nor rows; RecipeError with the nearest one."""
    for source in recipe.data.sources:
        if source.map is not None:
            formats.format_of(source.map)
    template = recipe.model.template
    if template not in templates.template_names():
        from raytune_ft.config.document import nearest

        near = nearest(template, templates.template_names())
        hint = f"did you mean '{near}'?" if near else f"choose: {', '.join(templates.PROMPTS)}"
        raise RecipeError(f"model.template: no template '{template}'; {hint}")


def check_deepspeed(recipe: Recipe) -> None:
    """Check the DeepSpeed preset or file; RecipeError if it cannot be used."""
    if recipe.train.deepspeed in ("none", "zero1", "zero2", "zero2_offload"):
        return
    import torch

    from raytune_ft.training import presets

    presets.resolve(recipe, torch.float32, on_gpu=True)


def model_folder(path: str) -> Path | None:
    """Return the folder of a model if it is on this machine, without building or fetching it.

    None means that it will be made, fetched, or is a shipped model that the user has yet to bring.

    Raises:
        ModelError: the path is a file, no model's folder, or nothing that is known.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ModelError(f"model.path: {path} is a file; give the folder with config.json")
    if folder.is_dir():
        return folder
    if path == DEFAULT_MODEL:
        built = cache_dir() / DEFAULT_MODEL
        return built if (built / "config.json").is_file() else None
    if catalog.card_config(path) is not None or _HUB_NAME.fullmatch(path):
        return None
    raise ModelError(
        f"model.path: no folder '{path}'; give a folder, a hub name such as org/model, "
        f"or {DEFAULT_MODEL}"
    )


def read_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json; ModelError if there is none to read."""
    file = folder / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no config.json, so this is no model's folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: not readable JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds no JSON object; copy the file again")
    return content


def count_rows(found: Survey) -> None:
    """Read the rows that are on this machine, and tokenise them if the tokenizer is."""
    recipe = found.recipe
    here = [s for s in recipe.data.sources if not is_elsewhere(s)]
    absent = [s.path for s in recipe.data.sources if is_elsewhere(s)]
    for path in absent:
        found.notes.append(f"data.sources: {path} is not here; its rows are not counted")
    if not here:
        return
    data = recipe.data.model_copy(update={"sources": here})
    opened = sources.open_sources(data, recipe.train.seed)
    if not absent:
        opened, _ = sources.split_validation(opened, data, recipe.train.seed)
    if found.tokenizer is None:
        found.counted = row_counts.count_rows(opened, recipe)
    else:
        encoder = Encoder.of(recipe, found.tokenizer)
        counted = row_counts.count_tokens(opened, encoder, recipe).counted
        found.counted = replace(counted, steps=None) if absent else counted
    if not found.counted.exact:
        found.notes.append(
            f"data: {found.counted.read:,} of {len(opened):,} rows were read; figures with ~ are "
            "estimates"
        )


def is_elsewhere(source: Source) -> bool:
    """Tell whether a source is one of the hub, or a shipped recipe's that is not here yet."""
    if locate.local_path(source.path) is not None:
        return False
    if is_url(source.path) or locate.is_pattern(source.path):
        return False
    name = source.path.rpartition("/")[2]
    known = catalog.data_paths()
    if source.path in known or name in {path.rpartition("/")[2] for path in known}:
        return True
    return bool(_HUB_NAME.fullmatch(source.path)) and not is_data_file(source.path)


def remarks(found: Survey) -> list[str]:
    """Return what is allowed but probably not meant."""
    recipe, notes = found.recipe, []
    run = Path(recipe.run.storage).expanduser() / (recipe.run.name or "")
    if recipe.run.name and run.exists():
        notes.append(f"run.name: {run} exists; training goes on with it if it is of this recipe")
    notes += [
        f"chat_eval.mmlu: {path} is not here; training needs it"
        for path in recipe.chat_eval.mmlu
        if locate.local_path(path) is None
    ]
    positions = _context(found.config) if found.config else None
    if isinstance(positions, int) and recipe.data.max_length > positions:
        notes.append(
            f"data.max_length: {recipe.data.max_length} is beyond the model's {positions} positions"
        )
    steps = found.counted.steps if found.counted else None
    if steps is not None and steps < _FEW_STEPS and recipe.train.max_steps is None:
        notes.append(f"train: only {steps} optimizer steps; lower train.accumulation")
    return notes


def _context(config: dict[str, Any]) -> int | None:
    """Return a model's context in tokens; families have other names for it."""
    from raytune_ft.model.families import translate

    return getattr(translate(config).get_text_config(), "max_position_embeddings", None)


def memory_of(
    found: Survey,
    device_bytes: int | None,
    device: Device | None = None,
    packs: float | None = None,
    free_bytes: int | None = None,
) -> MemoryPlan | None:
    """Predict peak memory from the model's shape; None if its shape is not known."""
    if found.config is None:
        return None
    from raytune_ft.model.memory import plan_memory

    return plan_memory(
        found.recipe, found.config, device_bytes, device, packs, free_bytes=free_bytes
    )


def parse_size(text: str, key: str) -> int:
    """Read `8GiB`, `8GB` or `8g` as bytes; RecipeError if it is no size."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise RecipeError(f"{key}: expected a size such as 8GiB, got '{text}'")
    power = _UNITS[match[2].lower()]
    if match[3]:
        power = 1024 ** round(math.log(power, 1000))
    return round(float(match[1]) * power)
