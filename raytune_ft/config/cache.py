"""Where things live that can be made again: the built default model, downloads, plot fonts."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return the cache folder: RAYTUNE_CACHE, else ~/.cache/raytune_ft. It may not exist yet."""
    chosen = os.environ.get("RAYTUNE_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "raytune_ft"
