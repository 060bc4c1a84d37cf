"""Files elsewhere, read by ranges: the right bytes, few of them, from one version, or one line."""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import DataSection
from raytune_ft.data.examples import Encoder
from raytune_ft.data.files import remote_blobs, remote_files
from raytune_ft.data.files.remote_blobs import KeptBlob, RemoteBlob
from raytune_ft.data.files.remote_files import open_remote
from raytune_ft.data.packing import Position
from raytune_ft.data.places import iter_packs
from raytune_ft.data.sources import open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.errors import DataError, RecipeError
from tests.data.remote_rows import forget_all, lines_of, opened, parquet_of, rows_of
from tests.data.served import Site, served

KEY = "data.sources[0].path"


@pytest.fixture
def site() -> Iterator[Site]:
    with served(Site()) as site:
        yield site


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_all(tmp_path, monkeypatch)


def blob_of(site: Site, name: str) -> Any:
    ((blob, _),) = open_remote(f"{site.url}{name}", KEY, lambda names: names, "stream")
    return blob


# Bytes.


def test_any_ranges_are_the_files_bytes_from_few_requests(site: Site) -> None:
    body = random.Random(1).randbytes(40 * 2**20)
    site.files["/a.jsonl"] = body
    blob = blob_of(site, "/a.jsonl")
    rng = random.Random(2)
    for _ in range(20):
        starts = sorted(rng.randrange(len(body)) for _ in range(20))
        ranges = [(start, start + rng.choice([0, 1, 100, 70_000])) for start in starts]
        assert blob.read(ranges) == [body[start:end] for start, end in ranges]
    before = len(site.asked)
    # what touches or nearly does is asked for at once, and what is kept is not asked for again
    close = [(2**20 * 20 + i * 50_000, 2**20 * 20 + i * 50_000 + 10) for i in range(100)]
    for _ in range(2):
        assert blob.read(close) == [body[start:end] for start, end in close]
    assert 0 < len(site.asked) - before <= 12
    assert blob.read([(5, 9 * 2**20), (len(body) - 3, len(body) + 50)]) == [
        body[5 : 9 * 2**20],
        body[-3:],
    ]
    assert b"".join(blob.chunks(3)) == body[3:]
    assert remote_blobs._kept._size <= remote_blobs.KEPT_BYTES


def test_kept_bytes_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_blobs, "KEPT_BYTES", 2**20)
    body = random.Random(1).randbytes(6 * 2**20)
    site.files["/a.jsonl"] = body
    blob = blob_of(site, "/a.jsonl")
    for start in range(0, len(body), 300_000):
        assert blob.read([(start, start + 200_000)]) == [body[start : start + 200_000]]
        assert remote_blobs._kept._size <= 2**20
        assert remote_blobs._kept._size == sum(map(len, remote_blobs._kept._units.values()))


def test_a_server_that_fails_now_and_then_still_gives_the_right_bytes(site: Site) -> None:
    rows = rows_of(3000)
    site.files["/a.jsonl"] = lines_of(rows)
    site.busy = lambda number: number % 5 == 2
    site.cut = lambda number: number % 7 == 3
    source = opened(f"{site.url}/a.jsonl")
    wanted = random.Random(3).sample(range(3000), 500)
    assert source.rows(wanted) == [rows[row] for row in wanted]
    assert sum(asked.range is not None for asked in site.gets()) > 3


def test_a_server_that_only_fails_is_one_line(site: Site) -> None:
    site.files["/a.jsonl"] = lines_of(rows_of(6000))
    source = opened(f"{site.url}/a.jsonl?X-Signature=s3cr3t")
    site.busy = lambda number: True
    with pytest.raises(
        DataError, match=r"a\.jsonl\?\.\.\.: cannot be read \(HTTP status 503"
    ) as caught:
        source.rows([3500])
    assert "\n" not in str(caught.value) and "s3cr3t" not in str(caught.value)
    assert len(site.gets()) < 30


# Versions.


