"""Text files by blocks: row k is the k-th of a simple reader, at its line, however it is read."""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import tracemalloc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.data.files import blobs, blocks, csv_records, readers, text_index
from raytune_ft.data.files.blobs import BlobFile, LocalBlob
from raytune_ft.data.files.kinds import open_reader
from raytune_ft.data.files.readers import Reader
from raytune_ft.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RAYTUNE_CACHE", str(folder))
    return folder


@dataclass(frozen=True)
class CountingBlob(LocalBlob):
    """A file that tells how often it was read from one end to the other."""

    passes: ClassVar[list[str]] = []

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        self.passes.append(self.name)
        yield from super().chunks(start)


def write(folder: Path, name: str, raw: bytes) -> Path:
    path = folder / name
    path.write_bytes(raw)
    return path


def opened(path: Path) -> Reader:
    return open_reader(LocalBlob(path), path.name)


def check(reader: Reader, rows: list[Any], lines: list[int], order: list[int]) -> None:
    """Compare with rows known otherwise: all of them, and some in any order."""
    assert len(reader) == len(rows)
    assert reader.read(range(len(rows))) == rows
    assert [reader.where(n) for n in order] == [f"x:{lines[n]}" for n in order]
    assert reader.places(order) == [f"x:{lines[n]}" for n in order]
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(order) == [rows[n] for n in order]
    assert [again.where(n) for n in range(len(rows))] == [f"x:{line}" for line in lines]


# Lines that are rows, lines that are blank, and what stands between them.

FILLED = st.one_of(
    st.builds(lambda text: json.dumps({"text": text}), st.text(max_size=12)),
    st.builds(lambda n, pad: pad + json.dumps({"n": n}), st.integers(), st.sampled_from(["", " "])),
    st.integers(20, 90).map(lambda n: json.dumps({"long": "x" * n})),
)
BLANK = st.sampled_from(["", " ", "\t", "  \t ", " " * 40, "\r"])
LINES = st.lists(st.one_of(FILLED, FILLED, FILLED, BLANK), min_size=1, max_size=60)
CUTS = {
    "chunk": st.sampled_from([1, 7, 64, 4096]),
    "block_bytes": st.sampled_from([64, 640, 262_144]),
    "read_bytes": st.sampled_from([1, 200, 100_000]),
}


def cut(patch: pytest.MonkeyPatch, chunk: int, block_bytes: int, read_bytes: int) -> None:
    patch.setattr(blobs, "CHUNK_BYTES", chunk)
    patch.setattr(blocks, "BLOCK_BYTES", block_bytes)
    patch.setattr(readers, "READ_BYTES", read_bytes)


@given(data=st.data(), texts=LINES, end=st.sampled_from(["\n", "\r\n"]), bom=st.booleans(), **CUTS)
def test_json_lines_are_those_of_a_simple_reader(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    texts: list[str],
    end: str,
    bom: bool,
    chunk: int,
    block_bytes: int,
    read_bytes: int,
) -> None:
    raw = end.join(texts).encode() + (end.encode() if data.draw(st.booleans()) else b"")
    found = [(n, line) for n, line in enumerate(raw.split(b"\n"), start=1) if line.strip()]
    path = write(
        tmp_path_factory.mktemp("lines"), "a.jsonl", (b"\xef\xbb\xbf" if bom else b"") + raw
    )
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, chunk, block_bytes, read_bytes)
        if not found:
            with pytest.raises(DataError, match=r"no rows|empty"):
                opened(path)
            return
        reader = open_reader(LocalBlob(path), "x")
        order = data.draw(st.lists(st.integers(0, len(found) - 1), max_size=20))
        check(reader, [json.loads(line) for _, line in found], [n for n, _ in found], order)


@given(data=st.data(), texts=LINES, end=st.sampled_from(["\n", "\r\n"]), **CUTS)
def test_documents_are_lines_or_what_blank_lines_divide(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    texts: list[str],
    end: str,
    chunk: int,
    block_bytes: int,
    read_bytes: int,
) -> None:
    texts = [text.replace("\r", "") for text in texts]
    inner = "\n".join(texts).strip("\n \t")
    if not inner:
        return
    path = write(tmp_path_factory.mktemp("text"), "a.txt", end.join(texts).encode())
    numbered = list(enumerate(texts, start=1))
    if re.search(r"\n[ \t]*\n", inner):
        documents: list[tuple[int, str]] = []
        for number, text in numbered:
            if not text.strip():
                continue
            if documents and texts[number - 2].strip():
                documents[-1] = (documents[-1][0], documents[-1][1] + "\n" + text)
            else:
                documents.append((number, text))
    else:
        documents = [(number, text) for number, text in numbered if text.strip()]
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, chunk, block_bytes, read_bytes)
        order = data.draw(st.lists(st.integers(0, len(documents) - 1), max_size=20))
        rows = [{"text": text} for _, text in documents]
        check(open_reader(LocalBlob(path), "x"), rows, [n for n, _ in documents], order)


