"""The application behind uvicorn in a thread: real sockets, without Ray's 20 seconds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from raytune_ft.serving.api import build_api
from raytune_ft.serving.engine import ChatEngine
from raytune_ft.serving.guard import GuardRules
from raytune_ft.serving.options import ApiOptions
from tests.serving.conftest import free_port

UNLOGGED, OPEN = ApiOptions(access_log="/dev/null"), GuardRules()


@contextmanager
def served_locally(
    engine: ChatEngine, options: ApiOptions = UNLOGGED, rules: GuardRules = OPEN
) -> Iterator[str]:
    """Serve an engine; yields its URL without a slash at the end."""
    port = free_port()
    config = uvicorn.Config(build_api(engine, rules, options), port=port, log_level="critical")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(10)


@contextmanager
def served(engine: ChatEngine, rules: GuardRules) -> Iterator[str]:
    """Serve an engine's page; yields its URL."""
    with served_locally(engine, rules=rules) as url:
        yield url + "/"
