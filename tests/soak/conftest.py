"""Soaks run for hours: only `make soak`, which is `pytest -m soak`, runs them."""

from __future__ import annotations

import pytest

from tests.serving.conftest import endless  # noqa: F401  (a fixture)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the soaks out of every other run."""
    if "soak" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("soak")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in long]
