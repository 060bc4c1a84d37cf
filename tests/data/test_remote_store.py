"""Buckets, read by Arrow's own S3 client from a store of this machine."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from raytune_ft.data.files import remote_blobs
from raytune_ft.errors import DataError, RecipeError
from tests.data.remote_rows import forget_all, lines_of, opened, parquet_of, rows_of
from tests.data.served import Store, served


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_all(tmp_path, monkeypatch)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    from raytune_ft.data.files import remote

    with served(Store()) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s3cr3t")
        monkeypatch.setenv("AWS_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        remote._s3_files.cache_clear()
        yield store
    remote._s3_files.cache_clear()


@pytest.mark.parametrize("access", ["stream", "copy"])
def test_a_bucket_is_read_like_a_folder(store: Store, access: str) -> None:
    rows = rows_of(2000)
    store.files = {
        "/bucket/set/train-0.jsonl": lines_of(rows),
        "/bucket/set/deep/train-1.parquet": parquet_of(rows, 300),
        "/bucket/set/test.jsonl": lines_of(rows[:3]),
        "/bucket/set/README.md": b"x",
        "/bucket/other/train.jsonl": lines_of(rows[:1]),
    }
    source = opened("s3://bucket/set", access=access)
    assert len(source) == 4000
    wanted = [5, 1999, 2000, 3999, 0]
    assert source.rows(wanted) == [rows[row % 2000] for row in wanted]
    assert source.where(2000).startswith("s3://bucket/set/train-0.jsonl:")
    assert len(opened("s3://bucket/set/t*.jsonl", access=access)) == 2003
    assert len(opened("s3://bucket/set/test.jsonl", access=access)) == 3


def test_a_bucket_gives_ranges_of_one_version(store: Store) -> None:
    rows = rows_of(20_000)
    store.files["/bucket/a.parquet"] = parquet_of(rows, 400)
    source = opened("s3://bucket/a.parquet")
    store.asked.clear()
    assert pickle.loads(pickle.dumps(source)).rows(range(19_000, 19_100)) == rows[19_000:19_100]
    assert store.given() < len(store.files["/bucket/a.parquet"]) * 0.1
    store.modified = "2026-01-02T04:00:00.000Z"
    remote_blobs._looked.clear()
    with pytest.raises(DataError, match=r"s3://bucket/a\.parquet: changed since the run began"):
        source.rows([10_000])


def test_bytes_of_another_version_are_not_given(store: Store) -> None:
    """Nobody looked the version up since: the read itself has to find out."""
    rows = rows_of(3000)
    store.files["/bucket/a.jsonl"] = lines_of(rows)
    source = opened("s3://bucket/a.jsonl")
    remote_blobs._kept = remote_blobs._Kept()
    assert source.rows([100]) == rows[100:101]
    store.modified = "2026-01-02T04:00:00.000Z"
    with pytest.raises(DataError, match=r"s3://bucket/a\.jsonl: changed since the run began"):
        source.rows([2900])


def test_what_a_bucket_has_not_is_one_line(store: Store) -> None:
    store.files["/bucket/a.jsonl"] = lines_of(rows_of(3))
    for path in ("s3://bucket/none.jsonl", "s3://bucket/none", "s3://bucket/none*.jsonl"):
        with pytest.raises(RecipeError, match=r"(cannot be fetched|nothing at)") as caught:
            opened(path)
        assert "\n" not in str(caught.value) and "s3cr3t" not in str(caught.value)
    with pytest.raises(
        RecipeError, match="credentials do not belong in recipes, put them into the"
    ):
        opened("s3://key:s3cr3t@bucket/a.jsonl")


@pytest.mark.parametrize("access", ["stream", "copy"])
def test_many_small_files(store: Store, access: str, capsys: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(1200, 20)
    names = [f"part-{n:04d}.jsonl" for n in range(400)]
    for n, name in enumerate(names):
        store.files[f"/bucket/set/{name}"] = lines_of(rows[n * 3 : n * 3 + 3])
    source = opened("s3://bucket/set", access=access)
    assert source.rows(range(1200)) == rows
    lines = capsys.readouterr().err.splitlines()
    assert lines == (
        [] if access == "stream" else [
            f"copying 400 files from s3://bucket ({sum(map(len, store.files.values())) / 2**20:.1f}"
            " MiB), those apart that are here"
        ]
    )  # fmt: skip
