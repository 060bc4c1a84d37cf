"""Nodes: data tasks run on other nodes than the ranks, or where the files are."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed
from tests.conftest import write_chats
from tests.data.feeds import feed_of, fingerprint

pytestmark = pytest.mark.ray

CACHE = "RAYTUNE_CACHE"


@dataclass(frozen=True)
class Nodes:
    """Two raylets with folders of their own: the driver's, without a core, and another one."""

    here: str
    other: str
    folder: Path


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    import ray
    from ray.cluster_utils import Cluster

    from raytune_ft.cluster import QUIET

    folder = tmp_path_factory.mktemp("nodes")
    for key, value in QUIET.items():
        os.environ.setdefault(key, value)
    # a raylet hands its environment on to its workers
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "env_vars": {CACHE: str(folder / "cache_here")}},
    )
    other = cluster.add_node(num_cpus=2, env_vars={CACHE: str(folder / "cache_other")})
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield Nodes(cluster.head_node.node_id, other.node_id, folder)
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def feed(nodes: Nodes, tokenizer: TextTokenizer) -> Feed:
    """Four windows of a file in the driver's folder, too large to travel inside a message."""
    return feed_of(write_chats(nodes.folder / "a.jsonl", 6000), tokenizer, window=1500, cache=True)


def made_on(supply: Any, feed: Feed) -> list[set[str]]:
    """Return the nodes that each window lies on before anybody has read it."""
    import ray

    found = []
    for index in range(feed.n_windows):
        refs: list[Any] = []
        while not refs:
            refs, error = ray.get(supply.actor.window.remote("train", 0, index))
            assert not error
        ray.wait(refs, fetch_local=False)
        found.append(set(ray.experimental.get_object_locations(refs)[refs[0]]["node_ids"]))
    return found


def test_windows_made_on_another_node_are_the_same(
    nodes: Nodes, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver holds no core and reads nothing; what is kept lies in the other node's folder."""
    from raytune_ft.data import stream
    from raytune_ft.data.feeder import Rows, feeding

    with monkeypatch.context() as patch:
        patch.setenv(CACHE, str(nodes.folder / "cache_driver"))
        expected = [fingerprint(placed) for placed in iter_packs(feed, epochs=1)]
    monkeypatch.setattr(stream, "node_with", lambda *_: nodes.other)
    with feeding({"train": Rows(feed)}) as supply:
        assert made_on(supply, feed) == [{nodes.other}] * feed.n_windows
        assert [fingerprint(placed) for placed in supply.packs("train")] == expected
    assert any((nodes.folder / "cache_other").rglob("*"))
    assert not (nodes.folder / "cache_here").exists()


def test_files_of_this_machine_are_read_on_it_though_it_has_no_core(
    nodes: Nodes, feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other node's file of that name is another one, of another time."""
    from raytune_ft.data import stream
    from raytune_ft.data.feeder import Rows, feeding

    assert stream.node_with([feed.source]) is None, "both raylets see this disk"
    real = Path.stat

    def stat(path: Path, **options: Any) -> Any:
        found = real(path, **options)
        if path.suffix != ".jsonl":
            return found
        return SimpleNamespace(st_size=found.st_size, st_mtime_ns=found.st_mtime_ns + 1)

    with monkeypatch.context() as patch:  # in this process only
        patch.setattr(Path, "stat", stat)
        assert stream.node_with([feed.source]) == nodes.here
        feeder = feeding({"train": Rows(feed)})
        supply = feeder.__enter__()
    assert made_on(supply, feed) == [{nodes.here}] * feed.n_windows
    feeder.__exit__(None, None, None)
