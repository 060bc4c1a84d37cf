"""Hostile and odd Arrow and Parquet files: rows or one line, and no code of theirs runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from raytune_ft.errors import DataError
from tests.data.conftest import read_row
from tests.data.test_readers import WRITERS, opened, rows_of, write_file, write_stream


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RAYTUNE_CACHE", str(folder))
    return folder


class Canary(pa.ExtensionType):  # type: ignore[misc]
    """A type as libraries register them: it shows whether a file's bytes reached it."""

    woken: ClassVar[list[bytes]] = []

    def __init__(self) -> None:
        super().__init__(pa.string(), "tests.canary")

    def __arrow_ext_serialize__(self) -> bytes:
        return b"payload"

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: Any, serialized: bytes) -> Canary:
        cls.woken.append(serialized)
        return cls()


@pytest.mark.parametrize("place", ["column", "in a struct", "in a list"])
@pytest.mark.parametrize("kind", ["a.parquet", "stream.arrow", "file.arrow"])
def test_extension_types_are_refused_before_they_wake(
    tmp_path: Path, kind: str, place: str
) -> None:
    pa.register_extension_type(Canary())
    try:
        column = pa.ExtensionArray.from_storage(Canary(), pa.array(["a", "b"]))
        if place == "in a struct":
            column = pa.StructArray.from_arrays([column], names=["inner"])
        elif place == "in a list":
            column = pa.ListArray.from_arrays(pa.array([0, 1, 2]), column)
        table = pa.table({"text": ["x", "y"], "evil": column})
        writers = {"a.parquet": parquet.write_table, "stream.arrow": write_stream}
        if kind == "a.parquet":
            parquet.write_table(table, tmp_path / kind)
        else:
            writers.get(kind, write_file)(tmp_path / kind, table)
        Canary.woken.clear()
        with pytest.raises(DataError, match="extension type") as caught:
            opened(tmp_path / kind)
        assert Canary.woken == []
        assert "\n" not in str(caught.value)
    finally:
        pa.unregister_extension_type("tests.canary")


@pytest.mark.parametrize("kind", ["a.parquet", "stream.arrow"])
def test_arrows_own_json_type_is_read_as_text(tmp_path: Path, kind: str) -> None:
    tools = pa.array(['[{"name": "f"}]']).cast(pa.json_())
    table = pa.table({"prompt": ["a"], "completion": ["b"], "tools": tools})
    write = parquet.write_table if kind == "a.parquet" else lambda t, p: write_stream(p, t)
    write(table, tmp_path / kind)
    found = read_row(rows_of(tmp_path / kind)[0])
    assert found is not None and found.tools[0]["function"]["name"] == "f"


def test_absent_members_of_arrow_objects_stay_absent(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "reasoning_content": "c"},
    ]
    parquet.write_table(
        pa.Table.from_pylist([{"messages": messages, "note": None}]), tmp_path / "a.parquet"
    )
    assert rows_of(tmp_path / "a.parquet") == [{"messages": messages, "note": None}]


@given(data=st.data())
def test_flipped_bytes_are_rows_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flip")
    name = data.draw(st.sampled_from(["a.parquet", "stream.arrow", "file.arrow", "a.jsonl.gz"]))
    WRITERS[name](folder / name)
    content = bytearray((folder / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(content)
    try:
        source = opened(folder / name, map="text")
        source.try_rows(range(min(3, len(source))))
    except DataError as error:
        assert "\n" not in str(error)
