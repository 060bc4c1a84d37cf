"""Folders, patterns and packed files: which files are a source's rows."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from raytune_ft.config.schema import DataSection
from raytune_ft.data.files import kept
from raytune_ft.data.sources import open_sources
from raytune_ft.errors import DataError, RecipeError
from tests.data.conftest import write_jsonl
from tests.data.test_readers import (
    ROWS,
    TABLE,
    jsonl_bytes,
    opened,
    rows_of,
    write_csv,
    write_stream,
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("RAYTUNE_CACHE", str(folder))
    return folder


def test_a_saved_data_set_is_its_listed_files(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(ROWS[:20]),
            "test": datasets.Dataset.from_list(ROWS[20:]),
        }
    )
    whole.save_to_disk(tmp_path / "saved", num_shards={"train": 3, "test": 1})
    write_stream(tmp_path / "saved" / "train" / "cache-12ab.arrow", TABLE)
    assert rows_of(tmp_path / "saved") == ROWS[:20]
    assert rows_of(tmp_path / "saved", split="test") == ROWS[20:]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "single")
    assert rows_of(tmp_path / "single") == ROWS


def test_patterns_find_files_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "deep").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "b.jsonl", ROWS[10:12])
    write_jsonl(tmp_path / "data" / "a.jsonl", ROWS[:10])
    write_jsonl(tmp_path / "data" / ".hidden.jsonl", ROWS)
    write_csv(tmp_path / "data" / "deep" / "c.csv", ROWS[12:])
    monkeypatch.chdir(tmp_path)
    assert rows_of("data/*.jsonl") == ROWS[:12]
    assert rows_of("data/**/*.csv") == ROWS[12:]
    assert rows_of("data/**") == ROWS
    assert rows_of(f"{tmp_path}/data/[a]*") == ROWS[:10]
    assert opened("data/*.jsonl").where(0) == "data/a.jsonl:1"
    with pytest.raises(RecipeError, match=r"data\.sources\[0\]\.path: no .* file matches data/\*x"):
        opened("data/*x")


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a[1]?.jsonl", ROWS)
    assert rows_of(path) == ROWS


def test_a_folder_may_hold_its_rows_deeper_and_a_licence(tmp_path: Path) -> None:
    (tmp_path / "data" / "finetune").mkdir(parents=True)
    write_jsonl(tmp_path / "data" / "other.jsonl", ROWS)
    write_jsonl(tmp_path / "data" / "finetune" / "part.jsonl", ROWS[:2])
    (tmp_path / "data" / "finetune" / "LICENSE.txt").write_text("All yours.")
    assert rows_of(tmp_path, data_dir="data/finetune") == ROWS[:2]
    for wrong in ("data/none", "../" + tmp_path.name + "2", ".."):
        with pytest.raises(RecipeError, match=r"data\.sources\[0\]\.data_dir: no folder"):
            opened(tmp_path, data_dir=wrong)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("one\ntwo")
    assert [row["text"] for row in rows_of(tmp_path / "texts")] == ["one", "two"]


def test_a_file_is_unpacked_once_and_again_when_it_changes(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl_bytes(ROWS[:3])))
    for _ in range(2):
        assert rows_of(path) == ROWS[:3]
    assert len(list(own_cache.rglob("a.jsonl"))) == 1
    path.write_bytes(gzip.compress(jsonl_bytes(ROWS)))
    assert rows_of(path) == ROWS
    assert not list(own_cache.rglob(".partial-*"))


def test_a_full_disk_is_one_line_and_leaves_nothing(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "RESERVE_BYTES", 2**62)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl_bytes()))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: needs .* GiB free; make room") as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    assert not [file for file in own_cache.rglob("*") if file.is_file()]


def test_validation_may_be_of_any_kind(tmp_path: Path) -> None:
    from raytune_ft.data.sources import split_validation

    train = write_jsonl(tmp_path / "a.jsonl", ROWS)
    held = tmp_path / "b.csv"
    write_csv(held, [{"question": "x", "answer": "y"}])
    section = {"sources": [{"path": str(train)}]}
    for name in (str(held), f"{tmp_path}/*.csv"):
        data = DataSection.model_validate({**section, "validation": name})
        rows, held_out = split_validation(open_sources(data, 1), data, 1)
        assert held_out is not None
        assert (len(rows), held_out.rows([0])) == (23, [{"question": "x", "answer": "y"}])
        assert held_out.source_of(0).map == "question_answer"
