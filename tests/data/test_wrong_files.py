"""Files that are wrong: one line that names the file and, where there is one, the line in it.

No row of such a file can be told from another, so `data.on_error: skip` changes nothing; a file
whose rows can be told apart loses the damaged ones only. Each stands alone, first or second in a
folder, and as the rows held out for validation.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from raytune_ft.config.schema import DataSection
from raytune_ft.data.examples import Encoder
from raytune_ft.data.report import UNUSABLE
from raytune_ft.data.sources import open_sources, split_validation
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.errors import DataError, RaytuneError, RecipeError
from tests.data.feeds import feed_of
from tests.data.test_wrong_rows import assert_one_line, read_all
from tests.data.wrong_rows import CHAT, SKIP

ROWS = [CHAT] * 20
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)
TABLE = pa.Table.from_pylist(ROWS)
HOSTILE = "user.type"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))


def parquet_bytes(table: pa.Table = TABLE) -> bytes:
    out = io.BytesIO()
    parquet.write_table(table, out, row_group_size=5)
    return out.getvalue()


def arrow_bytes(table: pa.Table = TABLE) -> bytes:
    out = io.BytesIO()
    with ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return out.getvalue()


def stream_bytes(table: pa.Table = TABLE) -> bytes:
    out = io.BytesIO()
    with ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    return out.getvalue()


def extended() -> pa.Table:
    kind = {b"ARROW:extension:name": HOSTILE.encode(), b"ARROW:extension:metadata": b"x"}
    return TABLE.cast(pa.schema([TABLE.schema.field(0).with_metadata(kind)]))


def zip_bytes() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("rows.jsonl", LINES)
    return out.getvalue()


@dataclass(frozen=True)
class WrongFile:
    """A file of which nothing can be read; `says` follows the file's name in the message."""

    name: str
    file: str
    content: bytes
    says: str


