"""Words: fields, values and outcomes of trials in, the few characters that tables have for them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

LONGEST = 24
"""Characters of a value that a table shows."""


def short_field(name: str, among: Iterable[str]) -> str:
    """Return a field without its section, if no other of `among` then has the same name."""
    last = name.rpartition(".")[2]
    return name if sum(one.rpartition(".")[2] == last for one in among) > 1 else last


def short_value(value: Any) -> str:
    """Write a value in few characters: `2.05e-04`, `0.1`, `q_proj, v_proj`."""
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-2 else f"{value:.4g}"
    if isinstance(value, list):
        value = ", ".join(map(short_value, value))
    said = " ".join(str(value).split())
    return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"


def assignments(values: Mapping[str, Any]) -> str:
    """Write a trial's values on one line: `lr=2.05e-04 r=16`."""
    return " ".join(
        f"{short_field(name, values)}={short_value(value)}" for name, value in values.items()
    )


def figure(value: float | None) -> str:
    """Write a metric; `-` where there is none."""
    if value is None or not math.isfinite(value):
        return "-" if value is None else str(value)
    return (
        f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}" if value < 1e6 else f"{value:.3g}"
    )
