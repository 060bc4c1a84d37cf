"""Patches: each plants one known silent bug; the lines before its diff say which, and who finds it.

bug: what goes wrong without a word
found by: tests/data/test_x.py::test_y tests/...
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
BUG, FOUND_BY = "bug: ", "found by: "


@dataclass(frozen=True)
class Mutant:
    """One bug, and the tests of which at least one has to fail on it."""

    path: Path
    bug: str
    tests: tuple[str, ...]

    @property
    def number(self) -> str:
        return self.path.name.partition("_")[0]


def read_mutant(path: Path) -> Mutant:
    """Read a patch's first lines; ValueError if they are not as described above."""
    head = path.read_text(encoding="utf-8").partition("--- a/")[0].splitlines()
    if len(head) < 2 or not head[0].startswith(BUG) or not head[1].startswith(FOUND_BY):
        raise ValueError(f"{path}: begin it with '{BUG}...' and '{FOUND_BY}...'")
    tests = tuple(head[1].removeprefix(FOUND_BY).split())
    return Mutant(path, head[0].removeprefix(BUG), tests)


def all_mutants() -> list[Mutant]:
    """Read every patch, in the order of their numbers."""
    return [read_mutant(path) for path in sorted(FOLDER.glob("C*.patch"))]
