"""Shipped recipes: a name `<model>_<method>_<data>` is a model card plus a recipe without model.

    configs/models/<model>.yaml           card: path, template, family, size, bot_name, config
    configs/recipes/<method>/<data>.yaml  recipe sections; `@bot_name` stands for the card's
    configs/catalog.yaml                  the names that are listed, grouped by recipe

Any card goes with any recipe, listed or not.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from raytune_ft.config.document import nearest, read_file
from raytune_ft.errors import RecipeError

PRESETS = (
    "deepspeed_zero1",
    "deepspeed_zero2",
    "deepspeed_zero2_offload",
    "deepspeed_zero3",
    "deepspeed_zero3_offload",
)


@functools.cache
def configs_dir() -> Path:
    """Return the folder of shipped configurations: in the wheel, or beside the checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def names() -> list[str]:
    """Return the shipped recipe names, sorted."""
    groups = _catalog()
    return sorted(name for group in groups.values() for name in _expand(group))


def reference_names() -> list[str]:
    """Return exactly the names that XTuner v0.1.9 lists, its DeepSpeed presets included."""
    return sorted([*_expand(_catalog()["xtuner"]), *PRESETS])


def models() -> list[str]:
    """Return the names of the model cards, sorted."""
    return sorted(path.stem for path in (configs_dir() / "models").glob("*.yaml"))


def recipes() -> list[str]:
    """Return the recipes as `<method>/<data>`, sorted."""
    folder = configs_dir() / "recipes"
    return sorted(f"{p.parent.name}/{p.stem}" for p in folder.glob("*/*.yaml"))


def resolve(name: str) -> dict[str, Any]:
    """Compose the raw recipe mapping of a name; RecipeError says which part of it is wrong."""
    model, recipe = split(name)
    card, body = _card(model), _read(f"recipes/{recipe}.yaml")
    body = _filled(body, card)
    own = {key: card[key] for key in ("path", "template")}
    return {**body, "model": {**own, **body.get("model", {})}}


def split(name: str) -> tuple[str, str]:
    """Split a name into its card and its `<method>/<data>`, by the longest card that fits."""
    fitting = [m for m in models() if name.startswith(f"{m}_")]
    if not fitting:
        raise RecipeError(f"{_unknown(name)}; no model card fits its beginning{_near(name)}")
    model = max(fitting, key=len)
    rest = name[len(model) + 1 :]
    known = {recipe.replace("/", "_"): recipe for recipe in recipes()}
    if rest not in known:
        near = nearest(rest, known)
        hint = f"; nearest: {model}_{near}" if near else _near(name)
        raise RecipeError(
            f"{_unknown(name)}; the model '{model}' is known, the recipe '{rest}' is not{hint}"
        )
    return model, known[rest]


def preset(name: str) -> dict[str, Any]:
    """Return a DeepSpeed preset, such as `deepspeed_zero2`."""
    text = (configs_dir() / "deepspeed" / f"{name}.json").read_text(encoding="utf-8")
    content: dict[str, Any] = json.loads(text)
    return content


def card_config(path: str) -> dict[str, Any] | None:
    """Return the shape of a shipped model by its hub path or folder name; None if unknown.

    The keys are those of a Llama config.json, so that memory can be planned without weights.
    """
    last = Path(path).name.lower()
    for model in models():
        card = _card(model)
        if path == card["path"] or last == str(card["path"]).rpartition("/")[2].lower():
            config: dict[str, Any] | None = card.get("config")
            return config
    return None


def data_paths() -> set[str]:
    """Return the data sets that shipped recipes name."""
    bodies = (_read(f"recipes/{recipe}.yaml") for recipe in recipes())
    return {str(source["path"]) for body in bodies for source in body["data"]["sources"]}


def is_path(config: str) -> bool:
    """Tell whether an argument is meant as a file rather than as a shipped name."""
    return "/" in config or "\\" in config or config.endswith((".yaml", ".yml", ".json", ".py"))


@functools.cache
def _catalog() -> dict[str, dict[str, list[str]]]:
    content: dict[str, dict[str, list[str]]] = _read("catalog.yaml")
    return content


def _expand(group: dict[str, list[str]]) -> list[str]:
    return [f"{m}_{recipe.replace('/', '_')}" for recipe, ms in group.items() for m in ms]


def _card(model: str) -> dict[str, Any]:
    return _read(f"models/{model}.yaml")


def _read(place: str) -> dict[str, Any]:
    document = read_file(configs_dir() / place, f"configs/{place}")
    if document.problems:
        raise RecipeError("\n".join(document.problems))
    content: dict[str, Any] = document.content
    return content


def _filled(value: Any, card: dict[str, Any]) -> Any:
    """Replace `@field` by the card's field; where the card has none, the key goes."""
    if isinstance(value, dict):
        filled = {k: _filled(v, card) for k, v in value.items()}
        return {k: v for k, v in filled.items() if not _is_open(v)}
    if isinstance(value, list):
        return [_filled(v, card) for v in value]
    return card.get(value[1:], value) if _is_open(value) else value


def _is_open(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("@")


def _unknown(name: str) -> str:
    return f"no recipe '{name}' among {len(names())} shipped names"


def _near(name: str) -> str:
    near = nearest(name, [*names(), *PRESETS])
    return f"; nearest: {near}" if near else "; list them: raytune-ft list"
