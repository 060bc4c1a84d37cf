"""The loop: rates by rows visited, and what became of rows, over any resume."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.data.packing import Position
from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed
from raytune_ft.training.batching import TensorBatch, count_targets, steps
from raytune_ft.training.loop import train
from raytune_ft.training.saving.checkpoint import TrainState
from tests.conftest import write_chats
from tests.training.recorded import EPOCHS, Recorder, feed_of, go, quiet_hooks, recipe_of


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(tiny_model)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ninety ragged chats: six windows of 16 rows."""
    return write_chats(tmp_path_factory.mktemp("loop") / "rows.jsonl", 90)


def shares_by_hand(feed: Feed, packs_per_step: int) -> list[float]:
    """Epochs of rows visited behind each step, from the windows: within one, by tokens."""
    found = []
    for epoch in range(EPOCHS):
        done = []
        for number in range(feed.n_windows):
            sizes = [len(pack.input_ids) for pack in feed.window(epoch, number).packs]
            n_rows = len(feed.order.window_rows(epoch, number))
            before = number * feed.order.window
            done += [
                (before + n_rows * sum(sizes[: i + 1]) / sum(sizes)) / feed.order.n_rows
                for i in range(len(sizes))
            ]
        done[-1] = 1.0
        ends = [*range(packs_per_step - 1, len(done), packs_per_step), len(done) - 1]
        found += [epoch + done[i] for i in sorted(set(ends))]
    return found


def closed_formula(ends: list[float], train: Any) -> list[float]:
    """Rates of a cosine with a warm-up, written down again from the docs."""
    ends = [end / EPOCHS for end in ends]
    begins = [0.0, *ends[:-1]]
    if train.max_steps:
        begins = [max(b, i / train.max_steps) for i, b in enumerate(begins)][: train.max_steps]
        ends = [max(e, (i + 1) / train.max_steps) for i, e in enumerate(ends)][: train.max_steps]
    if train.warmup_steps is not None:
        rising = [(i + 1) / train.warmup_steps for i in range(train.warmup_steps)]
    elif train.warmup_ratio:
        rising = [
            min(1.0, end / train.warmup_ratio)
            for begin, end in zip(begins, ends, strict=True)
            if begin < train.warmup_ratio
        ]
    else:
        rising = []
    rising = rising[: len(ends)]
    warm = ends[len(rising) - 1] if rising else 0.0
    falling = [
        (1 + math.cos(math.pi * (begin - warm) / (1 - warm))) / 2 for begin in begins[len(rising) :]
    ]
    return [train.lr * share for share in rising] + [
        train.min_lr + (train.lr - train.min_lr) * share for share in falling
    ]


SCHEDULES: list[dict[str, Any]] = [
    {},
    {"warmup_ratio": 0.13, "min_lr": 1e-5},
    {"warmup_steps": 5},
    {"warmup_steps": 3, "max_steps": 11},
    {"warmup_ratio": 0.2, "max_steps": 7},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("packing", ["best_fit", "concat", "none"])
def test_rates_are_the_closed_formula_for_all_ranks_and_accumulations(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path, schedule: dict[str, Any], packing: str
) -> None:
    """Steps of 4 packs by 1, 2 and 4 ranks, accumulated 4, 2 and 1 times or in one micro-batch."""
    recipe = recipe_of(rows, tiny_model, {"pack": packing}, **schedule)
    feed = feed_of(recipe, tokenizer)
    expected = closed_formula(shares_by_hand(feed, 4), recipe.train)
    for workers, micro, accumulation in [(1, 1, 4), (1, 4, 1), (2, 1, 2), (2, 2, 1), (4, 1, 1)]:
        split = {"micro_batch_size": micro, "accumulation": accumulation}
        divided = recipe.model_copy(update={"train": recipe.train.model_copy(update=split)})
        for rank in {0, workers - 1}:
            found = go(divided, feed, rank=rank, workers=workers)
            assert found.rates == pytest.approx(expected, rel=1e-12)
            assert found.rates[0] > 0.0
            assert [event["lr"] for event in found.steps] == found.rates


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_resume_at_any_step_goes_on_with_the_same_rates_and_counts(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path, schedule: dict[str, Any]
) -> None:
    recipe = recipe_of(rows, tiny_model, {}, **schedule)
    recipe = recipe.model_copy(
        update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 1})}
    )
    feed = feed_of(recipe, tokenizer)
    whole = go(recipe, feed)
    assert len(whole.saved) == len(whole.rates)
    for step, saved in whole.saved.items():
        rest = go(recipe, feed, start=saved)
        assert rest.rates == whole.rates[step:]
        assert rest.state == whole.state
        assert [e["rows"] for e in rest.steps] == [e["rows"] for e in whole.steps[step:]]


def test_the_number_of_ranks_may_change_on_resume(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    """2 -> 1 -> 2 ranks at steps of 4 packs: the ledger of rows is that of one whole run."""
    recipe = recipe_of(rows, tiny_model, {}, warmup_ratio=0.1)
    recipe = recipe.model_copy(
        update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 1})}
    )
    feed = feed_of(recipe, tokenizer)
    whole = go(recipe, feed)
    halves = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"accumulation": 2})}
    )
    first = go(halves, feed, rank=1, workers=2)
    second = go(recipe, feed, start=first.saved[5])
    third = go(halves, feed, rank=0, workers=2, start=second.saved[11])
    ledger = [*first.steps[:5], *second.steps[: 11 - 5], *third.steps]
    for key in ("step", "rows", "lr", "tokens", "targets", "progress"):
        assert [e[key] for e in ledger] == [e[key] for e in whole.steps], key
    # this test's engine knows one rank's loss
    assert replace(third.state, losses=[]) == replace(whole.state, losses=[])


