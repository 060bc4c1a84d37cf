"""Token cache's folder: bounded, polite to other runs, and never needed."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.cache_room import PARTIAL_S, limit_bytes
from raytune_ft.data.cache.store import LIMIT, Store
from raytune_ft.data.files import kept
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, Window
from raytune_ft.errors import RecipeError
from tests.data.feeds import content, feed_of

GIB = 2**30
CONTENT = b"x" * 1000


def allow(monkeypatch: pytest.MonkeyPatch, size_bytes: int) -> None:
    monkeypatch.setenv(LIMIT, repr(size_bytes / GIB))


def fill(root: Path, keys: dict[str, int]) -> None:
    """Make keys of so many shards, each used an hour before the next one."""
    for age, (key, n_shards) in enumerate(reversed(keys.items()), start=2):
        for number in range(n_shards):
            Store(root).write(key, number, CONTENT)
        os.utime(root / key, (time.time() - 3600 * age,) * 2)


def made_of(feed: Feed) -> list[Window]:
    return [feed.window(0, number) for number in range(feed.n_windows)]


def contents(windows: list[Window]) -> list[list[Any]]:
    return [[content(pack) for pack in window.packs] for window in windows]


def test_keys_used_longest_ago_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, {"oldest": 2, "old": 2, "young": 2})
    allow(monkeypatch, 5500)
    Store(tmp_path).write("mine", 0, CONTENT)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["mine", "old", "young"]
    Store(tmp_path).note_use("old")
    Store(tmp_path).write("mine", 1, CONTENT)
    assert sorted(found.name for found in tmp_path.iterdir()) == ["mine", "old"]


def test_a_run_removes_nothing_of_its_own_and_says_once_that_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    allow(monkeypatch, 3500)
    store = Store(tmp_path)
    for number in range(6):
        store.write("mine", number, CONTENT)
    assert len(list((tmp_path / "mine").iterdir())) == 3
    assert [LIMIT in line for line in caplog.messages] == [True]


def test_the_limit_holds_over_many_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allow(monkeypatch, 50_000)
    store = Store(tmp_path)
    for number in range(200):
        store.write(f"key{number // 20}", number, CONTENT)
    sizes = [path.stat().st_size for path in tmp_path.glob("*/*.arrow")]
    assert 20_000 <= sum(sizes) <= 50_000
    assert len(list((tmp_path / "key9").iterdir())) == 20


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    Store(tmp_path).write("mine", 0, CONTENT)
    stale, fresh = tmp_path / "mine" / ".partial-a", tmp_path / "mine" / ".partial-b"
    stale.touch()
    fresh.touch()
    os.utime(stale, (time.time() - PARTIAL_S - 60,) * 2)
    removed = tmp_path / ".removed-key"
    removed.mkdir()
    (removed / "00000000.arrow").write_bytes(CONTENT)
    Store(tmp_path).write("mine", 1, CONTENT)
    assert not stale.exists()
    assert fresh.exists()
    assert not removed.exists()


def test_a_key_that_goes_away_is_begun_again(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.write("mine", 0, CONTENT)
    (tmp_path / "mine" / "00000000.arrow").unlink()
    (tmp_path / "mine").rmdir()
    store.note_use("mine")
    store.write("mine", 1, CONTENT)
    assert store.path("mine", 1).read_bytes() == CONTENT


def test_a_full_disk_is_told_once_and_ends_nothing(
    tmp_path: Path,
    varied: Path,
    tokenizer: TextTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path))
    feed = feed_of(varied, tokenizer, cache=True, window=7)
    monkeypatch.setattr(kept, "RESERVE_BYTES", 2**60)
    windows = made_of(feed)
    assert list(tmp_path.glob("tokens/*/*")) == []
    assert [line.count("data.cache: needs 0.00 GiB more") for line in caplog.messages] == [1]
    assert contents(windows) == contents(made_of(feed_of(varied, tokenizer, window=7)))


def test_a_folder_that_cannot_be_written_is_told_once_and_ends_nothing(
    tmp_path: Path,
    varied: Path,
    tokenizer: TextTokenizer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path))
    feed = feed_of(varied, tokenizer, cache=True, window=7)
    (tmp_path / "tokens").write_text("no folder")
    windows = made_of(feed)
    assert [line.count(f"{tmp_path}/tokens") for line in caplog.messages] == [1]
    assert contents(windows) == contents(made_of(feed_of(varied, tokenizer, window=7)))


def test_the_limit_has_a_default_and_its_mistakes_are_one_line(
    tmp_path: Path, varied: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LIMIT, raising=False)
    assert 0 < limit_bytes(tmp_path / "not" / "there", LIMIT) <= 50 * GIB
    monkeypatch.setenv(LIMIT, "1.5")
    assert limit_bytes(tmp_path, LIMIT) == 1.5 * GIB
    for wrong in ("many", "-1", "nan", "inf"):
        monkeypatch.setenv(LIMIT, wrong)
        with pytest.raises(RecipeError, match=f"{LIMIT}: '{wrong}' is no number of GiB; "):
            feed_of(varied, tokenizer, cache=True)
