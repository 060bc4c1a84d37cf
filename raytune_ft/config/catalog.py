"""Shipped recipes: a name `<model>_<method>_<data>` is a model card plus a recipe without model.

    configs/families.yaml                 what the cards of a family share
    configs/models/<model>.yaml           card: path, template, family, size, bot_name, config
    configs/recipes/<method>/<data>.yaml  recipe sections; `@bot_name` stands for the card's
    configs/catalog.yaml                  the names of XTuner v0.1.9 and our own, by recipe

Any card goes with any recipe. Cards that XTuner v0.1.9 did not have are listed with all of them.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from raytune_ft.config.document import nearest, read_file
from raytune_ft.config.estimates.footprint import fitting_targets
from raytune_ft.errors import RecipeError

PRESETS = (
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero2_offload",
    "deepspeed_zero3",
    "deepspeed_zero3_offload",
)

ALL_LINEAR = "all-linear"
REFERENCE = "xtuner"
"""Group of catalog.yaml with the names of XTuner v0.1.9."""


@dataclass(frozen=True)
class Family:
    """What the cards of a family share; docs/models.md shows it."""

    title: str
    network: str
    """What of transformers computes it."""
    layout: str
    """Names and shapes of the original checkpoint's tensors."""
    tokenizer: str
    """File that is read."""
    checked: str
    """What our tokenizer was compared with."""


@dataclass(frozen=True)
class Card:
    """A model that recipes go with."""

    path: str
    """Hub name, or a name that prepares itself."""
    template: str
    family: str
    size: str
    config: dict[str, Any]
    """Shape of the network, in the words of its config.json: memory is planned without weights."""
    eos_token: str | None = None
    """Ends an answer, where the model's files do not say so."""
    bot_name: str = "MOSS"
    """What the model is called in data that names it; MOSS is the name in the rows themselves."""
    network: str | None = None
    """Where it is not plainly the family's."""


@functools.cache
def configs_dir() -> Path:
    """Return the folder of shipped configurations: in the wheel, or beside the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Return every listed name, presets included, sorted."""
    return sorted([*recipe_names(), *PRESETS])


def recipe_names() -> list[str]:
    """Return the listed names of recipes, sorted: XTuner's, ours, and every one of newer cards."""
    return sorted(compose(model, recipe) for model, recipe in pairs())


def pairs() -> set[tuple[str, str]]:
    """Return the cards and recipes that make listed names."""
    groups = _catalog().values()
    listed = {(model, r) for group in groups for r, ms in group.items() for model in ms}
    return listed | {(model, recipe) for model in newer_models() for recipe in recipes()}


def reference_names() -> list[str]:
    """Return exactly the names that XTuner v0.1.9 lists, its DeepSpeed presets included."""
    return sorted([*_expand(_catalog()[REFERENCE]), *PRESETS])


@functools.cache
def models() -> tuple[str, ...]:
    """Return the names of the model cards, sorted."""
    return tuple(sorted(path.stem for path in (configs_dir() / "models").glob("*.yaml")))


def newer_models() -> list[str]:
    """Return the cards that XTuner v0.1.9 does not have, sorted."""
    known = {model for cards in _catalog()[REFERENCE].values() for model in cards}
    return [model for model in models() if model not in known]


@functools.cache
def recipes() -> tuple[str, ...]:
    """Return the recipes as `<method>/<data>`, sorted."""
    folder = configs_dir() / "recipes"
    return tuple(sorted(f"{p.parent.name}/{p.stem}" for p in folder.glob("*/*.yaml")))


@functools.cache
def recipe_body(recipe: str) -> dict[str, Any]:
    """Read a recipe, `<method>/<data>`; its placeholders stand as they are."""
    return _read(f"recipes/{recipe}.yaml")


@functools.cache
def families() -> dict[str, Family]:
    """Return the families in the order in which they are listed."""
    return {name: Family(**content) for name, content in _read("families.yaml").items()}


@functools.cache
def card(model: str) -> Card:
    """Read a model card."""
    return Card(**_read(f"models/{model}.yaml"))


def compose(model: str, recipe: str) -> str:
    """Return the name of a card with a recipe."""
    return f"{model}_{recipe.replace('/', '_')}"


def resolve(name: str) -> dict[str, Any]:
    """Compose the raw recipe mapping of a name; RecipeError says which part of it is wrong."""
    model, recipe = split(name)
    return body_for(model, recipe)


