"""Lines: what a benchmark measures, printed and kept as JSON, within a budget of seconds."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any


class Lines:
    """The lines of one benchmark; `args` has `budget` in seconds and `out`, a file or None."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.begun = time.monotonic()
        self.lines: list[dict[str, Any]] = []

    @property
    def left_s(self) -> float:
        """Seconds left of the budget."""
        return float(self.args.budget) - (time.monotonic() - self.begun)

    def emit(self, **values: Any) -> dict[str, Any]:
        """Keep a line and print it."""
        line = {**values, "at_s": round(time.monotonic() - self.begun, 1)}
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        if self.args.out is not None:
            with self.args.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return line
