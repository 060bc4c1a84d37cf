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

from raytune_ft.config.schema import TrainSection
from raytune_ft.data.encode import IGNORE_INDEX
from raytune_ft.data.packing import Position
from raytune_ft.data.places import Placed, iter_packs, placed, window_numbers
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed
from raytune_ft.training.batching import StepData, steps
from tests.data.feeds import (
    COMPAT,
    LONG_ROWS,
    PACKINGS,
    content,
    feed_of,
    fingerprint,
)


def by_ranks(
    placed: Iterable[Placed], train: TrainSection, workers: int
) -> list[tuple[tuple[bytes, ...], ...]]:
    """Each step's packs in their order, put together from what every rank was given."""
    copies = itertools.tee(placed, workers)
    ranks = [steps(copy, train, rank=rank, workers=workers) for rank, copy in enumerate(copies)]
    return [tuple(in_order(shares)) for shares in zip(*ranks, strict=True)]


def in_order(shares: tuple[StepData, ...]) -> Iterator[tuple[bytes, ...]]:
    """Take packs from each rank in turn; a rank without one has rows without labels."""
    rows = [rows_of(share) for share in shares]
    for turn in itertools.zip_longest(*rows):
        yield from (row for row in turn if row is not None)


def rows_of(share: StepData) -> list[tuple[bytes, ...]]:
    """Take the packs out of a rank's batches, without padding."""
    keys = ("input_ids", "labels", "position_ids", "segment_ids")
    found = []
    for batch in share.micro_batches:
        for row in range(len(batch["labels"])):
            if bool((batch["labels"][row] != IGNORE_INDEX).any()):
                real = batch["segment_ids"][row] >= 0
                found.append(tuple(batch[key][row][real].numpy().tobytes() for key in keys))
    return found


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
        by_ranks(whole, TrainSection(micro_batch_size=micro, accumulation=count), workers)
        for micro, count, workers in sizes
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
    feed = feed_of(varied, tokenizer, max_length=64, window=7, pack=pack,
                   shuffle_before_pack=False)  # fmt: skip
    orders = [visited(feed, epoch) for epoch in (0, 1)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])
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
