"""Parquet and Arrow files by stretches, and any file through a blob that only knows ranges."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from raytune_ft.data.files import arrow_files, readers
from raytune_ft.data.files.arrow_files import GroupReader, open_arrow
from raytune_ft.data.files.blobs import LocalBlob
from raytune_ft.data.files.kinds import open_reader, open_readers
from raytune_ft.errors import DataError
from tests.data.test_arrow_files import Canary
from tests.data.test_readers import ROWS, WRITERS, write_file, write_stream


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))


POOLS: list[Any] = []
"""Memory pools outlive what was allocated in them."""


@dataclass(frozen=True)
class FarBlob:
    """A file's bytes as a server gives them: no path, ranges and a version alone."""

    name: str
    content: bytes
    version: str = "1"

    @property
    def place(self) -> str:
        return f"far://{self.name}"

    @property
    def size(self) -> int:
        return len(self.content)

    def read(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges)), "not joined"
        return [self.content[start:end] for start, end in ranges]

    def chunks(self, start: int = 0) -> Iterator[bytes]:
        yield from (self.content[n : n + 50] for n in range(start, self.size, 50))


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_is_read_by_ranges_alone(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    reader = open_reader(FarBlob(name, (tmp_path / name).read_bytes()), "x")
    order = [22, 0, 7, 7, 4, 5]
    assert pickle.loads(pickle.dumps(reader)).read(order) == [ROWS[n] for n in order]
    assert reader.read(range(len(reader))) == ROWS
    reader.check_unchanged()


@given(
    data=st.data(),
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=40),
    group=st.integers(1, 50),
    stretch=st.sampled_from([1, 100, 10**6]),
    kept=st.sampled_from([0, 300, 10**6]),
    kind=st.sampled_from(["a.parquet", "stream.arrow", "file.arrow"]),
)
def test_rows_are_arrows_own_however_groups_are_divided(
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
    texts: list[str],
    group: int,
    stretch: int,
    kept: int,
    kind: str,
) -> None:
    path = tmp_path_factory.mktemp("rows") / kind
    rows = [{"n": n, "messages": [{"role": text}] * (n % 3)} for n, text in enumerate(texts)]
    table = pa.Table.from_pylist(rows)
    writers: dict[str, Any] = {"stream.arrow": write_stream, "file.arrow": write_file}
    if kind == "a.parquet":
        parquet.write_table(table, path, row_group_size=group)
    else:
        writers[kind](path, table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arrow_files, "STRETCH_BYTES", stretch)
        patch.setattr(arrow_files, "KEPT_BYTES", kept)
        patch.setattr(arrow_files, "_kept", arrow_files._Kept())
        reader = open_arrow(LocalBlob(path), "x")
        for _ in range(2):
            order = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=20))
            assert pickle.loads(pickle.dumps(reader)).read(order) == [rows[n] for n in order]
    ends = reader.chunk_ends()
    assert ends[-1] == len(rows) and (np.diff(ends, prepend=0) > 0).all()


def large_group(path: Path, rows: int = 8000) -> Path:
    table = pa.table({"n": range(rows), "text": [f"{n} " + "x" * 10_000 for n in range(rows)]})
    parquet.write_table(table, path, row_group_size=rows, use_dictionary=False, compression="none")
    return path


@pytest.mark.parametrize("far", [False, True])
def test_a_large_group_is_never_held_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: bool
) -> None:
    monkeypatch.setattr(arrow_files, "STRETCH_BYTES", 2**20)
    monkeypatch.setattr(arrow_files, "KEPT_BYTES", 4 * 2**20)
    monkeypatch.setattr(arrow_files, "_kept", arrow_files._Kept())
    monkeypatch.setattr(arrow_files, "_BATCH_ROWS", 64)
    path = large_group(tmp_path / "a.parquet")
    blob = FarBlob(path.name, path.read_bytes()) if far else LocalBlob(path)
    usual = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(usual)
    POOLS.append(counted)
    pa.set_memory_pool(counted)
    try:
        reader = open_arrow(blob, "x")
        wanted = [7999, 0, 2000, 1000, 6001, 1]
        assert [row["n"] for row in reader.read(wanted) if isinstance(row, dict)] == wanted
    finally:
        pa.set_memory_pool(usual)
    assert path.stat().st_size > 80_000_000
    assert counted.max_memory() < 24_000_000


