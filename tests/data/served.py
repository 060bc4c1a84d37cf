"""Servers of this machine that tests read from: a web server, a hub, and an S3 store.

They answer as the real ones do to what our code and its libraries ask, and count what they give.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

SHA = "a" * 40
CONVERTED_SHA = "c" * 40


@functools.lru_cache(maxsize=4096)
def tag_of(body: bytes) -> str:
    """Return a file's ETag."""
    return f'"{hashlib.sha256(body).hexdigest()[:16]}"'


@dataclass
class Asked:
    """One request, and how many bytes of a file were given to it."""

    method: str
    path: str
    range: str | None
    headers: dict[str, str]
    given: int = 0


@dataclass
class Site:
    """A web server with ranges: what it has, how it misbehaves, and what it was asked for."""

    files: dict[str, bytes] = field(default_factory=dict)
    tags: bool = True
    ranges: bool = True
    heeds_match: bool = True
    busy: Callable[[int], bool] = lambda number: False
    """Which GET of a range, counted from 1, is answered with 503."""
    cut: Callable[[int], bool] = lambda number: False
    """Which one loses its connection in the middle of the body."""
    cut_whole: Callable[[int], bool] = lambda number: False
    """Which GET of a whole file does."""
    n_whole: int = 0
    busy_heads: int = 0
    """So many of the next HEADs are answered with 503."""
    slow_s: float = 0.0
    """Each file's answer takes so long."""
    most_at_once: int = 0
    now: int = 0
    moved: dict[str, str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    _n_ranges: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def given(self, path: str = "") -> int:
        """Return the bytes of files that were given, by whole bodies and ranges."""
        return sum(asked.given for asked in self.asked if path in asked.path)

    def gets(self, path: str = "") -> list[Asked]:
        return [asked for asked in self.asked if asked.method == "GET" and path in asked.path]

    def find(self, path: str) -> bytes | None:
        return self.files.get(path)

    def answer(self, handler: Handler) -> None:
        """Answer a GET or HEAD; subclasses know more paths."""
        path = unquote(urlsplit(handler.path).path)
        if handler.command == "HEAD" and self.busy_heads:
            self.busy_heads -= 1
            handler.give(503, b"", {})
            return
        if path in self.moved:
            handler.give(302, b"", {"Location": self.moved[path]})
            return
        with self._lock:
            self.now += 1
            self.most_at_once = max(self.most_at_once, self.now)
        time.sleep(self.slow_s)
        self.give_file(handler, self.find(path), {})
        with self._lock:
            self.now -= 1

    def give_file(self, handler: Handler, body: bytes | None, headers: dict[str, str]) -> None:
        if body is None:
            handler.give(404, b"", headers)
            return
        tag = tag_of(body)
        headers = {**headers, **({"ETag": tag} if self.tags else {})}
        if self.heeds_match and handler.headers.get("If-Match", tag) != tag:
            handler.give(412, b"", headers)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", handler.headers.get("Range") or "")
        if not wanted or not self.ranges:
            self.n_whole += handler.command == "GET"
            handler.give(200, body, headers, cut=self.cut_whole(self.n_whole))
            return
        start = int(wanted[1])
        end = min(int(wanted[2] or len(body)) + 1, len(body))
        if start >= len(body):
            handler.give(416, b"", headers)
            return
        with self._lock:
            self._n_ranges += handler.command == "GET"
            number = self._n_ranges
        if self.busy(number):
            handler.give(503, b"", {})
            return
        shown = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        handler.give(206, body[start:end], shown, cut=self.cut(number))


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        self.begin()
        self.site.answer(self)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.begin()
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.site.answer(self)

    def begin(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.asked = Asked(self.command, self.path, self.headers.get("Range"), headers)
        self.site.asked.append(self.asked)

    def give(self, status: int, body: bytes, headers: dict[str, str], *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut:
            body, self.close_connection = body[: len(body) // 2], True
        if status in (200, 206):
            self.asked.given = len(body)
        self.wfile.write(body)

    def give_json(self, found: Any) -> None:
        self.give(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that went away."""


@contextmanager
def served(site: Site) -> Iterator[Any]:
    """Run a site's server while the block runs."""
    server = _Server(("127.0.0.1", 0), type("Bound", (Handler,), {"site": site}))
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()


@dataclass
class Hub(Site):
    """The hub's endpoints for data sets: `repos` maps name@revision to the files there.

    Contents of over 1,000 bytes lie on "another host", to which the hub sends whoever asks.
    """

    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def answer(self, handler: Handler) -> None:
        parts = urlsplit(handler.path)
        path = unquote(parts.path)
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(handler, found[1], found[2] or "main")
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/(\w+)(?:/(.*))?", path):
            recursive = parse_qs(parts.query).get("recursive", ["false"])[0].lower() == "true"
            self._tree(handler, found[1], found[2], (found[3] or "").strip("/"), recursive)
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/paths-info/(\w+)", path):
            self._paths(handler, found[1], found[2])
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/(\w+)/(.+)", path):
            self._resolve(handler, found[1], found[2], found[3])
        elif path.startswith("/far/"):
            name, _, rest = path.removeprefix("/far/").partition("//")
            self.give_file(handler, self.repos[name].get(rest), {})
        else:
            handler.give(404, b"{}", {})

    def commit(self, name: str, revision: str) -> str | None:
        known = {"main": SHA, "refs/convert/parquet": CONVERTED_SHA}
        sha = known.get(revision, revision)
        return sha if f"{name}@{sha}" in self.repos else None

    def _info(self, handler: Handler, name: str, revision: str) -> None:
        sha = self.commit(name, revision)
        if sha is None:
            known = any(repo.startswith(f"{name}@") for repo in self.repos)
            code = "RevisionNotFound" if known else "RepoNotFound"
            handler.give(404, b"{}", {"X-Error-Code": code})
            return
        names = [{"rfilename": path} for path in self.repos[f"{name}@{sha}"]]
        handler.give_json({"id": name, "sha": sha, "siblings": names, "tags": []})

    def _tree(
        self, handler: Handler, name: str, revision: str, folder: str, recursive: bool
    ) -> None:
        sha = self.commit(name, revision)
        files = self.repos.get(f"{name}@{sha}", {})
        prefix = f"{folder}/" if folder else ""
        inside = {path: body for path, body in files.items() if path.startswith(prefix)}
        if not inside:
            handler.give(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        entries = [
            _entry(path, body)
            for path, body in inside.items()
            if recursive or "/" not in path.removeprefix(prefix)
        ]
        folders = {
            path[:end]
            for path in inside
            for end, c in enumerate(path)
            if c == "/" and end >= len(prefix)
        }
        entries += [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            for path in sorted(folders)
            if recursive or "/" not in path.removeprefix(prefix)
        ]
        handler.give_json(entries)

    def _paths(self, handler: Handler, name: str, revision: str) -> None:
        files = self.repos.get(f"{name}@{self.commit(name, revision)}", {})
        raw = handler.body.decode()
        wanted = json.loads(raw)["paths"] if raw.startswith("{") else parse_qs(raw)["paths"]
        handler.give_json([_entry(path, files[path]) for path in wanted if path in files])

    def _resolve(self, handler: Handler, name: str, revision: str, path: str) -> None:
        sha = self.commit(name, revision)
        body = self.repos.get(f"{name}@{sha}", {}).get(path)
        commit = {"X-Repo-Commit": str(sha)}
        if body is None:
            code = "EntryNotFound" if sha else "RevisionNotFound"
            handler.give(404, b"", {**commit, "X-Error-Code": code})
        elif len(body) <= 1000:
            self.give_file(handler, body, commit)
        else:
            far = (
                self.url.replace("127.0.0.1", "localhost") + f"/far/{name}@{sha}//{path}?sig=s3cr3t"
            )
            linked = {"X-Linked-Size": str(len(body)), "X-Linked-ETag": '"linked"'}
            handler.give(302, b"", {**commit, **linked, "Location": far})


def _entry(path: str, body: bytes) -> dict[str, Any]:
    oid = hashlib.sha1(body).hexdigest()
    return {"type": "file", "oid": oid, "size": len(body), "path": path}


@dataclass
class Store(Site):
    """An S3 store: listings of a bucket, and objects by ranges; files are /bucket/key."""

    modified: str = "2026-01-02T03:04:05.678Z"

    def answer(self, handler: Handler) -> None:
        parts = urlsplit(handler.path)
        path, query = unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)
        if "list-type" in query:
            self._list(handler, path.strip("/"), query)
            return
        if path.strip("/").count("/") == 0:
            handler.give(200, b"", {})
            return
        day, clock = "Fri, 02 Jan 2026", self.modified[11:19]
        self.give_file(handler, self.find(path), {"Last-Modified": f"{day} {clock} GMT"})

    def _list(self, handler: Handler, bucket: str, query: dict[str, list[str]]) -> None:
        prefix, delimiter = query.get("prefix", [""])[0], query.get("delimiter", [""])[0]
        root = f"/{bucket}/"
        keys = sorted(p.removeprefix(root) for p in self.files if p.startswith(root + prefix))
        shown, folders = [], set()
        for key in keys:
            rest = key.removeprefix(prefix)
            if delimiter and delimiter in rest:
                folders.add(prefix + rest.partition(delimiter)[0] + delimiter)
            else:
                shown.append(key)
        start = int(query.get("continuation-token", ["0"])[0] or 0)
        limit = int(query.get("max-keys", ["1000"])[0])
        more = start + limit < len(shown)
        contents = "".join(
            f"<Contents><Key>{escape(key)}</Key><Size>{len(self.files[root + key])}</Size>"
            f"<LastModified>{self.modified}</LastModified><ETag>&quot;x&quot;</ETag></Contents>"
            for key in shown[start : start + limit]
        )
        common = "".join(
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            for name in sorted(folders)
        )
        token = f"<NextContinuationToken>{start + limit}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(shown)}</KeyCount><MaxKeys>{limit}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{contents}{common}"
            "</ListBucketResult>"
        )
        handler.give(200, body.encode(), {"Content-Type": "application/xml"})
