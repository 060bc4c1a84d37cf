"""Stream: rows are counted and windows made as a plain loop would, however the work is cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError
from tests.conftest import write_chats
from tests.data.feeds import COMPAT, content, feed_of, measured, open_rows

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    from raytune_ft.cluster import ray_session

    with ray_session():
        yield


@pytest.mark.usefixtures("ray")
def test_rows_are_counted_the_same_however_the_work_is_cut(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytune_ft.data import stream

    path = write_chats(tmp_path / "a.jsonl", 300)
    source, encoder, _ = open_rows(path, tokenizer, compat=COMPAT)
    expected = measured(source, encoder)
    monkeypatch.setattr(stream, "IN_PROCESS_ROWS", 0)
    for rows_per_task in (300, 70):
        monkeypatch.setattr(stream, "ROWS_PER_TASK", rows_per_task)
        done: list[tuple[int, int]] = []
        got = stream.measure(source, encoder, lambda *pair, done=done: done.append(pair))
        assert got.lengths.tolist() == expected.lengths.tolist()
        assert got.targets.tolist() == expected.targets.tolist()
        assert got.sets.tolist() == expected.sets.tolist()
        assert got.report == expected.report
        assert done[-1] == (300, 300)


@pytest.mark.usefixtures("ray")
def test_windows_come_in_the_order_asked_for(chats: Path, tokenizer: TextTokenizer) -> None:
    import ray

    from raytune_ft.data import stream

    feed = feed_of(chats, tokenizer, window=8)
    numbers = [(3, 2), (0, 4), (0, 0)]
    made = stream.make_windows(ray.put({"some": feed}), "some", numbers, at_once=2)
    for (epoch, number), (ref, size) in zip(numbers, made, strict=True):
        table = ray.get(ref)
        got, expected = stream.read_window(table), feed.window(epoch, number)
        assert [content(pack) for pack in got.packs] == [content(p) for p in expected.packs]
        assert (got.report, got.first, got.last) == (
            expected.report, expected.first, expected.last,
        )  # fmt: skip
        assert size == table.nbytes


@pytest.mark.usefixtures("ray")
def test_the_first_bad_row_comes_back_as_it_was_raised(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytune_ft.data import stream

    path = write_chats(tmp_path / "a.jsonl", 60)
    lines = path.read_text().splitlines()
    lines[33] = lines[50] = "{broken"
    path.write_text("\n".join(lines))
    source, encoder, _ = open_rows(path, tokenizer)
    monkeypatch.setattr(stream, "IN_PROCESS_ROWS", 0)
    monkeypatch.setattr(stream, "ROWS_PER_TASK", 10)
    with pytest.raises(DataError, match=r"^\S+a\.jsonl:34: not valid JSON") as caught:
        stream.measure(source, encoder)
    assert type(caught.value) is DataError


def test_few_rows_are_counted_without_ray(chats: Path, tokenizer: TextTokenizer) -> None:
    from raytune_ft.data import stream

    source, encoder, _ = open_rows(chats, tokenizer)
    assert stream.measure(source, encoder).report == measured(source, encoder).report


def test_a_window_without_packs_travels_as_well(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    from raytune_ft.data import stream

    path = write_chats(tmp_path / "a.jsonl", 3)
    feed = feed_of(path, tokenizer, max_length=16, over_length="drop")
    window = stream.read_window(stream.window_table(feed, 0, 0))
    assert window.packs == []
    assert window.report["dropped"] == {"over max_length": 3}
