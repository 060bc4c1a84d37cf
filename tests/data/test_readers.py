"""Readers: every kind of file gives the rows that an independent reader of it gives."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from raytune_ft.config.schema import DataSection
from raytune_ft.data.files import readers
from raytune_ft.data.files.blobs import LocalBlob
from raytune_ft.data.files.kinds import SUFFIXES, open_reader
from raytune_ft.data.sources import RowSource, open_sources
from raytune_ft.errors import DataError
from tests.conftest import ROOT
from tests.data.conftest import read_row, write_jsonl

ROWS = [{"prompt": f"row {i} – 行 🙂", "completion": f'a,b;\t"c"\r\nline {i}'} for i in range(23)]
REAL = ROOT.parent / "shared" / "data"
NAMES = tuple(f"rows{i}" for i in range(2))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RAYTUNE_CACHE", str(folder))
    return folder


def opened(path: Path | str, **source: Any) -> RowSource:
    section = DataSection.model_validate({"sources": [{"path": str(path), **source}]})
    return open_sources(section, 1)


def rows_of(path: Path | str, **source: Any) -> list[dict[str, Any]]:
    found = opened(path, **source)
    return found.rows(range(len(found)))


def write_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_stream(path: Path, table: pa.Table) -> Path:
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return path


def write_file(path: Path, table: pa.Table, compression: str | None = None) -> Path:
    options = ipc.IpcWriteOptions(compression=compression)
    with ipc.new_file(path, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=5)
    return path


TABLE = pa.Table.from_pylist(ROWS)
WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: write_jsonl(path, ROWS),
    "a.ndjson": lambda path: write_jsonl(path, ROWS),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "object.json": lambda path: path.write_text(
        json.dumps({"version": 1, "names": ["x"], "data": ROWS}, indent=1, ensure_ascii=False)
    ),
    "object in one line.json": lambda path: path.write_text(json.dumps({"data": ROWS})),
    "lines.json": lambda path: write_jsonl(path, ROWS),
    "a.csv": lambda path: write_csv(path, ROWS),
    "semicolons.csv": lambda path: write_csv(path, ROWS, ";"),
    "a.tsv": lambda path: write_csv(path, ROWS, "\t"),
    "a.parquet": lambda path: parquet.write_table(TABLE, path, row_group_size=5),
    "stream.arrow": lambda path: write_stream(path, TABLE),
    "file.arrow": lambda path: write_file(path, TABLE),
    "packed.feather": lambda path: write_file(path, TABLE, "zstd"),
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl_bytes())),
    "two parts.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(jsonl_bytes(ROWS[:9])) + gzip.compress(jsonl_bytes(ROWS[9:]))
    ),
    "a.jsonl.zst": lambda path: path.write_bytes(pa.Codec("zstd").compress(jsonl_bytes(), True)),
    "a.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(jsonl_bytes())),
    "a.csv.gz": lambda path: path.write_bytes(gzip.compress(csv_bytes())),
    "not packed any more.jsonl.gz": lambda path: path.write_bytes(jsonl_bytes()),
}


def jsonl_bytes(rows: list[dict[str, str]] | None = None) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows or ROWS).encode()


def csv_bytes() -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(ROWS)
    return text.getvalue().encode()


@pytest.mark.parametrize("name", WRITERS)
def test_rows_come_in_any_order_from_every_kind_of_file(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    source = opened(tmp_path / name)
    assert source.rows(range(len(source))) == ROWS
    assert source.source_of(0).map == "prompt_completion"
    order = [22, 0, 7, 7, 4, 5]
    assert pickle.loads(pickle.dumps(source)).rows(order) == [ROWS[i] for i in order]
    assert source.where(3).startswith(f"{tmp_path / name}:")


def test_every_suffix_is_tried() -> None:
    assert {Path(name).suffix for name in WRITERS} >= set(SUFFIXES) - {".txt"}


# CSV, against Python's own reader.

MARKS = ["a", " ", ",", ";", "\t", '"', "\n", "\r\n", "行", "#", "'", "\\"]
FIELDS = st.lists(st.sampled_from(MARKS), max_size=6).map("".join)


@given(
    rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=6),
    delimiter=st.sampled_from(",\t;"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    end=st.sampled_from(["\n", "\r\n"]),
    bom=st.booleans(),
)
def test_csv_rows_are_those_of_pythons_reader(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    delimiter: str,
    quoting: Any,
    end: str,
    bom: bool,
) -> None:
    path = tmp_path_factory.mktemp("csv") / ("a.tsv" if delimiter == "\t" else "a.csv")
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=end)
    writer.writerows([("one", "two"), *rows])
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.getvalue().encode())
    oracle = csv.DictReader(io.StringIO(text.getvalue(), newline=""), delimiter=delimiter)
    reader = open_reader(LocalBlob(path), "a")
    assert reader.read(range(len(reader))) == list(oracle)
    backwards = range(len(reader) - 1, -1, -1)
    assert reader.read(backwards) == [reader.read([row])[0] for row in backwards]


def test_csv_places_are_the_lines_where_records_begin(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\nprompt,completion\n\n"a\n\nb",c\nd,e', encoding="utf-8")
    source = opened(path)
    assert source.rows([0, 1]) == [
        {"prompt": "a\n\nb", "completion": "c"},
        {"prompt": "d", "completion": "e"},
    ]
    assert [source.where(row) for row in (0, 1)] == [f"{path}:4", f"{path}:7"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (b"a", "1 fields, 2 columns (prompt, completion)"),
        (b"a,b,c", "3 fields, 2 columns"),
        (b"a,\xff", "not UTF-8 at byte 2"),
        (b"a,b\0", "NUL bytes"),
    ],
)
def test_a_bad_record_is_one_error_and_the_others_are_read(
    tmp_path: Path, record: bytes, message: str
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b"prompt,completion\nx,y\n" + record + b"\nz,w\n")
    source = opened(path)
    assert source.rows([0, 2]) == [
        {"prompt": "x", "completion": "y"},
        {"prompt": "z", "completion": "w"},
    ]
    with pytest.raises(DataError) as caught:
        source.rows([1])
    assert str(caught.value).startswith(f"{path}:3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"\n\n", "only blank lines"),
        ("a.csv", b"one,two\n", "only a header, no rows"),
        ("a.csv", b"one,\na,b\n", "a.csv:1: the header has column 2 without a name"),
        ("a.csv", b"one,one\na,b\n", "the header has column 'one' twice"),
        ("a.csv", b"one\xff,two\na,b\n", "a.csv:1: not UTF-8"),
        ("a.csv", b'one,two\na,b\nc,"d\ne,f\n', "a.csv:3: the record that begins here"),
        ("a.csv", b'one,two\n"a"b,c\n', "a.csv:2: the record that begins here"),
        ("a.csv", b"one,two\na,b\rc,d\n", "a.csv:2: the record that begins here"),
        ("a.csv", "one,two\na,b".encode("utf-16"), "UTF-16"),
        ("a.txt", b"\n \n", "only blank lines"),
        ("a.json", b'{"a":\n []}', "an object of a, not of one list of rows"),
        ("a.json", b'{"a": [{"x": 1}],\n "b": [{"x": 1}]}', "an object of a, b, not of one list"),
        ("a.json", b'{"data": [{"x": 1},\n {"x": }]}', "a.json:2: not valid JSON"),
        ("a.json", b'{"data": [{"x": 1}]\n', "a.json:2: not valid JSON"),
        ("a.arrow", b"ARROW1 no", "not an Arrow file"),
        ("a.arrow", b"\xff\xff\xff\xff\x10\x00", "not an Arrow file"),
        ("a.arrow", b"", "not an Arrow file"),
        ("a.parquet", b"PAR1" + b"\xff" * 8 + b"PAR1", "not a Parquet file"),
        ("a.jsonl.gz", b"\x1f\x8bno", "a.jsonl.gz: cannot be unpacked"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfdno", "a.jsonl.zst: cannot be unpacked"),
    ],
)
def test_a_damaged_file_is_one_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        opened(tmp_path / name)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path / name))
    assert "\n" not in str(caught.value)


def test_a_line_over_the_limit_ends_the_search_for_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 2 * 2**20)
    path = tmp_path / "a.csv"
    path.write_bytes(b"one,two\n" + b"x" * (2 * 2**20 + 1))
    with pytest.raises(DataError, match="a line of over 2 MiB"):
        opened(path)


# JSON in one object.


@given(
    rows=st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=5) | st.integers(), max_size=3),
        min_size=1,
        max_size=4,
    ),
    before=st.dictionaries(
        st.text(max_size=3),
        st.one_of(st.integers(), st.text(max_size=3), st.lists(st.integers(), max_size=2)),
        max_size=2,
    ),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_the_one_list_of_an_object_is_the_rows(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[dict[str, Any]],
    before: dict[str, Any],
    indent: int | None,
    ascii_only: bool,
) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    whole = {**before, "the rows": rows, "after": None}
    path.write_text(json.dumps(whole, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    reader = open_reader(LocalBlob(path), "x")
    assert reader.read(range(len(reader))) == rows


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(
    "row", [{"messages": [{"role": "user", "content": "a"}]}, {"text": "a", "tags": [{"x": 1}]}]
)
def test_an_object_that_is_a_row_is_one_row(
    tmp_path: Path, row: dict[str, Any], indent: int | None
) -> None:
    path = tmp_path / "x.json"
    path.write_text(json.dumps(row, indent=indent))
    expected = [{"x": 1}] if "tags" in row else [row]
    assert rows_of(path) == expected


# Plain text.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\r\nc", ["a", "b", "c"]),
        ("\n\na\nb\n\n", ["a", "b"]),
        ("a\nb\n\nc\n", ["a\nb", "c"]),
        ("a\r\nb\r\n\r\nc\r\n", ["a\nb", "c"]),
        ("a\n  \n\nb", ["a", "b"]),
        ("\ufeffa", ["a"]),
    ],
)
def test_text_files_are_documents(tmp_path: Path, text: str, expected: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    source = opened(path)
    assert [row["text"] for row in source.rows(range(len(source)))] == expected
    assert source.source_of(0).map == "text"


# Real files.


@pytest.mark.skipif(not REAL.is_dir(), reason="needs the real rows of ../shared/data")
@pytest.mark.parametrize(
    ("path", "rows", "name"),
    [
        ("alpaca_en_demo.json", 999, "alpaca"),
        ("alpaca_zh_demo.json", 1000, "alpaca"),
        ("c4_demo.jsonl", 300, "text"),
        ("wiki_demo.txt", 30, "text"),
        ("openassistant-guanaco", 950, "oasst1"),
    ],
)
def test_real_files_are_recognised_and_every_row_is_used(path: str, rows: int, name: str) -> None:
    source = opened(REAL / path)
    assert (len(source), source.source_of(0).map) == (rows, name)
    section = source.source_of(0)
    read = [read_row(row, section.map, columns=section.columns) for row in source.rows(range(rows))]
    assert sum(found is None for found in read) <= rows // 100


def test_rows_on_one_line_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"x": 1}, {"x": 2},\n{"x": 3}]')
    reader = open_reader(LocalBlob(path), "a.json")
    assert [reader.where(n) for n in range(3)] == [
        "a.json:1 (row 1)",
        "a.json:1 (row 2)",
        "a.json:2",
    ]
