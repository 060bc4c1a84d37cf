"""How an endpoint behaves to its clients, apart from who they are (`serving.guard`)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ApiOptions:
    """What `serving.api` is told by the application."""

    max_waiting: int | None = None
    """Requests that may wait beside those being answered, refused before their bodies are read;
    none: the engine alone says when it is full."""
    deadline_seconds: float = 600.0
    """For one answer, from its request to its last token."""
    body_seconds: float = 20.0
    """For a client to send a body."""
    access_log: str | None = None
    """A file for one JSON line per request; none: standard output."""
    log_prompts: bool = False
    """Whether those lines hold messages and answers."""
    replica: str = "0"
    """This replica's name in metrics."""
