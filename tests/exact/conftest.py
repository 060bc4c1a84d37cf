"""Processes that run the cells, the rule when the whole matrix runs, and its table at the end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exact.bounds import Bounds
from tests.exact.cells import Cell
from tests.exact.groups import Groups
from tests.exact.runner import Outcome

RESULTS = pytest.StashKey[dict[Cell, Outcome]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = {}


@pytest.fixture(scope="package")
def bounds(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Bounds]:
    """Judges of outcomes; processes start at the first cell of their number."""
    groups = Groups(Path(tmp_path_factory.mktemp("exact")))
    yield Bounds(groups, request.config.stash[RESULTS])
    groups.close()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    results = terminalreporter.config.stash[RESULTS]
    if not results:
        return
    terminalreporter.section(f"gradient equality: {len(results)} cells")
    terminalreporter.write_line("dtype     stage  cells  ranks    worst gradient  worst norm")
    for dtype, stage in sorted({(cell.dtype, cell.stage) for cell in results}, reverse=True):
        own = {c: o for c, o in results.items() if (c.dtype, c.stage) == (dtype, stage)}
        ranks = ",".join(str(world) for world in sorted({cell.world for cell in own}))
        gradient, norm = (max(getattr(o, w) for o in own.values()) for w in ("gradient", "norm"))
        terminalreporter.write_line(
            f"{dtype:9} {stage:5} {len(own):6}  {ranks:7} {gradient:.1e}         {norm:.1e}"
        )
