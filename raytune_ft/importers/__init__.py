"""Importers: a configuration of another trainer in, a recipe out, and what was left behind.

XTuner's Python files are read as syntax trees, LLaMA-Factory's and Axolotl's YAML as plain
values; nothing of a file is run. No torch, no Ray.
"""

from __future__ import annotations

from pathlib import Path

from raytune_ft.config.document import MAX_BYTES, read_file
from raytune_ft.errors import RecipeError
from raytune_ft.importers import axolotl, llama_factory, xtuner
from raytune_ft.importers.draft import Draft
from raytune_ft.importers.python_file import read_python
from raytune_ft.importers.values import Value, from_document

__all__ = ["Draft", "read_config"]

KINDS = "XTuner (.py), LLaMA-Factory or Axolotl (.yaml)"


def read_config(path: str) -> Draft:
    """Read a foreign configuration.

    Returns:
        A draft: `recipe()` checks it and gives the recipe, `report()` what was not carried over.

    Raises:
        RecipeError: the file is missing, is of no kind that is known, or trains in a way that
            has no counterpart.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise RecipeError(f"{path}: no such file; name a configuration of {KINDS}")
    return _python(file, path) if file.suffix == ".py" else _yaml(file, path)


def _python(file: Path, path: str) -> Draft:
    if file.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{path}: is too large for a configuration")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: is no text in UTF-8; name a configuration of {KINDS}") from None
    content = read_python(text, path)
    if not any(name in content.values for name in xtuner.TELLING):
        raise RecipeError(
            f"{path}: is no XTuner configuration (no {', no '.join(xtuner.TELLING)}); "
            f"name one of {KINDS}"
        )
    draft = Draft(path, "XTuner")
    xtuner.convert(content, draft)
    return draft


def _yaml(file: Path, path: str) -> Draft:
    document = read_file(file, path)
    if document.problems:
        raise RecipeError("\n".join(document.problems))
    if not isinstance(document.content, dict):
        raise RecipeError(f"{path}: holds no keys; name a configuration of {KINDS}")
    values = from_document(document)
    present = document.content.keys()
    if "base_model" in present and present & set(axolotl.TELLING) - {"base_model"}:
        return _filled(Draft(path, "Axolotl"), values, file)
    if "model_name_or_path" in present and present & set(llama_factory.TELLING):
        return _filled(Draft(path, "LLaMA-Factory"), values, file)
    if "model" in present and "data" in present:
        raise RecipeError(f"{path}: is a recipe already; train it with: raytune-ft train {path}")
    raise RecipeError(
        f"{path}: neither base_model (Axolotl) nor model_name_or_path (LLaMA-Factory) with its "
        f"keys; name a configuration of {KINDS}"
    )


def _filled(draft: Draft, values: Value, file: Path) -> Draft:
    if draft.kind == "Axolotl":
        axolotl.convert(values, draft)
    else:
        llama_factory.convert(values, draft, file.parent)
    return draft