def body_for(model: str, recipe: str) -> dict[str, Any]:
    """Lay a recipe over a card: the raw recipe mapping."""
    own = card(model)
    body = _filled(copy.deepcopy(recipe_body(recipe)), own)
    if "targets" in body.get("lora", {}):
        body["lora"]["targets"] = lora_targets(model, recipe)
    model_section = {"path": own.path, "template": own.template}
    if own.eos_token is not None:
        model_section["eos_token"] = own.eos_token
    return {**body, "model": {**model_section, **body.get("model", {})}}


def lora_targets(model: str, recipe: str) -> str | list[str]:
    """Return a recipe's LoRA targets by a network's own names; `all-linear` if it has none."""
    targets = recipe_body(recipe).get("lora", {}).get("targets", ALL_LINEAR)
    if isinstance(targets, list):
        targets = fitting_targets(targets, card(model).config) or ALL_LINEAR
    return cast(str | list[str], targets)


def split(name: str) -> tuple[str, str]:
    """Split a name into its card and its `<method>/<data>`, by the longest card that fits."""
    known = {recipe.replace("/", "_"): recipe for recipe in recipes()}
    fitting = [m for m in models() if name.startswith(f"{m}_")]
    for model in sorted(fitting, key=len, reverse=True):
        rest = name[len(model) + 1 :]
        if rest in known:
            return model, known[rest]
    raise RecipeError(_unknown(name, max(fitting, key=len, default=None), known))


def preset(name: str) -> dict[str, Any]:
    """Return a DeepSpeed preset, such as `deepspeed_zero2`."""
    text = (configs_dir() / "deepspeed" / f"{name}.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def card_config(path: str) -> dict[str, Any] | None:
    """Return the shape of a shipped model by its hub path or folder name; None if unknown."""
    last = Path(path).name.lower()
    for model in models():
        own = card(model).path
        if path == own or last == own.rpartition("/")[2].lower():
            return card(model).config
    return None


def data_paths() -> set[str]:
    """Return the data sets that shipped recipes name."""
    bodies = (recipe_body(recipe) for recipe in recipes())
    return {str(source["path"]) for body in bodies for source in body["data"]["sources"]}


def is_path(config: str) -> bool:
    """Tell whether an argument is meant as a file rather than as a shipped name."""
    return "/" in config or "\\" in config or config.endswith((".yaml", ".yml", ".json", ".py"))


def _unknown(name: str, model: str | None, known: Collection[str]) -> str:
    """Say which part of a name is unknown, and which name is nearest."""
    if name in PRESETS:
        zero = name.removeprefix("deepspeed_")
        return f"'{name}' is a DeepSpeed preset, no recipe; set train.deepspeed={zero} in a recipe"
    start = f"no recipe '{name}' among {len(names())} shipped names; "
    if model is not None:
        rest = name[len(model) + 1 :]
        near = nearest(rest, known)
        hint = f"nearest: {model}_{near}" if near else "recipes: raytune-ft list --data"
        return f"{start}the model '{model}' is known, the recipe '{rest}' is not; {hint}"
    recipe = max((r for r in known if name.endswith(f"_{r}")), key=len, default=None)
    if recipe is not None:
        rest = name.removesuffix(f"_{recipe}")
        near = nearest(rest, models())
        hint = f"nearest: {near}_{recipe}" if near else "models: raytune-ft list --models"
        return f"{start}the recipe '{recipe}' is known, the model '{rest}' is not; {hint}"
    near = nearest(name, names())
    hint = f"nearest: {near}" if near else "list them: raytune-ft list"
    return f"{start}no model card fits its beginning, no recipe its end; {hint}"


@functools.cache
def _catalog() -> dict[str, dict[str, list[str]]]:
    content: dict[str, dict[str, list[str]]] = _read("catalog.yaml")
    return content


def _expand(group: dict[str, list[str]]) -> list[str]:
    return [compose(model, recipe) for recipe, ms in group.items() for model in ms]


def _read(place: str) -> dict[str, Any]:
    document = read_file(configs_dir() / place, f"configs/{place}")
    if document.problems:
        raise RecipeError("\n".join(document.problems))
    content: dict[str, Any] = document.content
    return content


def _filled(value: Any, own: Card) -> Any:
    """Replace `@field` by the card's field."""
    if isinstance(value, dict):
        return {k: _filled(v, own) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, own) for v in value]
    if isinstance(value, str) and value.startswith("@"):
        return getattr(own, value[1:])
    return value
