"""What is remembered of one request: filled on its way through, then logged and counted.

`Record` travels in the ASGI scope. Its JSON line holds no text of a prompt or an answer, unless the
operator asks for that; a key's name, never the key.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.types import Scope

from raytune_ft.errors import ServeError

if TYPE_CHECKING:
    from raytune_ft.chat.model import Piece

RECORD = "raytune_ft.record"
"""The scope's key of the request's Record."""
LEFT = 499
"""Status of a request whose client left before the answer was whole, as nginx has it."""

Write = Callable[[str], None]


@dataclass
class Record:
    """One request."""

    id: str
    method: str
    key: str | None = None
    """Name of the API key; None where no key is asked for."""
    route: str = "other"
    """The route's pattern; `other` for what is none, so that metrics stay few."""
    status: int = LEFT
    model: str | None = None
    stream: bool = False
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    finish: str | None = None
    error: str | None = None
    """What ended an answer whose status was sent already."""
    texts: dict[str, Any] = field(default_factory=dict)
    """Messages or prompt, and the answer; only written where prompts are to be logged."""
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    """Seconds from the request to the first token."""
    last: float = 0.0
    """Seconds from the request to the newest token."""
    gaps: list[float] = field(default_factory=list)
    """Seconds between tokens, evenly for those that came together."""

    @property
    def seconds(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self.began

    def take(self, piece: Piece) -> None:
        """Note the times and counts of one more piece."""
        now, new = self.seconds, piece.n_tokens - self.completion_tokens
        if new > 0:
            if self.first is None:
                self.first, new = now, new - 1
            if new:
                self.gaps += [(now - (self.last or self.first)) / new] * new
            self.last = now
        self.completion_tokens = max(self.completion_tokens, piece.n_tokens)
        self.cached_tokens = max(self.cached_tokens, piece.n_cached)
        self.finish = piece.finish or self.finish

    def line(self, *, with_texts: bool = False) -> str:
        """Return the access log's line, without its end."""
        shown: dict[str, Any] = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "id": self.id,
            "key": self.key,
            "method": self.method,
            "route": self.route,
            "status": self.status,
            "seconds": round(self.seconds, 4),
        }
        if self.model is not None:
            shown |= {
                "model": self.model,
                "stream": self.stream,
                "prompt_tokens": self.prompt_tokens,
                "completion_tokens": self.completion_tokens,
                "cached_tokens": self.cached_tokens,
                "first_token_seconds": None if self.first is None else round(self.first, 4),
                "finish": self.finish,
            }
        if self.error:
            shown["error"] = self.error
        if with_texts:
            shown |= self.texts
        return json.dumps(shown, ensure_ascii=False)


def record_of(scope: Scope) -> Record:
    """Return the scope's record; a new one where nobody watches."""
    found = scope.get(RECORD)
    if isinstance(found, Record):
        return found
    made = scope[RECORD] = Record("none", str(scope.get("method", "")))
    return made


def access_log(path: str | None) -> Write:
    """Return what writes lines to a file, or to standard output, where Ray keeps it as a log.

    Each line is one write to a file that is opened for appending, so replicas may share it.

    Raises:
        ServeError: the file cannot be opened.
    """
    if path is None:
        return _to_stdout
    try:
        file = os.open(Path(path).expanduser(), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise ServeError(
            f"access_log {path}: cannot be written ({error.strerror}); name a file in a folder "
            "that exists on the replica's machine"
        ) from None
    return lambda line: _append(file, line)


def _append(file: int, line: str) -> None:
    os.write(file, line.encode("utf-8", "replace") + b"\n")


def _to_stdout(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
