"""Data sets of the hub, streamed: the files that `datasets` would choose, at one commit, by parts.

The hub is a server of this machine that answers as the real one to what its client asks.
"""

from __future__ import annotations

import gzip
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.config.schema import DataSection
from raytune_ft.data.files import hub_rows, remote_blobs, remote_ranges
from raytune_ft.data.sources import RowSource, open_sources, split_validation
from raytune_ft.errors import DataError, RecipeError
from tests.data.remote_rows import lines_of, parquet_of, rows_of
from tests.data.served import CONVERTED_SHA, SHA, Hub, served

ROWS = rows_of(6000)
CARD = """---
configs:
- config_name: chat
  data_files:
  - split: train
    path: chat/a-*.jsonl
  - split: test
    path: chat/b.jsonl
- config_name: essays
  data_files: essays/*.parquet
---
"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import datasets.config
    from huggingface_hub import HfFileSystem, constants

    with served(Hub()) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        urls = hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}"
        monkeypatch.setattr(datasets.config, "HUB_DATASETS_URL", urls)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
        monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)
        monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", "hf_s3cr3t")
        for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(remote_ranges, "FIRST_WAIT_S", 0.01)
        monkeypatch.setattr(remote_ranges, "_moved", {})
        monkeypatch.setattr(remote_blobs, "_kept", remote_blobs._Kept())
        HfFileSystem.clear_instance_cache()
        hub_rows.load_hub.cache_clear()
        yield hub
    HfFileSystem.clear_instance_cache()
    hub_rows.load_hub.cache_clear()


def opened(access: str = "stream", **source: Any) -> RowSource:
    section = {"sources": [{"path": "org/rows", "access": access, **source}]}
    return open_sources(DataSection.model_validate(section), 1)


def has(hub: Hub, files: dict[str, bytes], sha: str = SHA, name: str = "org/rows") -> None:
    hub.repos[f"{name}@{sha}"] = files


def test_a_set_is_streamed_by_its_files_at_one_commit(hub: Hub) -> None:
    files = {
        "data/train-00000-of-00002.parquet": parquet_of(ROWS[:3000], 200),
        "data/train-00001-of-00002.parquet": parquet_of(ROWS[3000:], 200),
        "data/test-00000-of-00001.parquet": parquet_of(ROWS[:7], 7),
        "README.md": b"about",
    }
    has(hub, files)
    source = opened()
    assert len(source) == 6000
    assert source.where(3001) == (
        f"hf://datasets/org/rows@{SHA}/data/train-00001-of-00002.parquet:2"
    )
    # a commit that comes later is not seen, on this or another machine
    has(hub, dict.fromkeys(files, b"other"), "b" * 40)
    there = pickle.loads(pickle.dumps(source))
    hub.asked.clear()
    assert there.rows(range(4000, 4050)) == ROWS[4000:4050]
    size = len(files["data/train-00001-of-00002.parquet"])
    assert 0 < hub.given() < size * 0.2
    assert b"s3cr3t" not in pickle.dumps(source)
    assert there.rows([0, 2999, 5999]) == [ROWS[0], ROWS[2999], ROWS[5999]]
    data = DataSection.model_validate(
        {"sources": [{"path": "org/rows", "access": "stream"}], "validation": "test"}
    )
    _, held_out = split_validation(open_sources(data, 1), data, 1)
    assert held_out is not None and held_out.rows(range(7)) == ROWS[:7]


def test_the_token_goes_to_the_hub_alone(hub: Hub) -> None:
    has(hub, {"train.jsonl": lines_of(ROWS)})
    source = opened()
    hub.asked.clear()
    assert source.rows([5999]) == ROWS[5999:]
    source.rows([100, 2000])
    token = {"authorization": "Bearer hf_s3cr3t"}.items()
    assert not [a for a in hub.gets("/far/") if token <= a.headers.items()]
    resolved = [asked for asked in hub.asked if "/resolve/" in asked.path]
    # the signed address is used again as long as it is good
    assert len(resolved) <= 1 and hub.gets("/far/")


def test_a_signed_address_that_is_too_old_is_asked_for_again(hub: Hub) -> None:
    has(hub, {"train.jsonl": lines_of(ROWS)})
    source = opened()
    source.rows([1])
    remote_blobs._kept = remote_blobs._Kept()
    remote_ranges._moved.update(
        {url: moved.with_path("/gone") for url, moved in remote_ranges._moved.items()}
    )
    hub.asked.clear()
    assert source.rows([5000]) == ROWS[5000:5001]
    assert [a for a in hub.asked if "/gone" in a.path]
    assert [a.headers.get("authorization") for a in hub.gets("/resolve/")] == ["Bearer hf_s3cr3t"]


def test_subsets_folders_and_splits_are_chosen_as_the_library_does(hub: Hub) -> None:
    files = {
        "README.md": CARD.encode(),
        "chat/a-1.jsonl": lines_of(ROWS[:10]),
        "chat/a-2.jsonl": lines_of(ROWS[10:30]),
        "chat/b.jsonl": lines_of(ROWS[30:35]),
        "essays/x.parquet": parquet_of(ROWS[:40], 10),
    }
    has(hub, files)
    assert opened(name="chat").rows(range(30)) == ROWS[:30]
    assert opened(name="chat", split="test").rows(range(5)) == ROWS[30:35]
    assert opened(name="essays").rows([39]) == ROWS[39:40]
    assert len(opened(data_dir="essays")) == 40
    for wrong, message in [
        ({"name": "chat", "split": "dev"}, "'org/rows' has no split 'dev'; there is: train, test"),
        ({}, r"cannot be asked for 'org/rows' \(ValueError: Config name is missing.*chat"),
        ({"name": "none"}, "none"),
    ]:
        with pytest.raises(RecipeError, match=message) as caught:
            opened(**wrong)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "jsonl.gz"])
def test_other_kinds_of_files_are_streamed_too(hub: Hub, kind: str) -> None:
    body = lines_of(ROWS[:50])
    if kind == "csv":
        body = b"prompt,completion\n" + b"".join(
            f"{row['prompt']},{row['completion']}\n".encode() for row in ROWS[:50]
        )
    has(hub, {f"train.{kind}": gzip.compress(body) if kind.endswith("gz") else body})
    assert opened().rows(range(50)) == ROWS[:50]


def test_auto_copies_a_small_set_and_streams_a_large_one(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(hub, {"train.parquet": parquet_of(ROWS[:100], 50)})
    source = opened("auto")
    assert isinstance(source.readers[0], hub_rows.HubReader)
    assert source.rows(range(100)) == ROWS[:100]
    monkeypatch.setattr(hub_rows, "COPIED_BYTES", 100)
    source = opened("auto")
    assert not isinstance(source.readers[0], hub_rows.HubReader)
    assert source.rows(range(100)) == ROWS[:100]
    assert isinstance(opened("copy").readers[0], hub_rows.HubReader)


def test_a_set_that_is_a_script_is_read_from_what_the_hub_made_of_it(
    hub: Hub, tmp_path: Path
) -> None:
    script = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    has(hub, {"rows.py": script})
    for access in ("stream", "auto", "copy"):
        with pytest.raises(
            RecipeError, match="'org/rows' is a script, which is never run"
        ) as caught:
            opened(access)
        assert "\n" not in str(caught.value)
    has(
        hub,
        {
            "default/train/0000.parquet": parquet_of(ROWS[:30], 10),
            "default/train/0001.parquet": parquet_of(ROWS[30:50], 10),
            "default/test/0000.parquet": parquet_of(ROWS[:3], 10),
        },
        CONVERTED_SHA,
    )
    for access in ("stream", "auto", "copy"):
        assert opened(access).rows(range(50)) == ROWS[:50]
    assert len(opened(split="test")) == 3
    with pytest.raises(RecipeError, match=r"has no default/dev; there is: default/test, default"):
        opened(split="dev")
    assert not (tmp_path / "ran").exists()


def test_what_only_the_library_reads_is_not_streamed(hub: Hub) -> None:
    card = "---\nconfigs:\n- config_name: default\n  data_files: rows.csv\n  sep: '|'\n---\n"
    has(hub, {"README.md": card.encode(), "rows.csv": b"prompt|completion\na|b\nc|d\n"})
    with pytest.raises(
        RecipeError, match="cannot be streamed: its card sets sep; use access: copy"
    ):
        opened()
    assert opened("auto").rows([1]) == [{"prompt": "c", "completion": "d"}]
    has(hub, {"train.jsonl": lines_of(ROWS[:9])}, name="org/plain")
    with pytest.raises(RecipeError, match=r"'train\[:1\]' is a part of a split; use access: copy"):
        opened(split="train[:1]", path="org/plain")


def test_a_set_that_is_not_there_is_one_line(hub: Hub) -> None:
    with pytest.raises(RecipeError, match="the hub cannot be asked for 'org/rows'") as caught:
        opened()
    assert "\n" not in str(caught.value)


def test_a_hub_address_is_read_at_the_commit_of_now(hub: Hub) -> None:
    has(hub, {"data/train.jsonl": lines_of(ROWS)})
    for path in ("hf://datasets/org/rows/data/train.jsonl", "hf://datasets/org/rows/data"):
        source = opened(path=path)
        assert source.rows([4000]) == ROWS[4000:4001]
        assert source.where(0) == f"hf://datasets/org/rows@{SHA}/data/train.jsonl:1"
    hub.repos[f"org/rows@{SHA}"] = {}
    remote_blobs._kept = remote_blobs._Kept()
    remote_ranges._moved.clear()
    with pytest.raises(DataError, match=r"train\.jsonl: cannot be read \(HTTP status 404"):
        source.rows([100])
