"""A real S3 server on loopback, and a bucket in it for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from moto.server import ThreadedMotoServer

NUMBERS = itertools.count()
KEYS = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Return the address of a server."""
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture(scope="package")
def started() -> Iterator[None]:
    """Have a Ray of this package's tests."""
    from raytune_ft.cluster import ray_session

    with ray_session():
        yield


@pytest.fixture
def bucket(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return the address of an empty bucket; the environment says where its server is."""
    from pyarrow import fs

    for name, value in {**KEYS, "AWS_ENDPOINT_URL": server, "AWS_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    name = f"bucket-{next(NUMBERS)}"
    files = fs.S3FileSystem(
        endpoint_override=server.removeprefix("http://"), scheme="http", region="us-east-1",
        allow_bucket_creation=True,
    )  # fmt: skip
    files.create_dir(name)
    return f"s3://{name}"
