"""Rows that are wrong: told by file and line, one line each, and counted where they are skipped.

Every kind stands first, in the middle, last, alone and in a second file, and is read by the way
that training takes: sources, windows, packs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.data.counting import estimate
from raytune_ft.data.places import iter_packs
from raytune_ft.data.report import CUT, UNUSABLE, Report
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed
from raytune_ft.errors import DataError
from tests.data.feeds import feed_of, total
from tests.data.wrong_rows import ROWS, SKIP, USED, WrongRow, file_bytes, lay_out, line_of

LONGEST_MESSAGE = 1000
CASES = [
    pytest.param(case, placement, id=f"{case.name}-{placement}")
    for case in ROWS
    for placement in case.placements
]


def read_all(feed: Feed) -> tuple[set[int], Report]:
    """Read an epoch; return the rows that stand in packs, and what was said of the others."""
    placed = list(iter_packs(feed, epochs=1))
    known = estimate(feed)
    assert known.exact
    assert known.packs == len(placed)
    return {int(row) for one in placed for row in one.pack.row_ids}, total(placed)


def assert_one_line(message: str, start: str, says: str) -> None:
    assert message.startswith(start), message[:300]
    assert says in message, message[:300]
    assert message.isprintable()
    assert len(message) <= LONGEST_MESSAGE


def test_sixty_kinds_and_no_name_twice() -> None:
    names = [case.name for case in ROWS]
    assert len(names) == len(set(names))
    assert sum(case.fate == UNUSABLE for case in ROWS) >= 60


@pytest.mark.parametrize(("case", "placement"), CASES)
def test_a_wrong_row_is_named_or_counted(
    tmp_path: Path, tokenizer: TextTokenizer, case: WrongRow, placement: str
) -> None:
    rows, place = lay_out(case, placement)
    path = tmp_path / f"rows{case.suffix}"
    before = 0
    if placement == "second file":
        good = [case.good] * 3
        (tmp_path / f"before{case.suffix}").write_bytes(file_bytes(case, good))
        before = len(good)
    path.write_bytes(file_bytes(case, rows))
    given = tmp_path if before else path
    where = f"{path}:{line_of(case, rows, place)}"
    says = case.says if case.alone is None or placement != "alone" else case.alone
    wrong, everything = before + place, set(range(before + len(rows)))

    if case.fate == UNUSABLE:
        with pytest.raises(DataError) as stopped:
            read_all(feed_of(given, tokenizer, **case.data))
        assert_one_line(str(stopped.value), f"{where}: ", says)
        assert SKIP in str(stopped.value)
    for on_error in ("skip",) if case.fate == UNUSABLE else ("stop", "skip"):
        feed = feed_of(given, tokenizer, on_error=on_error, **case.data)
        if placement == "alone" and case.fate not in (USED, CUT):
            with pytest.raises(DataError) as none_left:
                read_all(feed)
            expected = "data.sources: none of 1 rows can be trained on: 1 " + case.fate
            assert_one_line(str(none_left.value), f"{expected} ({where}", says)
            continue
        used, report = read_all(feed)
        assert report["rows"] == len(everything)
        assert used == (everything if case.fate in (USED, CUT) else everything - {wrong})
        assert report["used"] == len(used)
        assert report["dropped"] == ({} if case.fate in (USED, CUT) else {case.fate: 1})
        if case.fate == USED:
            assert report["places"] == {}
        else:
            (named,) = report["places"][case.fate]
            assert_one_line(named, where, says)