_OBJECT = json.dumps(CHAT)
FILES = [
    WrongFile("empty", "a.jsonl", b"", ": the file is empty"),
    WrongFile("blank lines", "a.jsonl", b"\n \n\r\n\t\n", ": no rows, only blank lines"),
    WrongFile("a byte order mark alone", "a.jsonl", b"\xef\xbb\xbf", ": no rows"),
    WrongFile("UTF-16", "a.jsonl", LINES.decode().encode("utf-16"), ": the text is UTF-16"),
    WrongFile("UTF-16 without a mark", "a.jsonl", LINES.decode().encode("utf-16-be"),
              ": the text is UTF-16"),
    WrongFile("UTF-32", "a.jsonl", LINES.decode().encode("utf-32"), ": the text is UTF-16"),
    WrongFile("an array left open", "a.json", f"[{_OBJECT},\n{_OBJECT}".encode(), ":2: not valid"),
    WrongFile("an array with a comma too many", "a.json", f"[{_OBJECT},\n]".encode(), ":2: not v"),
    WrongFile("an array cut in a row", "a.json", f"[{_OBJECT},\n{{".encode(), ":2: not valid JSON"),
    WrongFile("text behind an array", "a.json", f"[{_OBJECT}]\nend".encode(), ":2: not valid JSON"),
    WrongFile("an empty array", "a.json", b"[]", ": an empty array"),
    WrongFile("an array with a NUL byte", "a.json", b'[{"a": "\0"}]', ": holds NUL bytes"),
    WrongFile("an array in Latin-1", "a.json", b'[\n{"a": "\xe9"}]', ":2: not UTF-8"),
    WrongFile("an array 100,000 deep", "a.json", b"[" * 100_000, ": not usable JSON"),
    WrongFile("an object of columns", "a.json", b'{"instruction": ["a"],\n"output": ["b"]}',
              ": an object of instruction, output"),
    WrongFile("an object of numbers", "a.json", b'{"a": [1, 2],\n"b": [3]}', ": an object of a, b"),
    WrongFile("csv with only a header", "a.csv", b"prompt,completion\n", ": only a header, no row"),
    WrongFile("csv with a quote left open", "a.csv", b'prompt,completion\na,"b\nc,d\n',
              ":2: the record that begins here cannot be read"),
    WrongFile("csv with a quote inside", "a.csv", b'prompt,completion\n"a" b,c\n', ":2: the rec"),
    WrongFile("csv with a column twice", "a.csv", b"prompt,prompt\na,b\n", ":1: the header has "),
    WrongFile("csv with a column unnamed", "a.csv", b"prompt,\na,b\n", ":1: the header has "),
    WrongFile("csv in UTF-16", "a.csv", "prompt,completion\na,b\n".encode("utf-16"), ": the text "),
    WrongFile("a text of nothing", "a.txt", b" \n\n", ": no rows, only blank lines"),
    WrongFile("Parquet cut off", "a.parquet", parquet_bytes()[:-40], ": not a Parquet file"),
    WrongFile("Parquet of zeros", "a.parquet", b"\0" * 4096, ": not a"),
    WrongFile("Parquet that is JSON", "a.parquet", LINES, ": not a"),
    WrongFile("Parquet without rows", "a.parquet", parquet_bytes(TABLE.slice(0, 0)), ": no rows"),
    WrongFile("Parquet of a type that runs code", "a.parquet", parquet_bytes(extended()),
              f": column 'messages' is of the extension type '{HOSTILE}'"),
    WrongFile("Arrow cut off", "a.arrow", arrow_bytes()[:-40], ": not an Arrow file"),
    WrongFile("Arrow of a type that runs code", "a.arrow", arrow_bytes(extended()),
              ": has extension types"),
    WrongFile("an Arrow stream cut off", "a.arrow", stream_bytes()[:-900], ": not an Arrow file"),
    WrongFile("an Arrow stream of a type that runs code", "a.arrow", stream_bytes(extended()),
              f": column 'messages' is of the extension type '{HOSTILE}'"),
    WrongFile("gzip cut off", "a.jsonl.gz", gzip.compress(LINES)[:-20], ": cannot be unpacked"),
    WrongFile("gzip with a byte changed", "a.jsonl.gz", gzip.compress(LINES)[:-6] + b"\0" * 6,
              ": cannot be unpacked"),
    WrongFile("zip named gz", "a.jsonl.gz", zip_bytes(), ": is a zip archive, not text; unpack it"),
    WrongFile("gzip named zst", "a.jsonl.zst", gzip.compress(LINES), ": is a gzip file"),
    WrongFile("bzip2 cut off", "a.jsonl.bz2", bz2.compress(LINES)[:-20], ": cannot be unpacked"),
    WrongFile("gzip without its suffix", "a.jsonl", gzip.compress(LINES),
              ": is a gzip file, not text; add .gz to its name"),
    WrongFile("Parquet named jsonl", "a.jsonl", parquet_bytes(), ": is a Parquet file, not text"),
]  # fmt: skip
PLACEMENTS = ("alone", "first of a folder", "second of a folder", "validation")


def open_all_rows(
    given: Path, held_out: Path | None, tokenizer: TextTokenizer, **data: str
) -> None:
    """Read what is trained on and what is held out."""
    section = DataSection.model_validate(
        {
            "sources": [{"path": str(given)}], "max_length": 128,
            "validation": None if held_out is None else str(held_out), **data,
        }
    )  # fmt: skip
    train, validation = split_validation(open_sources(section, 1), section, 1)
    for rows in (train, validation):
        if rows is not None:
            read_all(make_feed(rows, Encoder(tokenizer, "tokenizer", section), 1))


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("case", FILES, ids=lambda case: case.name)
@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_wrong_file_is_one_line(
    tmp_path: Path, tokenizer: TextTokenizer, case: WrongFile, placement: str, on_error: str
) -> None:
    if case.file.endswith(".txt") and placement.endswith("folder"):
        pytest.skip("a folder's texts are read where nothing else is")
    folder = tmp_path / "rows"
    folder.mkdir()
    wrong = folder / f"{'b' if placement.startswith('second') else 'a'}{case.file[1:]}"
    wrong.write_bytes(case.content)
    good = folder / f"{'a' if placement.startswith('second') else 'b'}.jsonl"
    given = {"alone": wrong, "validation": good}.get(placement, folder)
    if placement != "alone":
        good.write_bytes(LINES)
    held_out = wrong if placement == "validation" else None
    with pytest.raises(RaytuneError) as caught:
        open_all_rows(given, held_out, tokenizer, on_error=on_error)
    assert isinstance(caught.value, DataError)
    assert_one_line(str(caught.value), f"{wrong}", f"{wrong.name}{case.says}")


