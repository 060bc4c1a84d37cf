"""The table of docs/fast-path.md is what the installer does with every family that is shipped."""

from __future__ import annotations

from raytune_ft.config import catalog
from tests.kernels.coverage import PAGE, written


def test_page_has_the_table_of_now() -> None:
    """`python -m tests.kernels.coverage` writes it anew."""
    page = PAGE.read_text()
    assert page == written()
    families = [name for name, one in catalog.families().items() if one.title not in page]
    assert not families
