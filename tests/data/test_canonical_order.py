"""One sequence of packs for any number of ranks, any restart, any process."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.data.packing import Position
from raytune_ft.data.places import Placed, iter_packs, placed, window_numbers
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed
from tests.data.feeds import (
    COMPAT,
    LONG_ROWS,
    PACKINGS,
    content,
    feed_of,
    fingerprint,
    over_ranks,
    packs_of,
)

ORDERS = list(itertools.product(PACKINGS, LONG_ROWS, [True, False]))


@pytest.mark.parametrize(("pack", "over_length", "shuffle"), ORDERS)
def test_the_sequence_is_one_for_any_number_of_ranks_and_after_any_restart(
    varied: Path, tokenizer: TextTokenizer, pack: str, over_length: str, shuffle: bool
) -> None:
    feed = feed_of(varied, tokenizer, max_length=64, window=7, pack=pack,
                   over_length=over_length, shuffle_before_pack=shuffle)  # fmt: skip
    whole = list(iter_packs(feed, epochs=2))
    sizes = [(1, 8, 1), (2, 2, 2), (1, 2, 4), (1, 1, 8)]  # micro, accumulation, workers
    split = [
        [packs_of(shares) for shares in over_ranks(whole, micro, accumulation, workers)]
        for micro, accumulation, workers in sizes
    ]
    assert max(map(len, split[0])) == 8
    assert sum(map(len, split[0])) == len(whole)
    assert all(other == split[0] for other in split)

    prints = [fingerprint(one) for one in whole]
    windows_made = cache(pickle.loads(pickle.dumps(feed)).window)
    for done, one in enumerate(whole, start=1):
        again = replayed(windows_made, feed.n_windows, one.behind)
        assert [fingerprint(other) for other in again] == prints[done:]


def replayed(make: Any, n_windows: int, start: Position) -> Iterator[Placed]:
    numbers = window_numbers(n_windows, start, 2)
    return placed(((epoch, number, make(epoch, number)) for epoch, number in numbers), start,
                  n_windows)  # fmt: skip


@pytest.mark.parametrize("pack", PACKINGS)
def test_windows_are_the_same_in_any_order_and_process(
    varied: Path, tokenizer: TextTokenizer, pack: str
) -> None:
    def made(feed: Feed, numbers: Iterable[tuple[int, int]]) -> dict[Any, Any]:
        return {at: [content(one) for one in feed.window(*at).packs] for at in numbers}

    settings: dict[str, Any] = {"max_length": 64, "window": 7, "pack": pack, "over_length": "split"}
    feed = feed_of(varied, tokenizer, **settings)
    numbers = [(epoch, number) for epoch in range(2) for number in range(feed.n_windows)]
    travelled = pickle.loads(pickle.dumps(feed))
    assert made(travelled, reversed(numbers)) == made(feed, numbers)


@pytest.mark.parametrize("pack", PACKINGS)
def test_another_epoch_and_another_seed_give_another_order(
    varied: Path, tokenizer: TextTokenizer, pack: str
) -> None:
    feeds = [
        feed_of(varied, tokenizer, seed=seed, max_length=64, window=7, pack=pack)
        for seed in (1, 1, 2)
    ]
    orders = [visited(feed, epoch) for feed in feeds for epoch in (0, 1)]
    assert orders[:2] == orders[2:4]
    distinct = [orders[0], orders[1], orders[4], orders[5]]
    assert all(a != b for a, b in itertools.combinations(distinct, 2))
    firsts = [sorted(feed.order.window_rows(epoch, 0)) for feed in feeds for epoch in (0, 1)]
    assert firsts[0] != firsts[1]  # other rows share a window, not only in another order
    assert firsts[0] != firsts[4]


@pytest.mark.parametrize("pack", ["best_fit", "concat"])
def test_without_shuffling_the_packs_alone_change_their_order(
    varied: Path, tokenizer: TextTokenizer, pack: str
) -> None:
    feed, other = (
        feed_of(varied, tokenizer, seed=seed, max_length=64, window=7, pack=pack,
                shuffle_before_pack=False)
        for seed in (1, 2)
    )  # fmt: skip
    orders = [visited(feed, 0), visited(feed, 1), visited(other, 0)]
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    rows = [feed.order.window_rows(1, number).tolist() for number in range(feed.n_windows)]
    assert list(itertools.chain(*rows)) == list(range(40))


def visited(feed: Feed, epoch: int) -> list[tuple[bytes, ...]]:
    return [content(pack) for number in range(feed.n_windows)
            for pack in feed.window(epoch, number).packs]  # fmt: skip


@pytest.mark.parametrize("compat", [None, COMPAT])
def test_any_position_goes_on_as_the_whole_would(
    chats: Path, tokenizer: TextTokenizer, compat: str | None
) -> None:
    feed = feed_of(chats, tokenizer, window=16, compat=compat)
    whole = list(iter_packs(feed, epochs=3))
    prints = [fingerprint(one) for one in whole]
    assert whole[-1].behind == Position(3, 0, 0)
    for done, one in enumerate(whole, start=1):
        rest = iter_packs(feed, one.behind, epochs=3)
        assert [fingerprint(other) for other in rest] == prints[done:]


def test_without_an_end_the_epochs_go_on(chats: Path, tokenizer: TextTokenizer) -> None:
    feed = feed_of(chats, tokenizer)
    per_epoch = len(list(iter_packs(feed, epochs=1)))
    last = list(islice(iter_packs(feed), 20 * per_epoch + 1))[-1]
    assert last.behind.epoch >= 19