@pytest.mark.parametrize("kind", ["a.jsonl", "a.parquet", "a.csv"])
def test_a_file_that_changes_under_a_run_is_one_line(site: Site, kind: str) -> None:
    def body(rows: list[dict[str, Any]]) -> bytes:
        if kind.endswith("parquet"):
            return parquet_of(rows, 500)
        if kind.endswith("csv"):
            lines = ["prompt,completion", *(f"{r['prompt']},{r['completion']}" for r in rows)]
            return "\n".join(lines).encode()
        return lines_of(rows)

    rows = rows_of(4000)
    site.files[f"/{kind}"] = body(rows)
    source = opened(f"{site.url}/{kind}")
    assert source.rows([0]) == rows[:1]
    site.files[f"/{kind}"] = body([{**row, "prompt": row["prompt"][::-1]} for row in rows])
    remote_blobs._looked.clear()
    with pytest.raises(DataError, match="changed since the run began; put the file back") as caught:
        source.rows([3900])
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="changed since the run began"):
        source.check_unchanged()
    assert opened(f"{site.url}/{kind}").rows([3900])[0]["prompt"] == rows[3900]["prompt"][::-1]


def test_ranges_are_held_against_the_version_even_if_the_server_does_not(site: Site) -> None:
    site.heeds_match = False
    body = random.Random(1).randbytes(2**20)
    site.files["/a.jsonl"] = body
    blob = blob_of(site, "/a.jsonl")
    assert blob.read([(0, 10)]) == [body[:10]]
    site.files["/a.jsonl"] = body[:-1] + b"x"
    with pytest.raises(DataError, match="changed since the run began"):
        blob.read([(2**19, 2**19 + 10)])
    longer = RemoteBlob(blob.url, blob.size + 1, "")
    with pytest.raises(DataError, match="changed since the run began"):
        longer.read([(0, 10)])


def test_a_copy_that_breaks_off_is_made_again(site: Site) -> None:
    rows = rows_of(300)
    site.files["/a.jsonl"] = lines_of(rows)
    site.cut_whole = lambda number: number < 3
    assert opened(f"{site.url}/a.jsonl", access="copy").rows(range(300)) == rows
    assert len(site.gets()) == 3


def test_a_server_that_is_busy_when_asked_for_a_version_is_asked_again(site: Site) -> None:
    rows = rows_of(3000)
    site.files["/a.parquet"] = parquet_of(rows, 500)
    source = opened(f"{site.url}/a.parquet")
    remote_blobs._looked.clear()
    site.busy_heads = 2
    site.asked.clear()
    assert source.rows([2900]) == rows[2900:2901]
    assert sum(asked.method == "HEAD" for asked in site.asked) == 3


# Servers that cannot.


@pytest.mark.parametrize(
    ("field", "line"),
    [("ranges", "the server gives no parts of files"), ("tags", "the server tells no version")],
)
def test_without_ranges_or_versions_all_is_fetched(
    site: Site, capsys: pytest.CaptureFixture[str], field: str, line: str
) -> None:
    rows = rows_of(10)
    site.files["/a.jsonl"] = lines_of(rows)
    setattr(site, field, False)
    source = opened(f"{site.url}/a.jsonl")
    assert source.rows(range(10)) == rows
    assert isinstance(source.readers[0].blob, KeptBlob)  # type: ignore[attr-defined]
    assert f"{site.url}/a.jsonl: {line}, so all of it is fetched\n" in capsys.readouterr().err


