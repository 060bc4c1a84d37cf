"""Generated requests, a real engine, real sockets; `make soak` sends 20,000 through Ray Serve."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from raytune_ft.chat import ChatModel
from raytune_ft.serving.engines.batched import BatchedEngine
from raytune_ft.serving.options import ApiOptions
from tests.soak.fuzz import fuzz
from tests.soak.local import served_locally
from tests.soak.wire import Made, sent

LOG = ApiOptions(access_log="/dev/null", body_seconds=2)


def test_no_request_breaks_or_hangs_the_server(endless: ChatModel) -> None:
    engine = BatchedEngine(endless)
    with served_locally(engine, LOG) as url:
        seen = fuzz(lambda request: sent(url, request), 300, "tiny")
        assert sent(url, Made("GET", "/readyz")).status == 200
    load = engine.load()
    engine.close()
    assert sum(seen.values()) == 300
    assert {200, 400, 404, 405} <= set(seen)
    assert (load.running, load.waiting) == (0, 0)


def test_a_body_that_does_not_come_is_given_up(endless: ChatModel) -> None:
    engine = BatchedEngine(endless)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with served_locally(engine, ApiOptions(access_log="/dev/null", body_seconds=0.2)) as url:
        address = str(urlsplit(url).hostname), int(urlsplit(url).port or 0)
        with socket.create_connection(address, timeout=20) as slow:
            slow.sendall(head + b"Content-Length: 10\r\n\r\n{")
            assert slow.recv(4096).startswith(b"HTTP/1.1 408")
    engine.close()
