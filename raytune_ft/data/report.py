"""Report: what became of rows, as plain values that add up; nothing is dropped without a line."""

from __future__ import annotations

from typing import Literal, TypedDict

PLACES_KEPT = 5
"""Rows named per reason; the rest is only counted."""
UNUSABLE, EMPTY = "unusable", "empty"
TOO_LONG, UNTRAINED = "over max_length", "without a trained token"
CUT, SPLIT = "cut", "split"


class Report(TypedDict):
    """Counts of rows and tokens, as in a run folder's data.json."""

    rows: int
    used: int
    tokens: int
    """In packs."""
    targets: int
    """Tokens in packs that are learned."""
    left_out: int
    """Tokens of used rows that stand in no pack: stretches in which nothing is learned."""
    cut: int
    """Rows that are used up to `max_length`."""
    split: int
    """Rows over `max_length` that are used in parts."""
    dropped: dict[str, int]
    """Reason -> rows."""
    places: dict[str, list[str]]
    """Reason (or `cut`, `split`) -> the first few rows, with what is wrong with them."""


def new_report(rows: int = 0) -> Report:
    """Make a report of `rows` rows of which nothing is known yet."""
    return Report(
        rows=rows, used=0, tokens=0, targets=0, left_out=0, cut=0, split=0, dropped={}, places={}
    )


def add_report(report: Report, later: Report) -> None:
    """Add the report of rows that come after these."""
    keys: tuple[Literal["rows", "used", "tokens", "targets", "left_out", "cut", "split"], ...]
    keys = ("rows", "used", "tokens", "targets", "left_out", "cut", "split")
    for key in keys:
        report[key] += later[key]
    for reason, count in later["dropped"].items():
        report["dropped"][reason] = report["dropped"].get(reason, 0) + count
    for reason, places in later["places"].items():
        known = report["places"].setdefault(reason, [])
        known.extend(places[: PLACES_KEPT - len(known)])


def drop(report: Report, reason: str, place: str) -> None:
    """Count a row that is left out."""
    report["dropped"][reason] = report["dropped"].get(reason, 0) + 1
    name_place(report, reason, place)


def forget(report: Report, place: str, *, split: bool) -> None:
    """Count a row as left out that is counted as used: no part of it has a token to learn."""
    report["used"] -= 1
    drop(report, UNTRAINED, place)
    if split:
        report["split"] -= 1
        report["places"][SPLIT] = [other for other in report["places"][SPLIT] if other != place]


def name_place(report: Report, reason: str, place: str) -> None:
    """Name a row, if few are named yet."""
    if len(report["places"].setdefault(reason, [])) < PLACES_KEPT:
        report["places"][reason].append(place)


def nothing_left(report: Report) -> str:
    """Say why there is no row to train on, naming the first of each reason."""
    if not report["rows"]:
        return "data.sources: there is no row to train on; give them a larger limit or weight"
    reasons = (
        f"{count} {reason} ({report['places'].get(reason, ['?'])[0]})"
        for reason, count in report["dropped"].items()
    )
    return f"data.sources: none of {report['rows']} rows can be trained on: {', '.join(reasons)}"