PARTLY: dict[str, tuple[str, Callable[[], bytes], str, int]] = {
    "Parquet with a page damaged": (
        "a.parquet", lambda: _scratched(parquet_bytes(), 0.1), ": cannot be read", 5,
    ),
    "Parquet whose texts are no UTF-8": ("a.parquet", lambda: parquet_bytes(_latin()), ": ", 5),
    "Parquet of numbers": (
        "a.parquet", lambda: parquet_bytes(pa.table({"messages": [1, 2]})), "is the number 1", 2,
    ),
    "Arrow of dates": (
        "a.arrow",
        lambda: arrow_bytes(pa.table({"text": pa.array([1, 2], pa.timestamp("s"))})), "", 2,
    ),
    "Arrow of bytes": (
        "a.arrow", lambda: arrow_bytes(pa.table({"text": [b"a", b"b"]})), "", 2,
    ),
    "Arrow of maps": (
        "a.arrow",
        lambda: arrow_bytes(
            pa.table({"messages": pa.array([[("a", "b")]], pa.map_(pa.string(), pa.string()))})
        ),
        "", 1,
    ),
}  # fmt: skip


def _scratched(content: bytes, share: float) -> bytes:
    """Overwrite some bytes a little behind the start."""
    place = int(len(content) * share)
    return content[:place] + b"\xff" * 16 + content[place + 16 :]


def _latin() -> pa.Table:
    """A string column whose first five rows are bytes that are no UTF-8."""
    messages = json.dumps(CHAT["messages"]).encode()
    raw = pa.array([b"[r\xe9d]"] * 5 + [messages] * 15, pa.binary())
    text = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    return pa.table({"messages": text})


@pytest.mark.parametrize("name", PARTLY)
def test_rows_that_a_file_lost_are_counted(
    tmp_path: Path, tokenizer: TextTokenizer, name: str
) -> None:
    file, content, says, lost = PARTLY[name]
    path = tmp_path / file
    path.write_bytes(content())
    with pytest.raises(DataError) as stopped:
        read_all(feed_of(path, tokenizer, shuffle_before_pack=False))
    assert_one_line(str(stopped.value), f"{path}:", says)
    assert SKIP in str(stopped.value)
    (tmp_path / "b.jsonl").write_bytes(LINES)
    feed = feed_of(tmp_path, tokenizer, on_error="skip")
    used, report = read_all(feed)
    assert report["dropped"] == {UNUSABLE: lost}
    assert len(used) == report["rows"] - lost == len(feed.source) - lost
    assert all(place.startswith(f"{path}:") for place in report["places"][UNUSABLE])


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_paths_without_rows_are_the_recipes_fault(
    tmp_path: Path, tokenizer: TextTokenizer, on_error: str
) -> None:
    (tmp_path / "rows.jsonl").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.docx").write_bytes(b"x")
    for name in ("rows.jsonl", "empty", "other"):
        with pytest.raises(RecipeError) as caught:
            open_all_rows(tmp_path / name, None, tokenizer, on_error=on_error)
        assert_one_line(str(caught.value), "data.sources[0].path: no .jsonl", name)


def test_a_folder_named_like_a_file_is_looked_into(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    (tmp_path / "rows.jsonl" / "deep.jsonl").mkdir(parents=True)
    (tmp_path / "rows.jsonl" / "a.jsonl").write_bytes(LINES)
    used, _ = read_all(feed_of(tmp_path / "rows.jsonl", tokenizer))
    assert len(used) == len(ROWS)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES)
    path.chmod(0)
    with pytest.raises(DataError) as caught:
        feed_of(path, tokenizer)
    assert_one_line(str(caught.value), f"{path}: ", "cannot be read")


def test_a_link_to_nowhere_is_no_data(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(RecipeError) as caught:
        feed_of(tmp_path / "a.jsonl", tokenizer)
    assert_one_line(str(caught.value), "", "a.jsonl does not exist")


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\r\n\n"])
def test_line_endings_may_be_mixed(tmp_path: Path, tokenizer: TextTokenizer, end: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.replace(b"\n", end, 7)[:-1])
    used, report = read_all(feed_of(path, tokenizer))
    assert used == set(range(len(ROWS)))
    assert report["dropped"] == {}


def test_old_macs_line_endings_are_told(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(LINES.replace(b"\n", b"\r"))
    with pytest.raises(DataError) as caught:
        read_all(feed_of(path, tokenizer))
    assert_one_line(str(caught.value), f"{path}:1: ", "not valid JSON (Extra data")
