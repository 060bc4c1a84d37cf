"""`preprocess arxiv`: the Kaggle dump of arXiv's records in, the rows of chosen fields out.

In: one JSON object per line, with `categories` (words with spaces between) and `update_date`.
Out: one JSON array, as `arxiv_map_fn` reads it. Both are streamed: the dump has millions of lines.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from raytune_ft.errors import DataError, RecipeError

CATEGORIES = ("cs.AI", "cs.CL", "cs.CV")
START_DATE = "2020-01-01"
NAMED = 10
"""Bad lines that are named one by one; the rest are counted."""


@dataclass
class Chosen:
    """What was written, and what could not be read."""

    path: Path
    rows: int = 0
    lines: int = 0
    bad: list[str] = field(default_factory=list)
    """`file:line: reason` of the first bad lines."""
    n_bad: int = 0


def arxiv(
    source: str, target: str, categories: Collection[str] = CATEGORIES, start: str = START_DATE
) -> Chosen:
    """Write the records of some categories since a date; the target appears whole, at the end.

    Raises:
        RecipeError: the date is none, or a file cannot be opened.
        DataError: no line of the source is a record.
    """
    since = _date(start)
    out = Path(target).expanduser()
    chosen = Chosen(out)
    if Path(source).expanduser().resolve() == out.resolve():
        raise RecipeError(f"{target}: is the source; name another file")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("w", encoding="utf-8") as file:
            file.write("[")
            for row in _records(source, chosen):
                if _is_wanted(row, set(categories), since):
                    file.write(",\n" if chosen.rows else "\n")
                    file.write(json.dumps(row, ensure_ascii=False))
                    chosen.rows += 1
            file.write("\n]\n")
        if chosen.lines and chosen.n_bad == chosen.lines:
            raise DataError(f"{chosen.bad[0]}; no line of {source} is an arXiv record")
        temporary.replace(out)
    except OSError as error:
        raise RecipeError(f"{error.filename}: {error.strerror}; name another file") from None
    finally:
        temporary.unlink(missing_ok=True)
    return chosen


def _date(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise RecipeError(
            f"--start-date: expected a date such as 2020-01-01, got '{text}'"
        ) from None


def _records(source: str, chosen: Chosen) -> Iterator[dict[str, Any]]:
    """Yield the records; count and name the lines that are none."""
    with Path(source).expanduser().open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            chosen.lines += 1
            try:
                yield _record(line)
            except ValueError as error:
                chosen.n_bad += 1
                if len(chosen.bad) < NAMED:
                    chosen.bad.append(f"{source}:{number}: {error}")


def _record(line: bytes) -> dict[str, Any]:
    """Parse a line; ValueError says what is wrong with it."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    if not isinstance(row, dict):
        raise ValueError("no JSON object")
    for key in ("categories", "update_date"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"no '{key}'")
    try:
        date.fromisoformat(row["update_date"])
    except ValueError:
        raise ValueError(f"update_date '{row['update_date'][:20]}' is no date") from None
    return row


def _is_wanted(row: dict[str, Any], categories: set[str], since: date) -> bool:
    recent = date.fromisoformat(row["update_date"]) >= since
    return recent and not categories.isdisjoint(row["categories"].split())
