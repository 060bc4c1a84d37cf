"""Names that stand in a configuration for something else: folders, DeepSpeed files, model cards."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from raytune_ft.config import catalog

_STAGE = re.compile(r"z(?:ero)?[-_]?(?:stage[-_]?)?([0-3])", re.IGNORECASE)


def split_folder(folder: str) -> tuple[str, str | None]:
    """Split an output folder into `run.storage` and `run.name`, which holds plain letters."""
    storage, slash, name = folder.rstrip("/").rpartition("/")
    word = re.sub(r"[^A-Za-z0-9._-]+", "_", name)[:64].lstrip("._-")
    return (storage or "/" if slash else "."), word or None


def deepspeed_name(given: str | Mapping[str, Any]) -> str:
    """Return the preset that a DeepSpeed file or its content stands for, else the file itself.

    Only its stage and offloading are looked at; the rest of the recipe comes from the recipe.
    """
    if isinstance(given, Mapping):
        zero = given.get("zero_optimization", given)
        zero = zero if isinstance(zero, Mapping) else {}
        stage = zero["stage"] if zero.get("stage") in (0, 1, 2, 3) else 0
        offload = bool(zero.get("offload_optimizer") or zero.get("offload_param"))
    else:
        found = _STAGE.search(given.rpartition("/")[2])
        if found is None:
            return given
        stage, offload = int(found[1]), "offload" in given.lower()
    if stage == 0:
        return "none"
    return f"zero{max(stage, 2)}_offload" if offload else f"zero{stage}"


def card_of(path: str) -> catalog.Card | None:
    """Return the model card of a hub name, or of a folder called like its last part."""
    name = path.rstrip("/").rpartition("/")[2].lower()
    cards = map(catalog.card, catalog.models())
    return next((c for c in cards if name and c.path.rpartition("/")[2].lower() == name), None)
