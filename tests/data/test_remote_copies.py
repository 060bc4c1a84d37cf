"""Copies of files elsewhere: each machine makes its own, once, of the version of the run."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ft.data.files import remote_blobs
from raytune_ft.errors import DataError
from tests.data.remote_rows import forget_all, lines_of, opened, rows_of
from tests.data.served import Site, served


@pytest.fixture
def site() -> Iterator[Site]:
    with served(Site()) as site:
        yield site


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_all(tmp_path, monkeypatch)


def test_another_machine_makes_its_own_copy_once(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gzip

    rows = rows_of(50)
    site.files |= {"/a.jsonl": lines_of(rows), "/b.jsonl.gz": gzip.compress(lines_of(rows))}
    urls = [f"{site.url}/a.jsonl", f"{site.url}/b.jsonl.gz"]
    source = pickle.dumps(opened(*urls, access="copy"))
    there = tmp_path / "other"
    monkeypatch.setenv("RAYTUNE_CACHE", str(there))
    site.asked.clear()
    for _ in range(2):
        assert pickle.loads(source).rows(range(100)) == rows * 2
    assert [len(site.gets("a.jsonl")), len(site.gets("b.jsonl"))] == [1, 1]
    assert {p.name for p in there.rglob("*.json*")} == {"a.jsonl", "b.jsonl", "b.jsonl.gz"}
    remote_blobs._copy_of.cache_clear()
    site.files["/a.jsonl"] = lines_of(rows_of(51))
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "third"))
    with pytest.raises(DataError, match=r"a\.jsonl: (changed|\d+ bytes came of)"):
        pickle.loads(source).rows([3])


def test_processes_that_want_the_same_copy_fetch_it_once(site: Site, tmp_path: Path) -> None:
    site.files["/a.jsonl"] = lines_of(rows_of(20_000))
    source = tmp_path / "source.pickle"
    source.write_bytes(pickle.dumps(opened(f"{site.url}/a.jsonl", access="copy")))
    code = (
        "import pickle, sys; s = pickle.loads(open(sys.argv[1], 'rb').read());"
        "print(len(s.rows(range(100))))"
    )
    site.asked.clear()
    environment = {**os.environ, "RAYTUNE_CACHE": str(tmp_path / "other")}
    command = [sys.executable, "-c", code, str(source)]
    tasks = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [task.communicate()[0] for task in tasks] == ["100\n"] * 3
    assert len(site.gets()) == 1


def test_an_unversioned_copy_is_told_from_another_by_its_content(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.tags = False
    rows = rows_of(50)
    site.files["/a.jsonl"] = lines_of(rows)
    source = pickle.dumps(opened(f"{site.url}/a.jsonl", access="copy"))
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "other"))
    assert pickle.loads(source).rows(range(50)) == rows
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "third"))
    site.files["/a.jsonl"] = site.files["/a.jsonl"].replace(b"question 1", b"question 9")
    with pytest.raises(DataError, match="changed since the run began"):
        pickle.loads(source).rows([3])
