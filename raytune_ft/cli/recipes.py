"""Verbs about shipped recipes: list them, show one, copy one, print the schema."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from raytune_ft.cli.app import (
    ALONE,
    Json,
    Name,
    Overrides,
    Pattern,
    PatternOption,
    Recipe,
    verb,
)
from raytune_ft.entry import tell
from raytune_ft.errors import RecipeError

NOTHING_FOUND = 1

ModelsOption = Annotated[bool, typer.Option("--models", help="List the model cards instead.")]
DataOption = Annotated[
    bool, typer.Option("--data", help="List the recipes, each with its data sets, instead.")
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="[METHOD]",
        help="Only this method: qlora, lora, int8_lora or full; alone: list the methods.",
    ),
]


@verb("list")
def list_recipes(
    pattern: Pattern = None,
    pattern_option: PatternOption = None,
    models: ModelsOption = False,
    data: DataOption = False,
    method: MethodOption = None,
    as_json: Json = False,
) -> int:
    """Print every name: model cards with recipes, and DeepSpeed presets."""
    from raytune_ft.config import listing

    wanted = pattern_option or pattern
    if method == ALONE and not data:
        return _print_words(
            [m for m in listing.METHODS if (wanted or "").lower() in m], wanted, "list"
        )
    if method not in (None, *listing.METHODS):
        raise RecipeError(f"--method: expected {', '.join(listing.METHODS)}, got '{method}'")
    if models and data:
        raise RecipeError("--models and --data: each is a list of its own; give one")
    if models:
        return _list_models(wanted, as_json=as_json)
    if data:
        return _list_data(wanted, method, as_json=as_json)
    found = listing.entries(wanted, method)
    if as_json and found:
        _print_json(
            [
                {
                    "name": e.name, "family": e.family, "model": e.model, "recipe": e.recipe,
                    "method": e.method, "data": e.data, "memory_bytes": e.memory,
                    "in_xtuner": e.is_reference,
                }
                for e in found
            ]
        )  # fmt: skip
    elif found and sys.stdout.isatty():
        from raytune_ft.cli import tables

        tables.print_names(found, short=wanted is None)
    else:
        return _print_words(sorted(e.name for e in found), wanted or method, "raytune-ft list")
    return 0


def _list_models(pattern: str | None, *, as_json: bool) -> int:
    from raytune_ft.config import listing

    found = [m for m in listing.models() if (pattern or "").lower() in m]
    if as_json and found:
        from raytune_ft.config.models_page import facts

        _print_json([facts(model) for model in found])
    elif found and sys.stdout.isatty():
        from raytune_ft.cli import tables

        tables.print_models(found)
    else:
        return _print_words(found, pattern, "raytune-ft list --models")
    return 0


def _list_data(pattern: str | None, method: str | None, *, as_json: bool) -> int:
    from raytune_ft.config import catalog

    found = [
        recipe
        for recipe in catalog.recipes()
        if (pattern or "").lower() in recipe.replace("/", "_")
        and method in (None, recipe.partition("/")[0])
    ]
    if as_json and found:
        _print_json({r.replace("/", "_"): catalog.recipe_body(r)["data"]["sources"] for r in found})
    elif found and sys.stdout.isatty():
        from raytune_ft.cli import tables

        tables.print_recipes(found)
    else:
        words = [recipe.replace("/", "_") for recipe in found]
        return _print_words(words, pattern or method, "raytune-ft list --data")
    return 0


@verb("list-cfg")
def list_cfg(pattern: Pattern = None, pattern_option: PatternOption = None) -> int:
    """Print exactly the 301 names of XTuner v0.1.9."""
    from raytune_ft.config import catalog

    wanted = pattern_option or pattern
    found = [name for name in catalog.reference_names() if (wanted or "").lower() in name]
    return _print_words(found, wanted, "raytune-ft list-cfg")


def _print_words(words: Sequence[str], wanted: str | None, everything: str) -> int:
    if not words:
        tell(f"nothing contains '{wanted}'; {everything} shows all")
        return NOTHING_FOUND
    print("\n".join(words))
    return 0


def _print_json(content: object) -> None:
    print(json.dumps(content, ensure_ascii=False, indent=2))


@verb("show")
def show(name: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe: what it sets on a terminal, all its fields as YAML or JSON elsewhere."""
    from raytune_ft.config import catalog, loader

    if name in catalog.PRESETS:
        _print_json(catalog.preset(name))
        return
    recipe = loader.load_recipe(name, overrides or [])
    if as_json:
        _print_json(recipe.model_dump(mode="json"))
    elif sys.stdout.isatty():
        from raytune_ft.cli import tables

        tables.print_recipe(recipe, name)
    else:
        print(loader.dump_yaml(recipe), end="")


@verb("schema")
def schema() -> None:
    """Print the JSON Schema of a recipe file, for editors."""
    from raytune_ft.config.json_schema import recipe_schema

    _print_json(recipe_schema())


COPY_TITLE = """\
A copy of {0}: every field, with its meaning. It needs no other file.

  raytune-ft train {0}_copy.yaml

An editor completes and checks it: docs/recipe.md, "In an editor"."""

FolderArgument = Annotated[str, typer.Argument(metavar="DIR", help="Folder to write into.")]


@verb("copy")
def copy(name: Name, folder: FolderArgument) -> None:
    """Write a shipped recipe into DIR as a full, commented file: NAME_copy.yaml."""
    from raytune_ft.config import catalog, loader

    if name in catalog.PRESETS:
        text, suffix = json.dumps(catalog.preset(name), indent=2) + "\n", ".json"
    else:
        text, suffix = loader.dump_yaml(loader.load_recipe(name), COPY_TITLE.format(name)), ".yaml"
    target = Path(folder).expanduser() / f"{loader.recipe_stem(name)}_copy{suffix}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        if target.exists():
            raise RecipeError(f"{target}: exists; remove it, or name another folder") from None
        raise RecipeError(f"{folder}: is not a folder; name one to write into") from None
    except OSError as error:
        raise RecipeError(f"{target}: cannot be written: {error.strerror}") from None
    print(f"Copy to {target}")


@verb("copy-cfg")
def copy_cfg(name: Name, folder: FolderArgument) -> int:
    """Do what `copy` does."""
    return copy(name=name, folder=folder)