def test_stretches_used_last_are_kept_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = arrow_files._Kept()
    monkeypatch.setattr(arrow_files, "_kept", kept)
    monkeypatch.setattr(arrow_files, "KEPT_BYTES", 100)
    for n in range(5):
        kept.put(("a", "1", n), n, 30)
        kept.get(("a", "1", 0))
    assert [n for n in range(5) if kept.get(("a", "1", n)) is not None] == [0, 3, 4]


def test_of_more_stretches_than_are_kept_those_at_hand_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrow_files, "_kept", arrow_files._Kept())
    monkeypatch.setattr(arrow_files, "KEPT_BYTES", 3 * 10_500)
    path = tmp_path / "a.parquet"
    parquet.write_table(
        pa.table({"text": [f"{n}" + "x" * 10_000 for n in range(4)]}), path, row_group_size=1
    )
    decoded = list[int]()
    batches = arrow_files._batches

    def counted(reader: GroupReader, group: int, *span: int) -> Iterator[tuple[int, Any]]:
        decoded.append(group)
        return batches(reader, group, *span)

    monkeypatch.setattr(arrow_files, "_batches", counted)
    reader = open_arrow(LocalBlob(path), "x")
    assert reader.read([3, 2, 1, 0]) == reader.read([0, 1, 2, 3])[::-1]
    assert decoded == [0, 1, 2, 3, 0]


@pytest.mark.parametrize("kind", ["a.parquet", "stream.arrow", "file.arrow"])
def test_a_row_over_the_limit_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 3 * 2**20)
    texts = ["a" * 2_000_000, "b" * 4_000_000, "c", "d" * 2_000_000]
    table = pa.table({"messages": [[{"content": text}] for text in texts]})
    writers: dict[str, Any] = {"stream.arrow": write_stream, "file.arrow": write_file}
    writers.get(kind, lambda path, table: parquet.write_table(table, path))(tmp_path / kind, table)
    read = open_arrow(LocalBlob(tmp_path / kind), "x").read([3, 1, 0, 2])
    assert [read[n] for n in (0, 2, 3)] == [
        {"messages": [{"content": texts[n]}]} for n in (3, 0, 2)
    ]
    assert str(read[1]).startswith("x:2: one row of 4 MiB, at most 3 are read")


def test_a_file_put_in_the_place_of_a_known_one_is_not_opened(tmp_path: Path) -> None:
    """Its types were not looked at."""
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"text": ["a", "b"]}), path)
    reader = open_arrow(LocalBlob(path), "x")
    pa.register_extension_type(Canary())
    try:
        column = pa.ExtensionArray.from_storage(Canary(), pa.array(["a", "b"]))
        parquet.write_table(pa.table({"text": column}), path)
        Canary.woken.clear()
        with pytest.raises(DataError, match="changed since the run began"):
            reader.read([0])
        assert Canary.woken == []
    finally:
        pa.unregister_extension_type("tests.canary")


def test_many_files_are_opened_in_order_and_the_first_error_is_told(tmp_path: Path) -> None:
    for n in range(200):
        parquet.write_table(pa.table({"n": [n]}), tmp_path / f"{n:03}.parquet")
    files: list[Any] = [(LocalBlob(file), file.name) for file in sorted(tmp_path.iterdir())]
    opened = open_readers(files)
    assert [reader.read([0]) for reader in opened] == [[{"n": n}] for n in range(200)]
    assert all(isinstance(reader, GroupReader) for reader in opened)
    assert len(pickle.dumps(opened)) < 200 * 400
    for n in (150, 20, 70):
        (tmp_path / f"{n:03}.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"^020\.parquet: not a Parquet file"):
        open_readers(files)
