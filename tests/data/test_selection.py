"""Selections: rows by number as in a plain list of numbers, in a fraction of its memory."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import DataSection
from raytune_ft.data import selection as selections
from raytune_ft.data.selection import Listed, Part, Run, Selection, Some
from raytune_ft.data.sources import RowSource, open_sources, split_validation

N_ROWS = 1500


@st.composite
def parts(draw: st.DrawFn) -> tuple[Part, list[int]]:
    """A part of any kind, and its numbers."""
    first = draw(st.integers(0, 1000))
    size = draw(st.integers(1, N_ROWS - first))
    kind = draw(st.sampled_from(["run", "some", "listed"]))
    if kind == "run":
        return Run(first, size), list(range(first, first + size))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    if kind == "listed":
        rows = random.integers(0, N_ROWS, draw(st.integers(1, 30)))
        return Listed(rows), rows.tolist()
    chosen = random.random(size) < draw(st.sampled_from([0.01, 0.5, 1.0]))
    chosen[draw(st.integers(0, size - 1))] = True
    return Some.of(first, chosen), (np.flatnonzero(chosen) + first).tolist()


@given(data=st.data(), drawn=st.lists(parts(), min_size=1, max_size=4), many=st.booleans())
def test_a_selection_is_its_list_of_numbers(
    data: st.DataObject, drawn: list[tuple[Part, list[int]]], many: bool
) -> None:
    numbers = np.array([number for _, part in drawn for number in part])
    chosen = pickle.loads(pickle.dumps(Selection(tuple(part for part, _ in drawn))))
    places = np.array(data.draw(st.lists(st.integers(0, len(numbers) - 1), max_size=30)), int)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selections, "_MANY", 0 if many else 10**6)
        assert len(chosen) == len(numbers)
        assert chosen.numbers(places).tolist() == numbers[places].tolist()
        assert chosen.numbers(np.arange(len(numbers))).tolist() == numbers.tolist()
        assert np.flatnonzero(chosen.used(N_ROWS)).tolist() == sorted(set(numbers.tolist()))
    mask = np.random.default_rng(data.draw(st.integers(0, 9))).random(N_ROWS) < 0.5
    kept = chosen.only(mask)
    assert kept.numbers(np.arange(len(kept))).tolist() == numbers[mask[numbers]].tolist()
    assert len(kept) == len(chosen) or kept.key != chosen.key


@given(data=st.data(), drawn=st.lists(parts(), min_size=1, max_size=3))
def test_rows_between_cuts_ascend_and_pass_no_edge(
    data: st.DataObject, drawn: list[tuple[Part, list[int]]]
) -> None:
    numbers = np.array([number for _, part in drawn for number in part])
    inner = data.draw(st.sets(st.integers(1, N_ROWS - 1), max_size=12))
    edges = np.array([0, *sorted(inner), N_ROWS])
    cuts = Selection(tuple(part for part, _ in drawn)).cuts(edges)
    chunks = np.searchsorted(edges, numbers, side="right")
    breaks = (np.diff(numbers) <= 0) | (np.diff(chunks) != 0)
    assert set((np.flatnonzero(breaks) + 1).tolist()) <= set(cuts.tolist())
    needed = np.flatnonzero(breaks) + 1
    ends = np.cumsum([len(part) for _, part in drawn])
    assert set(cuts.tolist()) == {*needed.tolist(), *ends.tolist()}


@pytest.fixture(scope="module")
def five_million(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "a.jsonl"
    lines = b"".join(b'{"text": "%d"}\n' % n + b"\n" * (n % 50 == 0) for n in range(50_000))
    path.write_bytes(lines * 100)
    return path


@pytest.mark.parametrize(
    "source", [{}, {"weight": 3.0}, {"weight": 1.3}, {"limit": 4_000_000, "weight": 0.7}]
)
def test_five_million_rows_are_small_to_ship(
    five_million: Path, source: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path))
    data = DataSection.model_validate({"sources": [{"path": str(five_million), **source}]})
    rows = open_sources(data, 1)
    flat = pickle.dumps(rows)
    assert len(flat) < 5_000_000
    again: RowSource = pickle.loads(flat)
    wanted = np.random.default_rng(1).integers(0, len(rows), 5).tolist()
    assert again.rows(wanted) == rows.rows(wanted)
    assert again.places(wanted) == rows.places(wanted)
    place = int(again.places([len(rows) - 1])[0].rpartition(":")[2])
    if source.get("weight", 1.0).is_integer():
        assert place == 5_100_000


def test_held_out_rows_are_small_to_ship(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b'{"text": "%d"}\n' % n for n in range(30_000)))
    data = DataSection.model_validate({"sources": [{"path": str(path)}], "validation": 0.1})
    sides = split_validation(open_sources(data, 1), data, 1)
    plain = len(pickle.dumps(open_sources(data, 1)))
    for side, size in zip(sides, (27_000, 3000), strict=True):
        assert side is not None
        assert (len(side), len(pickle.dumps(side)) - plain < 30_000 / 8 + 600) == (size, True)