def test_steps_that_were_counted_decide_rates_and_totals(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    recipe = recipe_of(rows, tiny_model, {})
    feed = feed_of(recipe, tokenizer)
    total = len(go(recipe, feed).rates)
    run = go(recipe, feed, total=total)
    expected = [1e-3 * (1 + math.cos(math.pi * step / total)) / 2 for step in range(total)]
    assert run.rates == pytest.approx(expected, rel=1e-12)
    assert {(e["total"], e["exact"]) for e in run.steps} == {(total, True)}


class Counter(Recorder):
    """Notes what each step's gradients are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.divisors: list[list[int]] = [[]]

    def forward_backward(self, batch: TensorBatch, n_targets: int) -> torch.Tensor:
        self.divisors[-1].append(n_targets)
        return super().forward_backward(batch, n_targets)

    def step(self, lr: float) -> float:
        self.divisors.append([])
        return super().step(lr)


def test_ten_packs_by_four_are_three_steps_each_by_its_own_tokens(
    rows: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    recipe = recipe_of(rows, tiny_model, {"pack": "none", "window": 5}, epochs=1)
    feed = feed_of(recipe, tokenizer)
    first = [replace(placed, behind=Position(0, 0, i + 1)) for i, placed in enumerate(
        itertools.islice(iter_packs(feed), 10))]  # fmt: skip
    ten = [*first[:-1], replace(first[-1], behind=Position(1), progress=1.0)]
    counts = [count_targets(placed.pack) for placed in ten]
    engine, state, hooks = Counter(), TrainState(), quiet_hooks()
    batches = steps(ten, recipe.train, rank=0, workers=1)
    train(engine, recipe, batches, state, None, hooks, lambda *_, **__: None)
    assert engine.divisors == [
        [sum(counts[:4])] * 4, [sum(counts[4:8])] * 4, [sum(counts[8:])] * 4, [],
    ]  # fmt: skip
    assert (state.step, state.targets) == (3, sum(counts))


@pytest.fixture
def faulty(tmp_path: Path) -> Path:
    """Whole windows of rows that cannot be used, at the end and in between, and long rows."""
    good = write_chats(tmp_path / "good.jsonl", 40).read_text().splitlines()
    bad = json.dumps({"messages": [{"role": "robot", "content": "\x1b[2J"}]})
    empty = json.dumps({"messages": []})
    long = json.loads(good[0])
    long["messages"][1]["content"] = "red blue " * 90
    lines = [*good[:8], *[bad] * 9, *good[8:20], json.dumps(long), *good[20:], *[empty] * 11]
    path = tmp_path / "faulty.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_rows_are_counted_once_and_told_when_a_kind_of_loss_comes_up(
    faulty: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    """Windows of 4 rows, in the file's order; the last two hold nothing to train on."""
    data = {"on_error": "skip", "window": 4, "shuffle_before_pack": False}
    recipe = recipe_of(faulty, tiny_model, data, accumulation=3)
    recipe = recipe.model_copy(
        update={"checkpoint": recipe.checkpoint.model_copy(update={"every": 1})}
    )
    feed = feed_of(recipe, tokenizer)
    run = go(recipe, feed)
    counted = run.state.rows
    assert (counted["rows"], counted["used"], counted["cut"]) == (61, 41, 1)
    assert counted["dropped"] == {"unusable": 9, "empty": 11}
    assert [place.rpartition(":")[2] for place in counted["places"]["empty"]] == [
        "51", "52", "53", "54", "55",
    ]  # fmt: skip
    assert run.state.pack_tokens == sum(e["tokens"] for e in run.steps if e["epoch"] == 0)
    assert run.state.epoch == EPOCHS

    assert [line.partition(" rows")[0] for line in run.lines[:1]] == ["dropped 9 of 20"]
    assert "\x1b" not in "".join(run.lines)
    assert "cut 1 of" in run.lines[-1]
    last = run.lines[-1]
    assert last.startswith("first epoch: dropped 20 of 61 rows: 9 unusable (first: ")
    assert f"11 empty (first: {faulty}:51)" in last
    assert len(run.lines) <= 4

    for saved in run.saved.values():
        assert go(recipe, feed, start=saved).state.rows == counted


def test_what_splitting_leaves_out_is_told(
    faulty: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    """`max_length` 16 leaves parts of rows in which there is only the question."""
    data = {"on_error": "skip", "max_length": 16, "over_length": "split", "pack": "none"}
    run = go(recipe := recipe_of(faulty, tiny_model, data), feed_of(recipe, tokenizer))
    assert run.state.rows["left_out"] > 0
    assert run.state.rows["tokens"] == run.state.pack_tokens
    told = f"left out {run.state.rows['left_out']:,} tokens of used rows, nothing in them learned"
    assert run.lines[-1].endswith(told)
    assert "; split " in run.lines[-1]


def test_an_epoch_of_rows_to_skip_alone_ends_with_one_line(
    tmp_path: Path, tokenizer: TextTokenizer, tiny_model: Path
) -> None:
    from raytune_ft.errors import DataError

    path = tmp_path / "rows.jsonl"
    question = {"messages": [{"role": "user", "content": "and?"}]}
    answered = [*question["messages"], {"role": "assistant", "content": "yes"}]
    lines = [question] * 3
    path.write_text("".join(json.dumps(line) + "\n" for line in [{"messages": answered}, *lines]))
    recipe = recipe_of(path, tiny_model, {"on_error": "skip", "max_length": 8})
    with pytest.raises(DataError, match="none of 4 rows can be trained on"):
        go(recipe, feed_of(recipe, tokenizer))
