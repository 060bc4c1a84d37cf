"""Requests as bytes on a socket, and what comes back: the client that a fuzzer needs."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Made:
    """A request; `raw` is sent as it is in the place of everything else."""

    method: str = "POST"
    target: str = "/v1/chat/completions"
    headers: tuple[tuple[bytes, bytes], ...] = ()
    body: bytes = b""
    raw: bytes | None = None

    def wire(self, host: str) -> bytes:
        """Write the request; the connection is closed behind its answer."""
        if self.raw is not None:
            return self.raw
        lines = [f"{self.method} {self.target} HTTP/1.1".encode("utf-8", "replace")]
        lines += [b"Host: " + host.encode(), b"Connection: close"]
        lines += [name + b": " + value for name, value in self.headers]
        if self.body or self.method in ("POST", "PUT", "PATCH"):
            lines.append(b"Content-Length: %d" % len(self.body))
        return b"\r\n".join(lines) + b"\r\n\r\n" + self.body


@dataclass
class Got:
    """An answer; status 0: the connection was closed without one."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def sent(url: str, request: Made, timeout: float = 60.0) -> Got:
    """Send one request over a connection of its own and read to its end.

    Raises:
        TimeoutError: nothing came for so long: the server hangs.
    """
    place = urlsplit(url)
    address = (str(place.hostname), int(place.port or 80))
    with socket.create_connection(address, timeout=timeout) as connection:
        content = b""
        try:
            connection.sendall(request.wire(place.netloc))
            if request.raw is not None:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(65536):
                content += part
        except (ConnectionError, BrokenPipeError):
            pass  # the server may close on what it cannot read
    return _parsed(content)


def _parsed(content: bytes) -> Got:
    head, _, body = content.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    parts = first.split(" ")
    if len(parts) < 2 or not parts[1].isdigit():
        return Got(0)
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return Got(int(parts[1]), headers, body)


def chat_body(**fields: Any) -> bytes:
    """Write a chat completion's body."""
    return json.dumps(fields).encode()
