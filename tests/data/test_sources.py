"""Sources: the same rows from every kind of file, places in messages, samples, weights, splits."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import DataSection
from raytune_ft.data import content_hashes
from raytune_ft.data.files import blobs, hub_rows, readers
from raytune_ft.data.sources import RowSource, open_sources, split_validation
from raytune_ft.errors import DataError, RecipeError
from tests.data.conftest import write_jsonl

ROWS = [{"id": i, "text": f"row {i} – 行 🙂"} for i in range(23)]


def opened(*sources: dict[str, Any], seed: int = 1, **data: Any) -> RowSource:
    section = DataSection.model_validate({"sources": list(sources), **data})
    return open_sources(section, seed)


def write_kind(folder: Path, kind: str) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        return write_jsonl(path, ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1, ensure_ascii=False), encoding="utf-8")
        return path
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=5)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_rows_come_in_any_order_from_every_kind_of_file(tmp_path: Path, kind: str) -> None:
    source = opened({"path": str(write_kind(tmp_path, kind))})
    assert len(source) == len(ROWS)
    assert source.rows(range(23)) == ROWS
    order = [22, 0, 7, 7, 4, 5]
    assert pickle.loads(pickle.dumps(source)).rows(order) == [ROWS[i] for i in order]


def test_places_are_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"a": 1}\r\n  \n\n{"a": 2}')
    source = opened({"path": str(path)})
    assert source.rows([0, 1]) == [{"a": 1}, {"a": 2}]
    assert [source.where(0), source.where(1)] == [f"{path}:2", f"{path}:5"]
    array = tmp_path / "b.json"
    array.write_text('[\n{"a":\n1},\n{"a": 2}]')
    source = opened({"path": str(array)})
    assert [source.where(0), source.where(1)] == [f"{array}:2", f"{array}:4"]


@given(
    values=st.lists(
        st.dictionaries(st.text(max_size=3), st.text(max_size=8), max_size=3), min_size=1
    ),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_json_arrays_survive_whatever_they_hold(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[dict[str, str]],
    indent: int | None,
    ascii_only: bool,
) -> None:
    path = tmp_path_factory.mktemp("json") / "x.json"
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    source = opened({"path": str(path)})
    assert source.rows(range(len(source))) == values


def test_lines_across_reading_chunks_stay_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    monkeypatch.setattr(blobs, "CHUNK_BYTES", 7)
    assert opened({"path": str(path)}).rows(range(23)) == ROWS


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a": "x', "not valid JSON"),
        (b"[1]", "the row is a list, not an object"),
        (b"3", "the row is the number 3, not an object"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7"),
        (b'{"a": "\0"}', "NUL bytes"),
        (b"[" * 100_000, "not usable JSON"),
        (b'{"a": "' + b"x" * 400_000 + b'"}', "one row of 0 MiB"),
    ],
)
def test_a_bad_line_is_one_error_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, message: str
) -> None:
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 300_000)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + line + b'\n{"a": 3}\n')
    source = opened({"path": str(path)})
    assert source.rows([0, 2]) == [{"a": 1}, {"a": 3}]
    with pytest.raises(DataError) as caught:
        source.rows([0, 1, 2])
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "the file is empty"),
        ("a.jsonl", b"\n \n", "only blank lines"),
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("a.json", b"[]", "an empty array"),
        ("a.json", b'[{"a": 1},\n{"a": }]', "a.json:2: not valid JSON"),
        ("a.json", b'[{"a": 1},\n', "a.json:2: not valid JSON"),
        ("a.json", b"[{}\n] x", "a.json:2: not valid JSON (Extra data"),
        ("a.json", b'[{"a":\n "\xff"}]', "a.json:2: not UTF-8"),
        ("a.json", b'[{"a": "\0"}]', "NUL bytes"),
        ("a.parquet", b"PAR1 no", "not a Parquet file"),
    ],
)
def test_a_damaged_file_is_one_error(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        opened({"path": str(tmp_path / name)})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_of_json_lines_may_be_called_json(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.json", ROWS)
    assert opened({"path": str(path)}).rows([3]) == [ROWS[3]]


def test_a_folder_gives_the_files_of_its_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "best_replies_train.jsonl", ROWS[:3])
    write_jsonl(tmp_path / "best_replies_eval.jsonl", ROWS[3:4])
    write_jsonl(tmp_path / "constraints.jsonl", ROWS[4:])
    assert len(opened({"path": str(tmp_path)})) == 3
    assert len(opened({"path": str(tmp_path), "split": "eval"})) == 1
    with pytest.raises(RecipeError, match="no file with split 'test'"):
        opened({"path": str(tmp_path), "split": "test"})
    (tmp_path / "best_replies_train.jsonl").unlink()
    assert len(opened({"path": str(tmp_path)})) == 20


def test_a_missing_path_names_its_key_and_the_nearest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    near = write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(RecipeError) as caught:
        opened({"path": str(near)}, {"path": str(tmp_path / "trian.jsonl")})
    assert str(caught.value).startswith("data.sources[1].path: ")
    assert str(caught.value).endswith(f"nearest there: {near}")
    (tmp_path / "a.docx").write_text("a")
    with pytest.raises(RecipeError, match=r"is no \.jsonl, .*\.parquet.* file"):
        opened({"path": str(tmp_path / "a.docx")})
    monkeypatch.chdir(tmp_path)
    assert len(opened({"path": "train.jsonl"})) == 23


def test_a_hub_name_without_network_is_one_line() -> None:
    with pytest.raises(RecipeError, match="does not exist here, and the hub cannot be") as caught:
        opened({"path": "nobody-here/no-such-rows"})
    assert "\n" not in str(caught.value)


def test_a_hub_set_is_asked_for_its_subset_folder_and_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub is the only part that is made up: no test reaches the network."""
    datasets = pytest.importorskip("datasets")
    asked: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, data_dir: str | None, split: str) -> Any:
        asked.append((path, name, data_dir, split))
        rows = ROWS if split == "train" else ROWS[:2]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub_rows.load_hub.cache_clear()
    source = {"path": "org/set-of-tests", "name": "finetune", "data_dir": "data/finetune"}
    data = DataSection.model_validate({"sources": [source], "validation": "test"})
    train, held_out = split_validation(open_sources(data, 1), data, 1)
    assert held_out is not None
    assert asked == [
        ("org/set-of-tests", "finetune", "data/finetune", "train"),
        ("org/set-of-tests", "finetune", "data/finetune", "test"),
    ]
    assert train.rows([22, 0, 0]) == [ROWS[22], ROWS[0], ROWS[0]]
    assert held_out.rows([]) == []
    assert (len(held_out), held_out.where(1)) == (2, "org/set-of-tests/test:2")
    hub_rows.load_hub.cache_clear()


