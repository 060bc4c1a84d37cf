"""Readers that come and go: each window is made once, and each row is tokenised once."""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.data import sources
from raytune_ft.data import windows as windows_module
from raytune_ft.data.ahead import AHEAD_WINDOWS, Made
from raytune_ft.data.cache import tokens as cached
from raytune_ft.data.examples import Encoder
from raytune_ft.data.shelf import Shelf
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from tests.data.test_ahead import N_WINDOWS, Maker, read, settled

EPOCHS = 2


def shelf_of(maker: Maker) -> Shelf:
    return Shelf(N_WINDOWS, EPOCHS, 1, maker, maker, at_once=2)


def test_readers_that_come_later_find_what_was_made() -> None:
    maker = Maker()
    shelf = shelf_of(maker)
    expected = [divmod(index, N_WINDOWS) for index in range(EPOCHS * N_WINDOWS)]
    for _ in range(3):
        assert [read(shelf, index) for index in range(EPOCHS * N_WINDOWS)] == expected
    assert maker.made == expected


def test_readers_at_different_places_do_not_disturb_each_other() -> None:
    maker = Maker()
    shelf = shelf_of(maker)
    starts = (7, 0, 13, 3)

    def follow(start: int) -> None:
        for index in range(start, EPOCHS * N_WINDOWS):
            assert read(shelf, index) == divmod(index, N_WINDOWS)

    threads = [threading.Thread(target=follow, args=(start,)) for start in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    settled(shelf)
    assert len(maker.made) == len(set(maker.made)) == EPOCHS * N_WINDOWS


def test_ahead_ends_with_the_epoch() -> None:
    maker = Maker()
    shelf = shelf_of(maker)
    read(shelf, 0)
    assert settled(shelf)["kept"] == list(range(1 + AHEAD_WINDOWS))
    read(shelf, N_WINDOWS - 1)
    assert max(settled(shelf)["kept"]) == N_WINDOWS - 1  # type: ignore[call-overload]


def test_what_is_kept_is_bounded_and_made_again() -> None:
    maker = Maker(size=2)
    shelf = shelf_of(maker)
    shelf.kept_bytes = 8
    for index in range(N_WINDOWS):
        read(shelf, index)
    state = settled(shelf)
    assert state["bytes"] <= 8 + 2 * AHEAD_WINDOWS  # type: ignore[operator]
    assert read(shelf, 0) == (0, 0)
    assert maker.made.count((0, 0)) == 2


def test_a_failure_is_tried_again() -> None:
    shelf = shelf_of(Maker(failures=2))
    assert read(shelf, 0) == (0, 0)


def test_rows_are_tokenised_once_for_all_trials_and_epochs(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path))
    seen: list[int] = []
    for module in (windows_module, cached):
        real = module.encode_rows

        def counting(source: Any, encoder: Any, rows: Any, real: Any = real) -> Any:
            seen.extend(np.asarray(rows).tolist())
            return real(source, encoder, rows)

        monkeypatch.setattr(module, "encode_rows", counting)
    recipe = Recipe.model_validate(
        {
            "model": {"path": str(tiny_model)},
            "data": {
                "sources": [{"path": str(chats)}], "window": 4, "max_length": 96, "cache": True,
            },
        }
    )  # fmt: skip
    rows = sources.open_sources(recipe.data, 0)
    encoder = Encoder.of(recipe, TextTokenizer.from_folder(tiny_model))
    feed = windows_module.make_feed(rows, encoder, 0, None)

    def make(numbers: Sequence[tuple[int, int]]) -> Generator[Made, None, None]:
        for epoch, number in numbers:
            yield feed.window(epoch, number), 1

    shelf = Shelf(feed.n_windows, EPOCHS, 1, make, make, at_once=2)
    assert feed.n_windows > 2
    windows = [[read(shelf, index) for index in range(EPOCHS * feed.n_windows)] for _ in range(3)]
    assert sorted(seen) == list(range(len(rows)))
    assert all(one is other for one, other in zip(windows[0], windows[2], strict=True))
    assert shelf.state()["made"] == EPOCHS * feed.n_windows
