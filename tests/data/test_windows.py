"""Windows: every row used or counted with its reason, every token in a pack or counted."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from raytune_ft.data import windows
from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.places import iter_packs
from raytune_ft.data.report import add_report, new_report
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import measure_rows
from raytune_ft.errors import DataError
from raytune_ft.training.batching import count_targets
from tests.data.conftest import chat, write_jsonl
from tests.data.feeds import (
    LONG_ROWS,
    PACKINGS,
    feed_of,
    lone_examples,
    measured,
    open_rows,
    total,
)


def test_every_row_is_used_or_counted_with_its_reason(
    mixed: Path, tokenizer: TextTokenizer
) -> None:
    source, encoder, _ = open_rows(mixed, tokenizer, on_error="skip")
    got = measured(source, encoder)
    used = [True, False, False, True, False, False]
    assert (got.lengths > 0).tolist() == used * 7
    assert (got.lengths[3], got.lengths.max()) == (128, 128)
    report = got.report
    assert report["dropped"] == {"empty": 7, "without a trained token": 7, "unusable": 14}
    assert (report["rows"], report["used"], report["cut"]) == (42, 14, 7)
    assert report["used"] + sum(report["dropped"].values()) == report["rows"]
    assert report["tokens"] == got.lengths.sum()
    assert report["targets"] == got.targets.sum()
    assert report["places"]["empty"] == [f"{mixed}:{line}" for line in (2, 8, 14, 20, 26)]
    assert report["places"]["unusable"][0].startswith(f"{mixed}:5: ")


def test_reports_of_parts_add_up_to_that_of_the_whole(
    mixed: Path, tokenizer: TextTokenizer
) -> None:
    source, encoder, _ = open_rows(mixed, tokenizer, on_error="skip")
    total = new_report()
    for rows in np.array_split(np.arange(42), 5):
        add_report(total, measure_rows(source, encoder, rows).report)
    assert total == measured(source, encoder).report


@pytest.mark.parametrize(
    ("over_length", "used", "dropped", "named"),
    [
        ("cut", 14, {"without a trained token": 7}, ("cut", [4, 10, 16, 22, 28])),
        ("split", 21, {}, ("split", [3, 4, 9, 10, 15])),
        ("drop", 7, {"over max_length": 14}, ("over max_length", [3, 4, 9, 10, 15])),
    ],
)
def test_long_rows_are_cut_split_or_dropped_as_asked_and_named(
    mixed: Path,
    tokenizer: TextTokenizer,
    over_length: str,
    used: int,
    dropped: dict[str, int],
    named: tuple[str, list[int]],
) -> None:
    feed = feed_of(mixed, tokenizer, on_error="skip", over_length=over_length,
                   shuffle_before_pack=False)  # fmt: skip
    report = feed.window(0, 0).report
    assert (report["rows"], report["used"]) == (42, used)
    assert report["dropped"] == {"empty": 7, "unusable": 14, **dropped}
    reason, lines = named
    assert report["places"][reason] == [f"{mixed}:{line}" for line in lines]
    assert report["cut"] == (7 if over_length == "cut" else 0)
    assert report["split"] == (14 if over_length == "split" else 0)


@pytest.mark.parametrize("pack", PACKINGS)
def test_a_long_row_ends_the_run_if_asked(mixed: Path, tokenizer: TextTokenizer, pack: str) -> None:
    feed = feed_of(mixed, tokenizer, on_error="skip", over_length="error", pack=pack,
                   shuffle_before_pack=False)  # fmt: skip
    with pytest.raises(DataError, match=r"mixed\.jsonl:3: \d+ tokens, data\.max_length is 128"):
        feed.window(0, 0)


def test_the_first_bad_row_stops_by_default(mixed: Path, tokenizer: TextTokenizer) -> None:
    source, encoder, _ = open_rows(mixed, tokenizer)
    with pytest.raises(DataError, match=r"mixed\.jsonl:5: column 'messages' ends with role 'user'"):
        measured(source, encoder)


@pytest.mark.parametrize("pack", PACKINGS)
@pytest.mark.parametrize("over_length", LONG_ROWS)
@pytest.mark.parametrize("window", [5, 64])
def test_the_report_counts_exactly_what_stands_in_packs(
    varied: Path, tokenizer: TextTokenizer, pack: str, over_length: str, window: int
) -> None:
    """Every row is in a pack or counted as left out, and so is every token of it."""
    feed = feed_of(varied, tokenizer, max_length=64, window=window, pack=pack,
                   over_length=over_length)  # fmt: skip
    alone = lone_examples(feed)
    placed = list(iter_packs(feed, epochs=1))
    report = total(placed)
    rows = {int(row) for one in placed for row in one.pack.row_ids}
    assert (report["rows"], report["used"]) == (40, len(rows))
    assert report["used"] + sum(report["dropped"].values()) == 40
    assert report["tokens"] == sum(len(one.pack.input_ids) for one in placed)
    assert report["targets"] == sum(count_targets(one.pack) for one in placed)
    limit = None if "concat" in pack or over_length == "split" else 64
    assert report["tokens"] + report["left_out"] == sum(len(alone[row][:limit]) for row in rows)
    over = [row for row in range(40) if len(alone[row]) > 64]
    kept = sum(row in rows for row in over)
    assert len(over) > 5
    assert (report["cut"], report["split"]) == ((kept, 0) if limit else (0, kept))
    untrained = {"without a trained token": len(over) - kept} if kept < len(over) else {}
    assert report["dropped"] == (
        {"over max_length": len(over)} if over_length == "drop" else untrained
    )


def test_stretches_without_an_answer_are_left_out_and_counted(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    """A question that is longer than two packs."""
    questions = ["stone " * 300, "stone"]
    rows = [{"messages": chat(question, "red")} for question in questions]
    path = write_jsonl(tmp_path / "long.jsonl", rows)
    feed = feed_of(path, tokenizer, over_length="split")
    window = feed.window(0, 0)
    whole = lone_examples(feed)
    (long_row,) = [pack for pack in window.packs if 0 in pack.row_ids]
    assert len(whole[0]) > 2 * 128
    assert window.report["left_out"] == len(whole[0]) // 128 * 128
    assert window.report["tokens"] == sum(map(len, whole)) - window.report["left_out"]
    assert window.report["split"] == 1
    segment = long_row.row_ids.tolist().index(0)
    start, stop = long_row.cu_seqlens[segment : segment + 2]
    assert long_row.input_ids[start:stop].tolist() == whole[0][-(stop - start) :].tolist()


@pytest.mark.parametrize("pack", ["best_fit", "concat"])
def test_a_row_whose_only_label_is_lost_at_a_cut_is_left_out_and_named(
    chats: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, pack: str
) -> None:
    """Rows of 12 tokens, cut at 8: the one label of the first row has nothing before it."""

    def encoded(_source: object, _encoder: object, rows: Iterable[int]) -> list[Example]:
        return [labelled_at(8 if row == 0 else 3) for row in rows]

    monkeypatch.setattr(windows, "encode_rows", encoded)
    feed = feed_of(chats, tokenizer, max_length=8, pack=pack, over_length="split", window=1,
                   shuffle_before_pack=False)  # fmt: skip
    lost, kept = feed.window(0, 0), feed.window(0, 1)
    assert lost.packs == []
    assert lost.report == {
        **new_report(1), "dropped": {"without a trained token": 1},
        "places": {"split": [], "without a trained token": [f"{chats}:1"]},
    }  # fmt: skip
    assert [pack.row_ids.tolist() for pack in kept.packs] == [[1]]
    assert kept.report == {
        **new_report(1), "used": 1, "tokens": 8, "targets": 1, "left_out": 4, "split": 1,
        "places": {"split": [f"{chats}:2"]},
    }  # fmt: skip


def test_a_stretch_without_an_answer_takes_no_room_in_another_row_s_pack(
    chats: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first row's last 4 tokens would fit beside the second row, and teach nothing there."""

    def encoded(_source: object, _encoder: object, rows: Iterable[int]) -> list[Example]:
        short = labelled_at(2)
        brief = Example(short.input_ids[:4], short.labels[:4], 4)
        return [labelled_at(3) if row == 0 else brief for row in rows]

    monkeypatch.setattr(windows, "encode_rows", encoded)
    feed = feed_of(chats, tokenizer, max_length=8, over_length="split", window=2,
                   shuffle_before_pack=False)  # fmt: skip
    window = feed.window(0, 0)
    assert sorted(pack.cu_seqlens.tolist() for pack in window.packs) == [[0, 4], [0, 8]]
    assert (window.report["used"], window.report["left_out"]) == (2, 4)


def labelled_at(place: int) -> Example:
    labels = np.full(12, IGNORE_INDEX, np.int32)
    labels[place] = place
    return Example(np.arange(12, dtype=np.int32), labels, 12)