@given(
    data=st.data(),
    fields=st.lists(
        st.tuples(
            st.sampled_from(["a", 'q"q', "b\nb", "行\r\n\n", ","]), st.text("ab\n", max_size=4)
        ),
        min_size=1,
        max_size=30,
    ),
    gaps=st.lists(st.booleans(), min_size=30, max_size=30),
    **CUTS,
)
def test_records_stand_in_the_lines_where_pythons_reader_finds_them(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    fields: list[tuple[str, str]],
    gaps: list[bool],
    chunk: int,
    block_bytes: int,
    read_bytes: int,
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerow(["one", "two"])
    for row, gap in zip(fields, gaps, strict=False):
        text.write("\n" if gap else "")
        writer.writerow(row)
    oracle = csv.reader(io.StringIO(text.getvalue(), newline=""))
    next(oracle)
    rows, lines, before = list[dict[str, str]](), list[int](), oracle.line_num
    for record in oracle:
        if record:
            rows.append(dict(zip(["one", "two"], record, strict=True)))
            lines.append(before + 1)
        before = oracle.line_num
    path = write(tmp_path_factory.mktemp("csv"), "a.csv", text.getvalue().encode())
    with pytest.MonkeyPatch.context() as patch:
        cut(patch, chunk, block_bytes, read_bytes)
        order = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
        check(open_reader(LocalBlob(path), "x"), rows, lines, order)


@given(
    text=st.lists(
        st.sampled_from(["a", ",", '"', '"', "\n", "\n", "\r", "\r\n", " "]), max_size=40
    ),
    chunk=st.sampled_from([1, 5, 4096]),
    run=st.sampled_from([1, 3, 32]),
)
def test_any_text_has_the_records_and_the_mistakes_that_pythons_reader_finds(
    text: list[str], chunk: int, run: int
) -> None:
    raw = "".join(text)
    lines = [line + "\n" for line in raw.split("\n")]
    lines[-1] = lines[-1][:-1]
    oracle = csv.reader((line for line in lines if line), strict=True)
    starts, before, wrong = list[tuple[int, int]](), 0, None
    try:
        for record in oracle:
            if record:
                starts.append((sum(map(len, lines[:before])), before + 1))
            before = oracle.line_num
    except csv.Error as error:
        wrong = (before + 1, str(error))
    found, said = list[tuple[int, int]](), None
    cuts = [raw.encode()[n : n + chunk] for n in range(0, len(raw), chunk)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csv_records, "_RUN", run)
        try:
            for some, numbers in csv_records.record_starts(iter(cuts), 0, ","):
                found += zip(some.tolist(), numbers.tolist(), strict=True)
        except csv_records.RecordError as error:
            said = (error.line, str(error))
    assert said == wrong
    if not wrong:
        assert found == starts


# Rows that are long, and the limit.


def test_long_rows_and_their_neighbours_are_read(tmp_path: Path) -> None:
    rows = [{"n": n, "text": "x" * size} for n, size in enumerate([5, 10_000_000, 5, 300_000, 5])]
    path = write(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    reader = opened(path)
    assert reader.read([4, 1, 3, 0, 2]) == [rows[n] for n in (4, 1, 3, 0, 2)]
    assert reader.where(1) == "a.jsonl:2"


def test_a_row_before_blank_lines_is_not_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 300_000)
    raw = b'{"a": 1}\n' + b" \n" * 200_000 + b'{"a": 2}\n\n' + b"x" * 400_000
    for name, row in (("a.jsonl", {"a": 1}), ("a.txt", {"text": '{"a": 1}'})):
        found = opened(write(tmp_path, name, raw)).read([2, 0])
        assert found[1] == row
        assert str(found[0]).startswith(f"{name}:200004: one row of 0 MiB")


def test_a_long_row_of_an_array_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 300_000)
    rows = [{"a": "x" * size} for size in (1, 400_000, 2)]
    path = write(tmp_path, "a.json", json.dumps(rows, indent=1).encode())
    read = opened(path).read([0, 1, 2])
    assert (read[0], read[2]) == (rows[0], rows[2])
    assert str(read[1]).startswith("a.json:5: one row of 0 MiB, at most 0 are read")


def test_an_array_too_large_to_be_parsed_at_once_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytune_ft.data.files import json_files

    monkeypatch.setattr(json_files, "MAX_VALUE_BYTES", 10)
    path = write(tmp_path, "a.json", b'[{"a": 1},\n{"a": 2}]')
    with pytest.raises(DataError, match=r"a\.json: one JSON value of .* \(\.jsonl\), one row per"):
        opened(path)