def test_sources_stand_one_after_the_other_with_their_maps(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", ROWS[:4])
    second = write_jsonl(tmp_path / "b.jsonl", ROWS[4:])
    source = opened({"path": str(first), "map": "oasst1_map_fn"}, {"path": str(second)})
    assert source.rows(range(23)) == ROWS
    assert [source.source_of(row).map for row in (3, 4)] == ["oasst1_map_fn", "text"]
    assert [str(found) for found in source.recognised] == [
        "oasst1_map_fn (as data.sources[0].map says)",
        "text (by column text; not read: id)",
    ]
    assert source.where(4) == f"{second}:1"


@pytest.mark.parametrize(("weight", "rows"), [(1, 23), (2, 46), (0.5, 12), (2.25, 52)])
def test_weights_repeat_whole_rows_and_sample_the_rest(
    tmp_path: Path, weight: float, rows: int
) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    source = opened({"path": path, "weight": weight})
    counts = Counter(row["id"] for row in source.rows(range(len(source))))
    assert len(source) == rows
    assert set(counts.values()) <= {int(weight), int(weight) + 1}


def test_a_limit_is_a_sample_that_the_seed_decides(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    samples = [
        [row["id"] for row in opened({"path": path, "limit": 5}, seed=seed).rows(range(5))]
        for seed in (1, 1, 2)
    ]
    assert samples[0] == samples[1] != samples[2]
    assert len(set(samples[0])) == 5
    assert len(opened({"path": path, "limit": 99})) == 23


@given(fraction=st.floats(0.02, 0.9), seed=st.integers(0, 5), weight=st.sampled_from([1, 2.5]))
def test_equal_rows_never_stand_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, fraction: float, seed: int, weight: float
) -> None:
    path = tmp_path_factory.mktemp("split") / "a.jsonl"
    write_jsonl(path, [{"text": f"{i % 10}"} for i in range(30)])
    data = DataSection.model_validate(
        {"sources": [{"path": str(path), "weight": weight}], "validation": fraction}
    )
    source = open_sources(data, seed)
    train, held_out = split_validation(source, data, seed)
    assert held_out is not None
    sides = [{row["text"] for row in side.rows(range(len(side)))} for side in (train, held_out)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 10
    assert len(sides[1]) == max(1, round(fraction * 10))
    assert len(held_out) == 3 * len(sides[1])
    again = split_validation(source, data, seed)[1]
    assert again is not None
    assert again.fingerprint == held_out.fingerprint


def test_validation_may_be_a_file_or_a_split(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ROWS[:20])
    held_out_file = write_jsonl(folder / "eval.jsonl", ROWS[20:])
    for name in ("eval", str(held_out_file)):
        data = DataSection.model_validate(
            {"sources": [{"path": str(folder), "map": "pretrain_map_fn"}], "validation": name}
        )
        train, held_out = split_validation(open_sources(data, 1), data, 1)
        assert held_out is not None
        assert (train.rows(range(20)), held_out.rows(range(3))) == (ROWS[:20], ROWS[20:])
        assert held_out.source_of(0).map == "pretrain_map_fn"


@pytest.mark.parametrize("name", ["eval", "absent.jsonl", 1.0])
def test_validation_that_cannot_be_is_a_recipe_error(tmp_path: Path, name: str | float) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", ROWS))
    data = DataSection.model_validate({"sources": [{"path": path}], "validation": name})
    with pytest.raises(RecipeError, match=r"data\.validation"):
        split_validation(open_sources(data, 1), data, 1)


def test_rows_that_are_written_otherwise_are_equal_and_stay_on_one_side(tmp_path: Path) -> None:
    """C43: spaces, the order of keys, escapes and the kind of file make no other row."""
    rows = [{"text": f"é {n}", "note": str(n)} for n in range(40)]
    spaced = [json.dumps(row, indent=None, separators=(" , ", " : ")) for row in rows]
    turned = [json.dumps(dict(reversed(row.items())), ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*spaced, *turned]), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    sources = [{"path": str(tmp_path / name)} for name in ("a.jsonl", "b.json")]
    for seed in range(5):
        data = DataSection.model_validate({"sources": sources, "validation": 0.3})
        train, held_out = split_validation(open_sources(data, seed), data, seed)
        assert held_out is not None
        sides = [[row["note"] for row in side.rows(range(len(side)))] for side in (train, held_out)]
        assert (len(sides[1]), len(set(sides[1]))) == (36, 12)
        assert not set(sides[0]) & set(sides[1])


def test_contents_are_hashed_once_for_all_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(content_hashes, "_KEPT_ROWS", 0)
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    data = DataSection.model_validate({"sources": [{"path": str(path)}], "validation": 0.5})
    sides = []
    for seed in (1, 1, 2):
        held_out = split_validation(open_sources(data, seed), data, seed)[1]
        assert held_out is not None
        sides.append([row["id"] for row in held_out.rows(range(len(held_out)))])
    assert sides[0] == sides[1] != sides[2]
    assert len(list((tmp_path / "cache").rglob("*.npz"))) == 1


def test_a_fingerprint_tells_rows_and_not_paths(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "x.jsonl", ROWS)
    first, copy = ({"path": str(tmp_path / name / "x.jsonl")} for name in ("a", "b"))
    same = opened(first).fingerprint
    assert (opened(copy).fingerprint, opened(first, seed=2).fingerprint) == (same, same)
    others = [
        opened(first, copy),
        opened({**first, "weight": 2.0}),
        opened({**first, "limit": 5}),
        opened({**first, "limit": 5}, seed=2),
        opened({**first, "weight": 1.5}),
    ]
    write_jsonl(tmp_path / "b" / "x.jsonl", [*ROWS[:22], {"id": 22, "text": "row 22 – 行 🙃"}])
    found = [other.fingerprint for other in [*others, opened(copy)]]
    assert len({same, *found}) == 7


def test_files_of_the_rows_in_hand_are_looked_at(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", ROWS) for name in "abc"]
    source = opened(*({"path": str(path)} for path in paths))
    assert source.local_files() == [str(path.resolve()) for path in paths]
    source.check_unchanged()
    write_jsonl(paths[1], ROWS[::-1])
    source.check_unchanged([0, 22, 46, 68])
    for rows in ([0, 30], None):
        with pytest.raises(DataError, match=r"b\.jsonl: changed since the run began; put"):
            source.check_unchanged(rows)
    with pytest.raises(IndexError, match="no row 69 among 69"):
        source.rows([3, 69])


def test_places_and_data_sets_of_many_rows_are_those_of_each(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", ROWS) for name in "ab"]
    source = opened({"path": str(paths[0]), "weight": 2.5}, {"path": str(paths[1]), "limit": 9})
    rows = [60, 3, 3, 57, 26, 0, 66]
    assert source.places(rows) == [source.where(row) for row in rows]
    assert source.sources_of(rows) == [source.source_of(row) for row in rows]
    assert source.where(3) == source.where(26) == f"{paths[0]}:4"
    ids = [row["id"] for row in source.rows(rows)]
    assert [int(place.rpartition(":")[2]) - 1 for place in source.places(rows)] == ids
