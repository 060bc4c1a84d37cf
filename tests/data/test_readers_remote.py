"""URLs: fetched once, complete, from where they may be, and never with a secret in a message."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import DataSection
from raytune_ft.data.files import remote
from raytune_ft.data.files.remote import SCHEMES, check_redirect, check_url, is_url, shown
from raytune_ft.data.files.remote_files import open_remote
from raytune_ft.data.sources import RowSource, is_data, open_sources, split_validation
from raytune_ft.errors import DataError, RecipeError

ROWS = [{"prompt": f"a{i}", "completion": f"b{i}"} for i in range(5)]
BODY = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


class Site:
    """A web server of one thread: what it has, and what it was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"/rows.jsonl": BODY}
        self.etag: str | None = "one"
        self.moved: dict[str, str] = {}
        self.short = False
        self.asked: list[tuple[str, str]] = []
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                self.answer(with_body=True)

            def answer(self, *, with_body: bool) -> None:
                site.asked.append((self.command, self.path))
                path = self.path.partition("?")[0]
                if path in site.moved:
                    self.send_response(302)
                    self.send_header("Location", site.moved[path])
                    self.end_headers()
                    return
                body = site.files.get(path)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                if site.etag:
                    self.send_header("ETag", f'"{site.etag}"')
                self.end_headers()
                if with_body:
                    self.wfile.write(body[:10] if site.short else body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def downloads(self) -> int:
        return sum(method == "GET" for method, _ in self.asked)


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    thread = threading.Thread(target=site.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("RAYTUNE_CACHE", str(folder))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    return folder


def opened(path: str, **data: Any) -> RowSource:
    return open_sources(DataSection.model_validate({"sources": [{"path": path}], **data}), 1)


def test_a_file_is_fetched_once_and_read_like_any_other(
    site: Site, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{site.url}/rows.jsonl"
    for _ in range(2):
        source = opened(url)
        assert source.rows(range(5)) == ROWS
        assert source.where(2) == f"{url}:3"
    assert site.downloads() == 1
    assert capsys.readouterr().err == f"fetching {url} (0.0 MiB)\n"
    assert [path.name for path in cache.rglob("*") if path.is_file()] == ["rows.jsonl"]


def test_another_version_is_fetched_and_the_old_one_is_kept(site: Site) -> None:
    url = f"{site.url}/rows.jsonl"
    old = opened(url)
    site.files["/rows.jsonl"] = BODY.replace(b"a1", b"c1")
    site.etag = "two"
    assert opened(url).rows([1])[0]["prompt"] == "c1"
    assert old.rows([1])[0]["prompt"] == "a1"


def test_without_a_version_every_opening_fetches(site: Site) -> None:
    site.etag = None
    url = f"{site.url}/rows.jsonl"
    opened(url)
    site.files["/rows.jsonl"] = BODY.replace(b"a1", b"c1")
    assert opened(url).rows([1])[0]["prompt"] == "c1"


def test_packed_files_and_signatures(site: Site, cache: Path) -> None:
    site.files["/d/rows.jsonl.gz"] = gzip.compress(BODY)
    url = f"{site.url}/d/rows.jsonl.gz?X-Signature=s3cr3t"
    source = opened(url)
    assert source.rows(range(5)) == ROWS
    assert source.where(0) == f"{site.url}/d/rows.jsonl.gz?...:1"
    assert not [path for path in cache.rglob("*") if "s3cr3t" in path.name]
    site.files.clear()
    with pytest.raises(RecipeError, match=r"gz\?\.\.\. cannot be fetched") as caught:
        opened(url)
    assert "s3cr3t" not in str(caught.value)


def test_validation_may_be_a_url(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BODY)
    path, url = str(tmp_path / "a.jsonl"), f"{site.url}/rows.jsonl"
    data = DataSection.model_validate({"sources": [{"path": path}], "validation": url})
    _, held_out = split_validation(open_sources(data, 1), data, 1)
    assert held_out is not None and held_out.rows(range(5)) == ROWS
    data = DataSection.model_validate({"sources": [{"path": url}], "validation": "test"})
    with pytest.raises(RecipeError, match=r"no file 'test', and http.*jsonl has no splits"):
        split_validation(open_sources(data, 1), data, 1)


def test_a_cut_download_is_an_error_and_leaves_nothing(site: Site, cache: Path) -> None:
    site.short = True
    with pytest.raises((RecipeError, DataError), match=r"rows\.jsonl") as caught:
        opened(f"{site.url}/rows.jsonl")
    assert "\n" not in str(caught.value)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    site.short = False
    assert len(opened(f"{site.url}/rows.jsonl")) == 5


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("{site}/none.jsonl", r"none\.jsonl cannot be fetched \(HTTP status 404\); check the path"),
        ("{site}/page.html", r"page\.html is no \.jsonl, .* file; give a file's own address"),
        ("{site}/", "is no .jsonl, .* file"),
        ("http://user:s3cr3t@127.0.0.1/a.jsonl", r"http://127\.0\.0\.1/a\.jsonl is given with a"),
        ("ftp://127.0.0.1/a.jsonl", "'ftp' is no scheme that is fetched; use http, https, hf, s3"),
        ("memory://a.jsonl", "'memory' is no scheme"),
        ("simplecache::http://127.0.0.1/a.jsonl", "'simplecache::http' is no scheme"),
        ("zip://a.jsonl::http://127.0.0.1/a.zip", "'zip' is no scheme"),
        ("gs://bucket/a.jsonl", "gs:// paths need the package gcsfs"),
    ],
)
def test_what_is_not_fetched_is_one_line(site: Site, path: str, message: str) -> None:
    scheme = path.partition(":")[0]
    package = SCHEMES.get(scheme)
    if package:
        try:
            __import__(package)
        except ImportError:
            pass
        else:
            pytest.skip(f"{package} is installed")
    with pytest.raises(RecipeError, match=message) as caught:
        opened(path.format(site=site.url))
    assert str(caught.value).startswith("data.sources[0].path: ")
    assert "\n" not in str(caught.value) and "s3cr3t" not in str(caught.value)


def test_a_server_that_is_not_there_is_one_line(site: Site) -> None:
    url = f"{site.url}/rows.jsonl"
    site.server.shutdown()
    site.server.server_close()
    with pytest.raises(RecipeError, match="cannot be fetched") as caught:
        opened(url)
    assert "\n" not in str(caught.value)


# Redirects.


def test_redirects_are_followed_where_they_may_go(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.moved["/old.jsonl"] = f"{site.url}/rows.jsonl"
    assert opened(f"{site.url}/old.jsonl").rows(range(5)) == ROWS
    # seen from a public host, the same target would be an inner one
    monkeypatch.setattr(remote, "is_private", lambda host: host == "localhost")
    site.moved["/out.jsonl"] = site.url.replace("127.0.0.1", "localhost") + "/rows.jsonl"
    before = len(site.asked)
    with pytest.raises(RecipeError, match="redirects into a private network") as caught:
        opened(f"{site.url}/out.jsonl")
    assert "\n" not in str(caught.value)
    assert {path for _, path in site.asked[before:]} == {"/out.jsonl"}


@pytest.mark.parametrize(
    ("start", "target", "allowed"),
    [
        ("https://1.1.1.1/a", "https://8.8.8.8/a", True),
        ("http://1.1.1.1/a", "https://1.1.1.1/a", True),
        ("http://127.0.0.1/a", "http://10.0.0.1/a", True),
        ("https://1.1.1.1/a", "http://1.1.1.1/a", False),
        ("https://1.1.1.1/a", "file:///etc/passwd", False),
        ("http://1.1.1.1/a", "http://127.0.0.1/a", False),
        ("http://1.1.1.1/a", "http://169.254.169.254/latest/meta-data", False),
        ("http://1.1.1.1/a", "http://[::1]/a", False),
        ("http://1.1.1.1/a", "http://[::ffff:127.0.0.1]/a", False),
        ("http://1.1.1.1/a", "http://2130706433/a", False),
        ("http://1.1.1.1/a", "http://0.0.0.0/a", False),
        ("http://1.1.1.1/a", "http://192.168.1.1/a", False),
    ],
)
def test_no_redirect_leaves_tls_or_enters_a_private_network(
    start: str, target: str, allowed: bool
) -> None:
    if allowed:
        check_redirect(start, target)
        return
    with pytest.raises(RecipeError, match="redirects"):
        check_redirect(start, target)


# Other file systems, by one that needs no network.


def test_folders_and_patterns_of_a_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setattr(remote, "SCHEMES", {**SCHEMES, "memory": None})
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for name in ("train-1.jsonl", "train-0.jsonl", "test.jsonl", "README.md"):
        memory.pipe(f"/set/data/{name}", BODY)
    assert opened("memory://set/data").rows(range(10)) == ROWS * 2
    assert len(opened("memory://set/data/t*.jsonl")) == 15
    section = {"sources": [{"path": "memory://set", "data_dir": "data", "split": "test"}]}
    source = open_sources(DataSection.model_validate(section), 1)
    assert (len(source), source.where(0)) == (5, "memory:///set/data/test.jsonl:1")
    data = DataSection.model_validate({"sources": [{"path": "memory://set"}], "validation": "test"})
    rows, held_out = split_validation(open_sources(data, 1), data, 1)
    assert held_out is not None and (len(rows), len(held_out)) == (10, 5)
    with pytest.raises(RecipeError, match="nothing at memory://set/none"):
        open_remote("memory://set/none*", "data.sources[0].path", lambda names: names, "auto")
    memory.store.clear()


def test_file_urls_are_local_paths(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BODY)
    assert opened(f"file://{tmp_path}/a.jsonl").rows(range(5)) == ROWS


# What is a URL, and what is shown of one.


def test_urls_are_told_from_paths_and_names() -> None:
    assert all(map(is_url, ["https://a/b", "S3://a", "x::y", "hf://datasets/a/b"]))
    assert not any(map(is_url, ["a/b", "C:\\a", "org/name", "/a//b", "./a.jsonl"]))
    assert all(map(is_data, ["https://a/b.jsonl", "a.csv", "x/a.jsonl.gz", "data/*.json"]))
    assert not any(map(is_data, ["internlm_oasst1.yaml", "internlm_7b_qlora_oasst1_e3", "a/b"]))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://u:p@host:1/a.jsonl?sig=x#f", "https://host:1/a.jsonl?..."),
        ("s3://bucket/a b.jsonl", "s3://bucket/a b.jsonl"),
    ],
)
def test_secrets_are_not_shown(url: str, expected: str) -> None:
    assert shown(url) == expected


def test_schemes_are_known_to_fsspec() -> None:
    fsspec = pytest.importorskip("fsspec")
    assert set(SCHEMES) <= set(fsspec.available_protocols())
    for scheme in SCHEMES:
        assert check_url(f"{scheme}://a/b.jsonl", "key") == scheme
