"""Soaks run for hours: only `make soak`, which is `pytest -m soak`, runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.made_model import SHAPES
from tests.serving.conftest import (
    Live,
    endless,  # noqa: F401  (a fixture)
    start_endpoint,
    stop_endpoint,
)

Start = Callable[..., AbstractContextManager[Live]]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--requests", type=int, help="of a soak by requests, for a rehearsal")
    parser.addoption("--seconds", type=float, help="in which they come, likewise")
    parser.addoption("--made", choices=[*SHAPES, "tiny"], help="shape of the model, likewise")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the soaks out of every other run."""
    if "soak" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]


@pytest.fixture
def started(tiny_model: Path, tmp_path: Path) -> Start:
    """Return what runs an endpoint of its own, for a test that is hard on it."""

    @contextmanager
    def run(model: Path = tiny_model, *, seconds: float = 150.0, **options: Any) -> Iterator[Live]:
        options = {"access_log": "/dev/null", **options}
        live = start_endpoint(model, tmp_path / "serve.log", options, seconds=seconds)
        try:
            yield live
        finally:
            stop_endpoint(live)

    return run
