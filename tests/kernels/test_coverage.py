"""Tables of the pages are those of now: every family's parts, and the bytes of adapters."""

from __future__ import annotations

from benchmarks import kernel_bytes
from raytune_ft.config import catalog
from tests.kernels.coverage import PAGE, written


def test_page_has_the_table_of_now() -> None:
    """`python -m tests.kernels.coverage` writes it anew."""
    page = PAGE.read_text()
    assert page == written()
    families = [name for name, one in catalog.families().items() if one.title not in page]
    assert not families


def test_bytes_on_the_page_are_those_that_are_counted() -> None:
    page = (PAGE.parent / "performance.md").read_text()
    assert kernel_bytes.table(kernel_bytes.TOKENS, kernel_bytes.RATE) in page
