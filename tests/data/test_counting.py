"""Counting: packs of an epoch from the first windows, or exactly from the sizes of all rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from raytune_ft.config.schema import Recipe
from raytune_ft.data.counting import count_packs, estimate
from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.training.batching import steps
from tests.conftest import write_chats
from tests.data.conftest import chat, write_jsonl
from tests.data.feeds import COMPAT, PACKINGS, feed_of, measured


@pytest.mark.parametrize("pack", PACKINGS)
@pytest.mark.parametrize("window", [7, 64])
def test_sizes_of_all_rows_give_the_exact_number_of_packs(
    chats: Path, tokenizer: TextTokenizer, pack: str, window: int
) -> None:
    feed = feed_of(chats, tokenizer, pack=pack, window=window, max_length=64)
    sizes = measured(feed.source, feed.encoder)
    for epoch in range(3):
        made = sum(len(feed.window(epoch, number).packs) for number in range(feed.n_windows))
        assert count_packs(feed, sizes, epoch) == made


def test_a_short_file_is_counted_exactly(chats: Path, tokenizer: TextTokenizer) -> None:
    feed = feed_of(chats, tokenizer, window=20)
    packs = list(iter_packs(feed, epochs=1))
    seen = estimate(feed)
    assert (seen.exact, seen.packs) == (True, len(packs))
    tokens = sum(len(one.pack.input_ids) for one in packs)
    assert seen.density == pytest.approx(tokens / (len(packs) * 128))
    assert (seen.report["rows"], seen.report["used"]) == (40, 40)
    assert seen.report["tokens"] == tokens


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_first_two_windows_tell_of_a_long_file(
    tmp_path: Path, tokenizer: TextTokenizer, shuffle: bool
) -> None:
    path = write_chats(tmp_path / "long.jsonl", 1500)
    feed = feed_of(path, tokenizer, window=100, shuffle_before_pack=shuffle)
    seen = estimate(feed)
    assert (seen.exact, len(seen.windows), seen.report["rows"]) == (False, 2, 200)
    assert seen.packs == pytest.approx(len(list(iter_packs(feed, epochs=1))), rel=0.05)


def test_windows_are_made_until_there_is_a_pack(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    """A file that begins with rows without an answer is no file without answers."""
    rows = [{"messages": chat("Q", "A" if number >= 45 else " ")} for number in range(50)]
    path = write_jsonl(tmp_path / "late.jsonl", rows)
    feed = feed_of(path, tokenizer, window=10, shuffle_before_pack=False, pack="none")
    seen = estimate(feed)
    assert (len(seen.windows), seen.packs, seen.exact) == (5, 5, True)


def test_rows_without_any_answer_are_zero_packs(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    path = write_jsonl(tmp_path / "none.jsonl", [{"messages": chat("Q", " ")}] * 30)
    seen = estimate(feed_of(path, tokenizer, window=10))
    assert (seen.packs, seen.exact, seen.density) == (0, True, 0.0)
    assert seen.report["dropped"] == {"empty": 30}


def test_under_compat_the_packs_are_known(chats: Path, tokenizer: TextTokenizer) -> None:
    feed = feed_of(chats, tokenizer, compat=COMPAT, window=8)
    seen = estimate(feed)
    assert (seen.exact, seen.packs) == (True, len(list(iter_packs(feed, epochs=1))))


def test_steps_end_with_each_epoch_and_at_the_most_that_is_asked_for(
    chats: Path, tokenizer: TextTokenizer
) -> None:
    seen = estimate(feed_of(chats, tokenizer, pack="none"))
    assert seen.packs == 40

    def steps(**train: int) -> int:
        values = {"epochs": 3, "micro_batch_size": 2, "accumulation": 4, **train}
        recipe = Recipe.model_validate(
            {"model": {"path": "x"}, "data": {"sources": [{"path": "x"}]}, "train": values}
        )
        return seen.steps(recipe)

    assert steps() == 3 * int(np.ceil(40 / 8))
    assert steps(accumulation=8) == 3 * 3
    assert (steps(max_steps=4), steps(max_steps=400)) == (4, 15)


@pytest.mark.parametrize("pack", PACKINGS)
@pytest.mark.parametrize("window", [7, 20, 64])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("over_length", ["cut", "split", "drop"])
def test_steps_that_are_called_sure_are_those_of_the_run(
    chats: Path, tokenizer: TextTokenizer, pack: str, window: int, shuffle: bool, over_length: str
) -> None:
    """Forty rows: one window of 64, two of 20, more of 7."""
    data = {"pack": pack, "window": window, "shuffle_before_pack": shuffle, "max_length": 48}
    feed = feed_of(chats, tokenizer, over_length=over_length, **data)
    seen, told = estimate(feed), []
    for epochs in (1, 3):
        recipe = Recipe.model_validate({
            "model": {"path": "m"}, "data": {"sources": [{"path": str(chats)}], **data},
            "train": {"epochs": epochs, "accumulation": 3},
        })  # fmt: skip
        told.append(seen.steps_are_sure(recipe))
        if told[-1]:
            packs = list(iter_packs(feed, epochs=epochs))
            made = list(steps(packs, recipe.train, rank=0, workers=1))
            assert seen.steps(recipe) == len(made)
    same_in_each_epoch = not shuffle or pack == "none" or (pack == "best_fit" and window == 64)
    assert told == [window != 7, window != 7 and same_in_each_epoch]
