"""Ledger: a consumer killed at any instant has used every token of every epoch exactly once.

A process iterates the stream from its last commit, writes down what each step used, and commits
its position as a checkpoint does. It is killed with SIGKILL at random instants and goes on with
another number of ranks. What was written behind a commit does not count: a run cuts it off when it
goes on, as the record of a real one. `--kills=200` runs 200 kills instead of 20.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.config.schema import DataSection
from raytune_ft.data import windows
from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.examples import Encoder, encode_rows
from raytune_ft.data.packing import Position
from raytune_ft.data.places import iter_packs
from raytune_ft.data.sources import RowSource, open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, make_feed
from raytune_ft.errors import DataError
from raytune_ft.training.batching import StepData
from tests.conftest import write_chats
from tests.data.feeds import lone_examples, over_ranks, packs_of

EPOCHS = 3
GLOBAL_BATCH = 8
ROW = 4096
"""Token t of row r has id r * ROW + t: what a batch holds tells where it is from."""

Encoded = Example | DataError | None


def numbered(source: RowSource, encoder: Encoder, rows: Sequence[int]) -> list[Encoded]:
    """Encode rows, then name each token by its row and its place in it."""
    return [
        name_tokens(example, int(row)) if isinstance(example, Example) else example
        for row, example in zip(rows, encode_rows(source, encoder, rows), strict=True)
    ]


def name_tokens(example: Example, row: int) -> Example:
    names = row * ROW + np.arange(len(example.input_ids), dtype=np.int32)
    labels = np.where(example.labels != IGNORE_INDEX, names, IGNORE_INDEX).astype(np.int32)
    return replace(example, input_ids=names, labels=labels)


@dataclass(frozen=True)
class Run:
    """A run's folder: its ledger, a line per step, and its last commit."""

    folder: Path
    feed: Feed

    @property
    def ledger(self) -> Path:
        return self.folder / "ledger.jsonl"

    @property
    def commit_file(self) -> Path:
        return self.folder / "commit.json"

    def committed(self) -> tuple[Position, int]:
        """The position, and how many bytes of the ledger belong to it."""
        if not self.commit_file.exists():
            return Position(), 0
        content = json.loads(self.commit_file.read_text())
        return Position(*content["position"]), content["bytes"]

    def commit(self, position: Position) -> None:
        content = {"position": astuple(position), "bytes": self.ledger.stat().st_size}
        scratch = self.folder / "commit.json.partial"
        scratch.write_text(json.dumps(content))
        scratch.replace(self.commit_file)

    def consume(self, workers: int, commit_every: int) -> None:
        """Go on to the end from the last commit, with so many ranks."""
        start, size = self.committed()
        with self.ledger.open("ab") as file:
            file.truncate(size)
        stream = iter_packs(self.feed, start, epochs=EPOCHS)
        shared = over_ranks(stream, 1, GLOBAL_BATCH // workers, workers)
        for number, shares in enumerate(shared, start=1):
            (position,) = {share.position for share in shares}
            self.write(shares)
            if number % commit_every == 0 or position == Position(EPOCHS):
                self.commit(position)

    def write(self, shares: tuple[StepData, ...]) -> None:
        """Write down a step by what the ranks' batches hold."""
        packs = [np.frombuffer(pack[0], np.int64).tolist() for pack in packs_of(shares)]
        line = {"epoch": shares[0].epoch, "packs": packs, "rows": shares[0].row_ids,
                "left_out": shares[0].report["left_out"]}  # fmt: skip
        with self.ledger.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.ledger.read_text().splitlines()]


def run_in_process(run: Run, workers: int, commit_every: int, kill_after: float | None) -> bool:
    """Consume in a process of its own; tell whether it came to the end before it was killed."""
    process = os.fork()
    if not process:
        try:
            run.consume(workers, commit_every)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def lineage(run: Run, chance: random.Random, seconds: float, kills: int) -> list[Position]:
    """Kill and go on, `kills` times at most, to the end; return where it was killed."""
    places: list[Position] = []
    while True:
        workers = chance.choice([1, 2, 4, 8])
        after = chance.uniform(0, seconds) if len(places) < kills else None
        if run_in_process(run, workers, chance.randint(1, 3), after):
            return places
        places.append(run.committed()[0])


@pytest.fixture
def two_files(tmp_path: Path) -> list[Path]:
    return [write_chats(tmp_path / "a.jsonl", 60), write_chats(tmp_path / "b.jsonl", 41)]


CASES: dict[str, dict[str, Any]] = {
    "best_fit": {},
    "weights": {"weights": (2.0, 0.5)},
    "concat": {"pack": "concat"},
    "split": {"over_length": "split"},
    "pairs": {"objective": "dpo"},
}


