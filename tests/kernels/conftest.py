"""Triton's interpreter for the tests that ask for it, and Triton as it was for all others.

Whether functions are interpreted is decided when Triton is first imported, which other packages
may have done; so Triton and our modules that import it (`*_triton`) are imported anew.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

import raytune_ft.kernels


def _takes_triton(name: str) -> bool:
    ours = name.startswith("raytune_ft.kernels.") and name.endswith("_triton")
    # its compiled part cannot be loaded twice, and interprets nothing
    return ours or (name.partition(".")[0] == "triton" and not name.startswith("triton._C"))


def _take_out() -> dict[str, ModuleType]:
    taken = {name: sys.modules.pop(name) for name in list(sys.modules) if _takes_triton(name)}
    for name in taken:
        # `from package import module` would find it there
        vars(raytune_ft.kernels).pop(name.rpartition(".")[2], None)
    return taken


@pytest.fixture(scope="module")
def interpreter() -> Iterator[None]:
    """Kernels run in Triton's interpreter, on tensors of the CPU."""
    before = _take_out()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        yield
    _take_out()
    sys.modules.update(before)


@pytest.fixture(scope="module", params=["plain", "triton"])
def way(request: pytest.FixtureRequest) -> str:
    """Each test once in plain torch and once in Triton's interpreter."""
    if request.param == "triton":
        request.getfixturevalue("interpreter")
    return str(request.param)
