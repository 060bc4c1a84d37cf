"""What a person thinks of answers, as rows that `train` takes.

`good.jsonl` holds {"prompt": [messages], "completion": [answer]}: only the answer is learned, not
what was said before it. `pairs.jsonl` holds {"prompt", "chosen", "rejected"} for
`train.objective: dpo` and `orpo`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raytune_ft.chat.history import Message
from raytune_ft.errors import DataError

GOOD, PAIRS = "good.jsonl", "pairs.jsonl"


class Feedback:
    """Rows in one folder, which is made with the first of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def good(self, asked: Sequence[Message], answer: str) -> Path:
        """Add an answer to learn; return the file."""
        return self._add(GOOD, {"prompt": list(asked), "completion": [_said(answer)]})

    def better(self, asked: Sequence[Message], chosen: str, rejected: str) -> Path:
        """Add an answer that is better than another one; DataError if they are the same."""
        if chosen == rejected:
            raise DataError("both answers are the same; there is nothing to prefer")
        row = {"prompt": list(asked), "chosen": [_said(chosen)], "rejected": [_said(rejected)]}
        return self._add(PAIRS, row)

    def _add(self, name: str, row: dict[str, Any]) -> Path:
        path = self.folder / name
        line = json.dumps(row, ensure_ascii=False) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as file:
                file.write(line)  # one write of one line: a reader never sees half a row
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror or error})") from None
        return path


def _said(answer: str) -> Message:
    return {"role": "assistant", "content": answer}