def test_auto_copies_what_is_small_and_streams_what_is_large(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.files["/a.jsonl"] = lines_of(rows_of(100))
    kinds = []
    for limit in (10**9, 10**3):
        monkeypatch.setattr(remote_files, "COPIED_BYTES", limit)
        source = opened(f"{site.url}/a.jsonl", access="auto")
        kinds.append(type(source.readers[0].blob))  # type: ignore[attr-defined]
    assert kinds == [KeptBlob, RemoteBlob]


def test_redirects_of_ranges_obey_the_rules(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    from raytune_ft.data.files import remote

    site.files["/a.jsonl"] = lines_of(rows_of(100))
    source = opened(f"{site.url}/a.jsonl")
    site.moved["/a.jsonl"] = site.url.replace("127.0.0.1", "localhost") + "/a.jsonl"
    monkeypatch.setattr(remote_blobs, "_kept", remote_blobs._Kept())
    monkeypatch.setattr(remote, "is_private", lambda host: host == "localhost")
    with pytest.raises(RecipeError, match="redirects into a private network") as caught:
        source.rows([99])
    assert "\n" not in str(caught.value)


# Rows, and what they cost.


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_in_the_middle_cost_few_bytes_and_none_of_before(site: Site, kind: str) -> None:
    rows = rows_of(20_000)
    body = lines_of(rows) if kind == "jsonl" else parquet_of(rows, 400)
    site.files[f"/a.{kind}"] = body
    source = opened(f"{site.url}/a.{kind}")
    # a Parquet file is known by its footer, a text from one pass over it
    assert len(body) <= site.given() <= len(body) * 1.1 if kind == "jsonl" else site.given() < 10**6
    travelled = pickle.loads(pickle.dumps(source))
    remote_blobs._kept = remote_blobs._Kept()
    site.asked.clear()
    first = 19_800
    assert travelled.rows(range(first, first + 100)) == rows[first : first + 100]
    ranges = [asked for asked in site.gets() if asked.given]
    assert site.given() < len(body) * 0.05 and len(ranges) <= 8
    bounds = [tuple(map(int, str(asked.range)[6:].split("-"))) for asked in ranges]
    assert all(end > len(body) * 0.95 for _, end in bounds)
    site.asked.clear()
    assert travelled.rows(range(first + 100, first + 120)) == rows[first + 100 : first + 120]
    assert site.given() <= 2 * remote_blobs.UNIT_BYTES


def test_the_index_of_a_text_is_kept_by_version(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytune_ft.data.files import text_index

    monkeypatch.setattr(text_index, "KEPT_BYTES", 0)
    rows = rows_of(3000)
    site.files["/a.jsonl"] = lines_of(rows)
    first = opened(f"{site.url}/a.jsonl")
    site.asked.clear()
    monkeypatch.setattr(remote_blobs, "_kept", remote_blobs._Kept())
    again = opened(f"{site.url}/a.jsonl")
    assert site.given() < len(site.files["/a.jsonl"]) / 10
    assert again.fingerprint == first.fingerprint and again.rows([2999]) == rows[2999:]


def test_streamed_rows_and_copied_rows_are_those_of_the_local_file(
    site: Site, tmp_path: Path
) -> None:
    rows = rows_of(1500)
    for name, body in {"a.jsonl": lines_of(rows), "b.parquet": parquet_of(rows, 200)}.items():
        site.files[f"/{name}"] = body
        (tmp_path / name).write_bytes(body)
        order = random.Random(1).sample(range(1500), 1500)
        local = opened(str(tmp_path / name)).rows(order)
        for access in ("stream", "copy"):
            assert opened(f"{site.url}/{name}", access=access).rows(order) == local


def test_a_blob_travels_small_and_says_no_secret(site: Site) -> None:
    site.files["/a.jsonl"] = lines_of(rows_of(100))
    for access in ("stream", "copy"):
        source = opened(f"{site.url}/a.jsonl?X-Signature=s3cr3t", access=access)
        blob = source.readers[0].blob  # type: ignore[attr-defined]
        assert len(pickle.dumps(blob)) < 500
        for text in (repr(blob), blob.place, blob.name, source.where(3)):
            assert "s3cr3t" not in text
        assert source.local_files() == []


def test_rows_of_many_files_are_fetched_side_by_side(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(600)
    for n in range(30):
        site.files[f"/{n}.jsonl"] = lines_of(rows[n * 20 : n * 20 + 20])
    source = opened(*[f"{site.url}/{n}.jsonl" for n in range(30)])
    monkeypatch.setattr(remote_blobs, "_kept", remote_blobs._Kept())
    site.asked.clear()
    site.slow_s = 0.02
    wanted = random.Random(1).sample(range(600), 300)
    assert source.rows(wanted) == [rows[row] for row in wanted]
    assert site.most_at_once > 3
    assert len(site.gets()) == 30


# A run.


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_resume_at_99_percent_reads_no_earlier_window(
    site: Site, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows = rows_of(40_000, 300)
    body = lines_of(rows) if kind == "jsonl" else parquet_of(rows, 500)
    site.files[f"/a.{kind}"] = body
    section: dict[str, Any] = {
        "sources": [{"path": f"{site.url}/a.{kind}", "access": "stream"}],
        "shuffle_rows": 1024,
        "max_length": 256,
    }
    data = DataSection.model_validate(section)
    feed = make_feed(open_sources(data, 1), Encoder(tokenizer, "tokenizer", data), 3)
    last = feed.n_windows - 1
    started = pickle.loads(pickle.dumps(feed))
    monkeypatch.setattr(remote_blobs, "_kept", remote_blobs._Kept())
    site.asked.clear()
    resumed = next(iter(iter_packs(started, Position(0, int(last * 0.99), 0), epochs=1)))
    assert len(resumed.pack.input_ids)
    # a pool of 1,024 rows, not the 40,000 before
    assert 0 < site.given() < len(body) * 0.15
    site.asked.clear()
    made = [started.window(0, number) for number in (int(last * 0.99), last)]
    assert all(window.packs for window in made) and site.given() < len(body) * 0.15