def feed_of_case(paths: list[Path], tokenizer: TextTokenizer, case: str) -> Feed:
    changes = dict(CASES[case])
    weights = changes.pop("weights", (1.0, 1.0))
    objective = changes.pop("objective", "sft")
    if objective != "sft":
        paths = [as_pairs(path) for path in paths]
    loss = "all" if objective == "sft" else "last"
    sources = [
        {"path": str(path), "weight": weight, "loss": loss}
        for path, weight in zip(paths, weights, strict=True)
    ]
    sizes = {"split": 24, "pairs": 128}
    values = {"sources": sources, "max_length": sizes.get(case, 64), "window": 16,
              "shuffle_rows": 48, **changes}  # fmt: skip
    data = DataSection.model_validate(values)
    encoder = Encoder(tokenizer, "tokenizer", data, objective)
    return make_feed(open_sources(data, 1), encoder, 5)


def as_pairs(path: Path) -> Path:
    """Give each conversation of a file a shorter answer that is rejected."""
    rows = [json.loads(line)["messages"] for line in path.read_text().splitlines()]
    pairs = [{"chosen": row, "rejected": row[-1]["content"][:5]} for row in rows]
    target = path.with_name(f"pairs_{path.name}")
    target.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return target


@pytest.mark.parametrize("case", CASES)
def test_kills_at_any_instant_neither_repeat_nor_lose_a_token(
    two_files: list[Path],
    tokenizer: TextTokenizer,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    monkeypatch.setattr(windows, "encode_rows", numbered)
    feed = feed_of_case(two_files, tokenizer, case)
    whole, seconds = uninterrupted(feed, tmp_path)
    wanted = max(1, request.config.getoption("--kills") // len(CASES))
    seed = int(os.environ.get("LEDGER_SEED", time.time_ns() % 2**32))
    runs: list[Run] = []
    places: list[Position] = []
    while len(places) < wanted:
        run = Run(tmp_path / f"run_{len(runs)}", feed)
        run.folder.mkdir()
        chance = random.Random(seed + len(runs))
        places += lineage(run, chance, seconds, min(8, wanted - len(places)))
        runs.append(run)
    counts = [count(run) for run in runs]
    repeated, missing = (sum(found) for found in zip(*counts, strict=True))
    by_epoch = [sum(place.epoch == epoch for place in places) for epoch in range(EPOCHS)]
    print(f"\n{case}: {len(places)} kills in {len(runs)} runs (by epoch {by_epoch}), "
          f"LEDGER_SEED={seed}: {repeated} repeated, {missing} missing")  # fmt: skip
    assert (repeated, missing) == (0, 0)
    assert all(run.lines() == whole for run in runs)


def uninterrupted(feed: Feed, tmp_path: Path) -> tuple[list[dict[str, Any]], float]:
    """The ledger of a run that nobody kills, and how long it takes."""
    run = Run(tmp_path / "whole", feed)
    run.folder.mkdir()
    start = time.perf_counter()
    assert run_in_process(run, workers=1, commit_every=2, kill_after=None)
    return run.lines(), time.perf_counter() - start


def count(run: Run) -> tuple[int, int]:
    """Count tokens that were used twice and those never used, over all epochs.

    A stretch in which nothing is learned is left out, and its tokens are counted by the run.
    """
    repeated = missing = 0
    lengths = [len(ids) for ids in lone_examples(run.feed)]
    expected = {row * ROW + place for row, size in enumerate(lengths) for place in range(size)}
    for epoch in range(EPOCHS):
        mine = [line for line in run.lines() if line["epoch"] == epoch]
        used = Counter(token for line in mine for pack in line["packs"] for token in pack)
        repeated += sum(times - 1 for times in used.values())
        missing += len(expected - set(used)) - sum(line["left_out"] for line in mine)
        assert set(used) <= expected
        assert {row for line in mine for row in line["rows"]} == {token // ROW for token in used}
    return repeated, missing


@pytest.mark.parametrize(("read_again", "fault"), [(7, "repeated"), (9, "missing")])
@pytest.mark.parametrize("case", ["best_fit", "concat"])
def test_a_position_that_is_one_pack_off_is_seen(
    two_files: list[Path],
    tokenizer: TextTokenizer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    case: str,
    read_again: int,
    fault: str,
) -> None:
    """A ledger that cannot fail shows nothing: go on one pack before or behind the first step."""
    monkeypatch.setattr(windows, "encode_rows", numbered)
    feed = feed_of_case(two_files, tokenizer, case)
    run = Run(tmp_path, feed)
    stream = list(iter_packs(feed, epochs=EPOCHS))
    for part in (stream[:GLOBAL_BATCH], iter_packs(feed, stream[read_again - 1].behind, epochs=3)):
        for shares in over_ranks(part, 1, GLOBAL_BATCH, 1):
            run.write(shares)
    repeated, missing = count(run)
    assert {"repeated": repeated, "missing": missing}[fault] > 0
