"""One checkpoint per family and form, and one loaded model, for all tests of a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.families.checkpoints import make
from tests.families.loaded import load

Checkpoint = Callable[..., Path]
Loaded = Callable[[str], Any]


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than these matrices."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Return a folder of `make(family, **options)`, written once; read it, never write to it."""
    made: dict[Any, Path] = {}

    def get(family: str, **options: Any) -> Path:
        key = (family, *sorted((k, str(v)) for k, v in options.items()))
        if key not in made:
            made[key] = make(family, tmp_path_factory.mktemp(family) / family, **options)
        return made[key]

    return get


@pytest.fixture(scope="session")
def loaded(checkpoint: Checkpoint) -> Loaded:
    """Return a family's float32 model, loaded once; look at it, never change it."""
    models: dict[str, Any] = {}

    def get(family: str) -> Any:
        if family not in models:
            models[family] = load(checkpoint(family))
        return models[family]

    return get
