"""A hub of our own on loopback: the endpoints that an upload needs, with real LFS storage."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

REGULAR_BYTES = 4096
"""Files over this go by LFS, as weights do."""


class Hub:
    """What arrived."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, Any]] = {}
        self.stored: dict[str, bytes] = {}
        """LFS objects by their hash."""
        self.puts = 0
        self.commits: list[list[dict[str, Any]]] = []
        self.tokens: set[str | None] = set()
        self.fail_puts = 0
        """So many uploads of large files are refused."""
        self.url = ""

    def files(self) -> dict[str, bytes]:
        """The repository's files behind its last commit."""
        found = {}
        for line in self.commits[-1]:
            value = line["value"]
            if line["key"] == "file":
                found[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                found[value["path"]] = self.stored[value["oid"]]
        return found


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body, path = self._body(), self.path.partition("?")[0]
            hub.tokens.add(self.headers.get("Authorization"))
            if self.headers.get("Authorization") != "Bearer hf_good":
                self._answer({"error": "Invalid token hf_bad"}, 401)
            elif path == "/api/repos/create":
                asked = json.loads(body)
                name = f"me/{asked['name']}" if not asked.get("organization") else (
                    f"{asked['organization']}/{asked['name']}"
                )  # fmt: skip
                known = name in hub.repositories
                hub.repositories.setdefault(name, asked)
                answer = {"url": f"{hub.url}/{name}", "name": name, "id": name}
                self._answer(answer, 409 if known else 200)
            elif path == "/api/validate-yaml":
                self._answer({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                self._answer({"files": [self._mode(f) for f in json.loads(body)["files"]]})
            elif path.endswith("/objects/batch"):
                objects = [self._action(one) for one in json.loads(body)["objects"]]
                self._answer({"transfer": "basic", "objects": objects})
            elif "/commit/" in path:
                hub.commits.append([json.loads(line) for line in body.splitlines()])
                name = path.removeprefix("/api/models/").partition("/commit/")[0]
                self._answer(
                    {"commitUrl": f"{hub.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}
                )
            else:
                self._answer({"error": f"no {path}"}, 404)

        def do_PUT(self) -> None:
            body, oid = self._body(), self.path.rpartition("/")[2]
            hub.puts += 1
            if hub.fail_puts > 0:
                hub.fail_puts -= 1
                self._answer({"error": "storage is full"}, 400)
                return
            assert hashlib.sha256(body).hexdigest() == oid
            hub.stored[oid] = body
            self._answer({})

        def _mode(self, file: dict[str, Any]) -> dict[str, Any]:
            mode = "lfs" if file["size"] > REGULAR_BYTES else "regular"
            return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

        def _action(self, one: dict[str, Any]) -> dict[str, Any]:
            there = one["oid"] in hub.stored
            href = {"href": f"{hub.url}/lfs/{one['oid']}"}
            return {**one, **({} if there else {"actions": {"upload": href}})}

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def _answer(self, content: dict[str, Any], status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_words: Any) -> None:
            pass

    return Handler


@contextmanager
def running() -> Iterator[Hub]:
    """Serve a hub while the block runs."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
