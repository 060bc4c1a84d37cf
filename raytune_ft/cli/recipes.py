"""Verbs about shipped recipes: list them, show one, copy one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from raytune_ft.cli.app import Json, Name, Overrides, Pattern, PatternOption, Recipe, verb
from raytune_ft.entry import tell
from raytune_ft.errors import RecipeError

NOTHING_FOUND = 1


@verb("list")
def list_recipes(pattern: Pattern = None, pattern_option: PatternOption = None) -> int:
    """Print the names of the shipped recipes."""
    from raytune_ft.config import catalog

    return _print_names(catalog.names(), pattern_option or pattern)


@verb("list-cfg")
def list_cfg(pattern: Pattern = None, pattern_option: PatternOption = None) -> int:
    """Print exactly the 301 names of XTuner v0.1.9."""
    from raytune_ft.config import catalog

    return _print_names(catalog.reference_names(), pattern_option or pattern)


def _print_names(names: list[str], pattern: str | None) -> int:
    found = [name for name in names if (pattern or "").lower() in name.lower()]
    if not found:
        tell(f"no name contains '{pattern}'; raytune-ft list shows all {len(names)}")
        return NOTHING_FOUND
    print("\n".join(found))
    return 0


@verb("show")
def show(name: Recipe, overrides: Overrides = None, as_json: Json = False) -> None:
    """Print a recipe with all its fields."""
    from raytune_ft.config import catalog, loader

    if name in catalog.PRESETS:
        print(json.dumps(catalog.preset(name), indent=2))
        return
    recipe = loader.load_recipe(name, overrides or [])
    if as_json:
        print(json.dumps(recipe.model_dump(mode="json"), ensure_ascii=False, indent=2))
    else:
        print(loader.dump_yaml(recipe), end="")


FolderArgument = Annotated[str, typer.Argument(metavar="DIR", help="Folder to write into.")]


@verb("copy")
def copy(name: Name, folder: FolderArgument) -> None:
    """Write a shipped recipe into DIR as a full, commented file: NAME_copy.yaml."""
    from raytune_ft.config import catalog, loader

    if name in catalog.PRESETS:
        text, suffix = json.dumps(catalog.preset(name), indent=2) + "\n", ".json"
    else:
        text, suffix = loader.dump_yaml(loader.load_recipe(name), f"A copy of {name}."), ".yaml"
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
