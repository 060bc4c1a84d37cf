"""Durable, with signs of life: what training writes beats (`guarding.pulse`) on the way.

The rest of this is `raytune_ft.durable`'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from raytune_ft import durable
from raytune_ft.durable import DROPPED, FORMER, WRITING, drop, tidy, whole_folder
from raytune_ft.training.guarding.pulse import PULSE

__all__ = ["DROPPED", "FORMER", "WRITING", "drop", "tidy", "whole_folder", "write"]


def write(path: Path, blocks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a new file as `durable.write` does, and beat with every block."""
    return durable.write(path, blocks, PULSE.beat)