def test_finding_rows_holds_chunks_and_not_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blobs, "CHUNK_BYTES", 2**16)
    row = b'{"a": "' + b"x" * 20_000_000 + b'"}\n'
    path = write(tmp_path, "a.jsonl", row + b'{"a": 1}\n' * 1000)
    opened(path)
    tracemalloc.start()
    reader = opened(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (len(reader), peak < 4_000_000) == (1001, True), peak


# The index that is kept.


@pytest.fixture
def indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(text_index, "KEPT_BYTES", 0)
    CountingBlob.passes.clear()
    return write(tmp_path, "a.jsonl", b'{"a": 1}\n\n{"a": 2}\n' * 40)


def lines_of(path: Path) -> list[str]:
    reader = open_reader(CountingBlob(path), "x")
    return [reader.where(n) for n in range(len(reader))]


def test_a_file_is_read_through_once_and_again_when_it_changes(indexed: Path) -> None:
    first = lines_of(indexed)
    assert (lines_of(indexed), CountingBlob.passes) == (first, ["a.jsonl"])
    indexed.write_bytes(b'\n\n{"a": 1}\n')
    assert (lines_of(indexed), len(CountingBlob.passes)) == (["x:3"], 2)


@given(place=st.integers(0, 10**6), flip=st.integers(1, 255), cut_at=st.booleans())
def test_a_damaged_index_is_made_again(
    tmp_path_factory: pytest.TempPathFactory, place: int, flip: int, cut_at: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_index, "KEPT_BYTES", 0)
        cache = tmp_path_factory.mktemp("cache")
        patch.setenv("RAYTUNE_CACHE", str(cache))
        path = write(cache, "a.jsonl", b'{"a": 1}\n\n{"a": 2}\n' * 40)
        first = lines_of(path)
        (kept,) = cache.rglob("*.npz")
        raw = bytearray(kept.read_bytes())
        place %= len(raw)
        raw[place] ^= flip
        kept.write_bytes(raw[:place] if cut_at else raw)
        CountingBlob.passes.clear()
        assert (lines_of(path), CountingBlob.passes) == (first, ["a.jsonl"])
        assert (lines_of(path), CountingBlob.passes) == (first, ["a.jsonl"])


def test_where_nothing_can_be_kept_rows_are_read_all_the_same(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(write(tmp_path, "no folder", b"")))
    assert lines_of(indexed) == lines_of(indexed)
    assert len(CountingBlob.passes) == 2


# Files that change.


@pytest.mark.parametrize("change", ["longer", "same size", "gone"])
def test_a_file_that_changes_is_noticed(tmp_path: Path, change: str) -> None:
    path = write(tmp_path, "a.jsonl", b'{"a": 1}\n{"a": 2}\n')
    reader = opened(path)
    reader.check_unchanged()
    if change == "gone":
        path.unlink()
    else:
        path.write_bytes(b'{"a": 3}\n{"a": 4}\n' + (b'{"a": 5}\n' if change == "longer" else b""))
        os.utime(path, ns=(0, 0))
    for look in (reader.check_unchanged, lambda: reader.read([0])):
        with pytest.raises(DataError, match=r"^a\.jsonl: changed since the run began; put") as said:
            look()
        assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a": 2}\n', b'{"a": 111111111}\n'),
        ("a.csv", b"a,b\nc,d\n", b'a,b\n"c,\n'),
        ("a.json", b'[{"a": 1}, {"a": 2}]', b'[{"a": 1} {"a": 23}]'),
        ("a.json", b'[{"a": 1}, {"a": 2}]', b"["),
    ],
)
def test_blocks_that_hold_other_rows_are_not_taken_for_the_old_ones(
    tmp_path: Path, name: str, before: bytes, after: bytes
) -> None:
    """Even if size and time are as they were."""
    path = write(tmp_path, name, before)
    reader, time_ns = opened(path), path.stat().st_mtime_ns
    path.write_bytes(after.ljust(len(before)))
    os.utime(path, ns=(time_ns, time_ns))
    reader.check_unchanged()
    with pytest.raises(DataError, match="changed since the run began"):
        reader.read([0])


@given(data=st.data(), raw=st.binary(max_size=40))
def test_a_blob_is_a_file_like_others(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, raw: bytes
) -> None:
    blob = LocalBlob(write(tmp_path_factory.mktemp("blob"), "a", raw))
    ours, theirs = BlobFile(blob), io.BytesIO(raw)
    for _ in range(data.draw(st.integers(1, 8))):
        size = data.draw(st.integers(-1, 50))
        start = data.draw(st.integers(0, 60))
        whence = data.draw(st.sampled_from([io.SEEK_SET, io.SEEK_CUR, io.SEEK_END]))
        assert ours.seek(start, whence) == theirs.seek(start, whence)
        assert (ours.read(size), ours.tell()) == (theirs.read(size), theirs.tell())
