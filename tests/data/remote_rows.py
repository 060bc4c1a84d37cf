"""What tests of remote files share: rows, files of them, and a process that knows of none."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from raytune_ft.config.schema import DataSection
from raytune_ft.data.files import remote_blobs, remote_ranges
from raytune_ft.data.sources import RowSource, open_sources


def rows_of(n_rows: int, length: int = 900) -> list[dict[str, Any]]:
    rng = random.Random(7)
    return [
        {"prompt": f"question {i}", "completion": rng.randbytes(length // 2).hex()}
        for i in range(n_rows)
    ]


def lines_of(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet_of(rows: list[dict[str, Any]], group: int) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(rows), sink, row_group_size=group)
    return bytes(sink.getvalue())


def opened(*paths: str, access: str = "stream") -> RowSource:
    sources = [{"path": path, "access": access} for path in paths]
    return open_sources(DataSection.model_validate({"sources": sources}), 1)


def forget_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin like a new process on a new machine, without proxies and long waits."""
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote_ranges, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(remote_blobs, "_kept", remote_blobs._Kept())
    monkeypatch.setattr(remote_blobs, "_looked", {})
