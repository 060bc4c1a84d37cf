"""Pairs in the stream: never parted, every one once an epoch, whatever ranks, cuts and resumes."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config.schema import DataSection, Recipe, TrainSection
from raytune_ft.data.encode import IGNORE_INDEX, Example, encode_conversation
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Pack, WindowTokens, divide_rows, pack_pieces
from raytune_ft.data.places import iter_packs
from raytune_ft.data.rows.formats import to_pair
from raytune_ft.data.sources import open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, make_feed
from raytune_ft.errors import DataError
from raytune_ft.training.batching import StepData, count_chosen, count_targets, steps
from tests.conftest import WORDS
from tests.data.conftest import write_jsonl
from tests.data.feeds import fingerprint, packs_of, total

EPOCHS = 2


def feed_of(path: Path, tokenizer: TextTokenizer, **data: Any) -> Feed:
    values = {"sources": [{"path": str(path)}], "max_length": 64, "window": 8, **data}
    section = DataSection.model_validate(values)
    encoder = Encoder(tokenizer, "tokenizer", section, "dpo")
    return make_feed(open_sources(section, 1), encoder, 5)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty pairs of all lengths; no two rows share a question, some are over 64 tokens."""
    random = np.random.default_rng(3)

    def words(most: int) -> str:
        return " ".join(random.choice(WORDS, int(random.integers(1, most))).tolist())

    rows = [
        {"prompt": f"{number} {words(4)}", "chosen": words(14), "rejected": words(14)}
        for number in range(40)
    ]
    return write_jsonl(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def example_of(row: int, n_chosen: int, n_rejected: int) -> Example:
    ids = np.arange(n_chosen + n_rejected, dtype=np.int32) + 1000 * row
    labels = ids.copy()
    labels[[0, n_chosen]] = IGNORE_INDEX
    return Example(ids, labels, len(ids), n_chosen)


def sides(pack: Pack) -> list[tuple[int, list[int], list[int]]]:
    """The pairs of a pack as (row, chosen ids, rejected ids); fails where one is parted."""
    ids = np.split(pack.input_ids, pack.cu_seqlens[1:-1])
    rows = pack.row_ids.tolist()
    assert len(ids) == len(rows) and len(rows) % 2 == 0
    assert rows[::2] == rows[1::2], "a pair is two neighbours"
    return [
        (row, chosen.tolist(), rejected.tolist())
        for row, chosen, rejected in zip(rows[::2], ids[::2], ids[1::2], strict=True)
    ]


@given(
    sizes=st.lists(st.tuples(st.integers(2, 20), st.integers(2, 20)), min_size=1, max_size=25),
    packing=st.sampled_from(["best_fit", "none"]),
    left_out=st.sets(st.integers(0, 24)),
)
def test_packing_parts_no_pair(
    sizes: list[tuple[int, int]], packing: str, left_out: set[int]
) -> None:
    data = DataSection.model_validate(
        {"sources": [{"path": "a"}], "max_length": 40, "pack": packing}
    )
    examples = [
        None if row in left_out else example_of(row, *size) for row, size in enumerate(sizes)
    ]
    tokens = WindowTokens.of(examples)
    pieces = divide_rows(tokens.lengths, data)
    laid = pack_pieces(pieces, data, np.random.default_rng(1))
    packs = tokens.packs(laid, np.arange(len(sizes)))
    found = {row: (chosen, rejected) for pack in packs for row, chosen, rejected in sides(pack)}
    assert sum(len(pack.row_ids) for pack in packs) == 2 * len(found)
    expected = {row: one for row, one in enumerate(examples) if one is not None}
    assert found.keys() == expected.keys()
    for row, one in expected.items():
        n = one.n_chosen
        assert found[row] == (one.input_ids[:n].tolist(), one.input_ids[n:].tolist())
    for pack in packs:
        assert len(pack.input_ids) <= 40
        starts = pack.cu_seqlens[:-1]
        assert not pack.position_ids[starts].any()
        assert (pack.labels[starts] == IGNORE_INDEX).all()
        assert pack.n_targets == len(pack.labels) - len(starts)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("over_length", ["cut", "drop"])
def test_every_pair_is_used_once_an_epoch_by_any_number_of_ranks_and_after_any_step(
    pairs: Path, tokenizer: TextTokenizer, packing: str, over_length: str
) -> None:
    feed = feed_of(pairs, tokenizer, pack=packing, over_length=over_length)
    whole = list(iter_packs(feed, epochs=EPOCHS))
    report = total(one for one in whole if one.progress <= 1.0)
    assert (report["cut"] > 0) is (over_length == "cut")
    assert bool(report["dropped"]) is (over_length == "drop")
    assert report["used"] == 40 - sum(report["dropped"].values()) > 20
    seen = Counter(row for one in whole for row, _, _ in sides(one.pack))
    assert set(seen.values()) == {EPOCHS} and len(seen) == report["used"]
    for start in range(0, len(whole), 3):
        later = iter_packs(feed, whole[start].behind, epochs=EPOCHS)
        assert [fingerprint(one) for one in later] == [fingerprint(o) for o in whole[start + 1 :]]
    expected = [step.row_ids for step in next(ranks(whole, 1))]
    for workers in (2, 4):
        together = list(zip(*ranks(whole, workers), strict=True))
        assert [shares[0].row_ids for shares in together] == expected
        packs = [pack for shares in together for pack in packs_of(shares)]
        assert [pack[0] for pack in packs] == [
            one.pack.input_ids.astype(np.int64).tobytes() for one in whole
        ]


def ranks(whole: list[Any], workers: int) -> Any:
    """The steps of each rank."""
    train = TrainSection(micro_batch_size=1, accumulation=4 // workers, objective="dpo")
    for rank, copy in enumerate(itertools.tee(whole, workers)):
        yield list(steps(copy, train, rank=rank, workers=workers))


def test_a_step_knows_its_pairs_and_the_tokens_of_its_answers(
    pairs: Path, tokenizer: TextTokenizer
) -> None:
    whole = list(iter_packs(feed_of(pairs, tokenizer), epochs=1))
    train = TrainSection(micro_batch_size=2, accumulation=2, objective="orpo")
    for rank in (0, 1):
        groups = [whole[i : i + 8] for i in range(0, len(whole), 8)]
        for step, group in zip(steps(whole, train, rank=rank, workers=2), groups, strict=True):
            check_step(step, [one.pack for one in group])


def check_step(step: StepData, packs: list[Pack]) -> None:
    rows = [row for pack in packs for row, _, _ in sides(pack)]
    assert step.row_ids == rows
    assert step.n_targets == sum(count_targets(pack) for pack in packs)
    chosen = 0
    for pack in packs:
        labels = np.split(pack.labels, pack.cu_seqlens[1:-1])
        of_pack = sum(int((part != IGNORE_INDEX).sum()) for part in labels[::2])
        assert count_chosen(pack) == of_pack
        chosen += of_pack
    assert 0 < chosen < step.n_targets
    for batch in step.micro_batches:
        assert batch["pair_weight"].shape == batch["chosen_weight"].shape == ()
        assert float(batch["pair_weight"]) == step.n_targets / len(rows)
        assert float(batch["chosen_weight"]) == step.n_targets / chosen


@pytest.mark.parametrize(
    ("chosen", "rejected", "kept"),
    [(20, 20, (20, 20)), (30, 60, (30, 34)), (60, 30, (34, 30)), (50, 60, (32, 32)),
     (32, 33, (32, 32)), (64, 64, (32, 32))],
)  # fmt: skip
def test_an_over_long_pair_is_cut_at_the_right_and_a_side_takes_what_the_other_leaves(
    tokenizer: TextTokenizer, chosen: int, rejected: int, kept: tuple[int, int]
) -> None:
    section = DataSection.model_validate({"sources": [{"path": "a"}], "max_length": 64})
    encoder = Encoder(tokenizer, "tokenizer", section, "dpo")
    source = section.sources[0].model_copy(update={"map": "preference"})

    def row_of(sizes: tuple[int, int]) -> dict[str, str]:
        return {
            "prompt": "?", "chosen": "x" * sizes[0], "rejected": "z" * sizes[1],
        }  # fmt: skip

    def whole(row: dict[str, str]) -> list[Example]:
        both = to_pair(row, source, section, "row")
        assert both is not None
        template = encoder.bound_template
        return [encode_conversation(side, template, tokenizer) for side in both]

    around = [len(side.input_ids) - 1 for side in whole(row_of((1, 1)))]
    row = row_of((chosen - around[0], rejected - around[1]))
    alone = whole(row)
    assert [len(side.input_ids) for side in alone] == [chosen, rejected]
    found = encoder.encode(row, source, "row")
    assert found is not None
    assert (found.n_chosen, len(found.input_ids) - found.n_chosen) == kept
    assert found.uncut_length == chosen + rejected
    parts = zip(alone, np.split(found.input_ids, [kept[0]]), strict=True)
    assert all(side.input_ids[: len(part)].tolist() == part.tolist() for side, part in parts)
    labels = zip(alone, np.split(found.labels, [kept[0]]), strict=True)
    assert all(side.labels[: len(part)].tolist() == part.tolist() for side, part in labels)


def test_pairs_of_which_a_side_has_nothing_left_to_learn_are_dropped_and_named(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "stone " * 40, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": " "},
        {"prompt": "a", "completion": "b"},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    window = feed_of(path, tokenizer, on_error="skip").window(0, 0)
    assert [row for pack in window.packs for row, _, _ in sides(pack)] == [0]
    assert window.report["dropped"] == {
        "without a trained token": 1, "empty": 1, "unusable": 1,
    }  # fmt: skip
    assert window.report["places"]["without a trained token"] == [f"{path}:2"]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: \d+ tokens, data.max_length is 64"):
        feed_of(path, tokenizer, on_error="skip", over_length="error").window(0, 0)


def test_only_the_last_answer_is_learned(tokenizer: TextTokenizer) -> None:
    section = DataSection.model_validate({"sources": [{"path": "a"}], "max_length": 512})
    encoder = Encoder(tokenizer, "tokenizer", section, "orpo")
    source = section.sources[0].model_copy(update={"map": "preference"})
    turns = [("user", "a"), ("assistant", "earlier"), ("user", "b")]
    shared = [{"role": role, "content": text} for role, text in turns]
    row = {"messages": shared, "chosen": "the better", "rejected": "the worse"}
    found = encoder.encode(row, source, "row")
    assert found is not None
    texts = [
        tokenizer.decode(part[part != IGNORE_INDEX].tolist(), skip_special_tokens=True)
        for part in np.split(found.labels, [found.n_chosen])
    ]
    assert [text.strip() for text in texts] == ["the better", "the worse"]


def test_kept_tokens_give_the_same_packs_and_no_other_objective_takes_them(
    pairs: Path, tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path))
    plain = [fingerprint(one) for one in iter_packs(feed_of(pairs, tokenizer), epochs=EPOCHS)]
    for _ in range(2):
        kept = feed_of(pairs, tokenizer, cache=True)
        assert [fingerprint(one) for one in iter_packs(kept, epochs=EPOCHS)] == plain
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_an_encoder_that_travels_keeps_its_objective(tokenizer: TextTokenizer) -> None:
    section = DataSection.model_validate({"sources": [{"path": "a"}]})
    encoder = Encoder(tokenizer, "tokenizer", section, "orpo")
    assert pickle.loads(pickle.dumps(encoder)).objective == "orpo"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"pack": "concat"}}, "data.pack 'concat' would cut the pairs"),
        ({"data": {"over_length": "split"}}, "data.over_length 'split' would part the pairs"),
        ({"data": {"compat": "xtuner-0.1.9"}}, "data.compat xtuner-0.1.9 had no train.objective"),
        ({"train": {"deepspeed": "zero3"}}, "use zero2, or train.objective: orpo"),
        ({"source": {"loss": "all"}}, r"data.sources\[\].loss 'all' has no meaning"),
    ],
)
def test_settings_that_pairs_cannot_have_are_refused_with_what_to_use_instead(
    changes: dict[str, dict[str, Any]], message: str
) -> None:
    source = {"path": "a.jsonl", **changes.get("source", {})}
    values = {
        "model": {"path": "m"},
        "data": {"sources": [source], **changes.get("data", {})},
        "train": {"objective": "dpo", **changes.get("train", {})},
    }
    with pytest.raises(ValueError, match=message):
        Recipe.model_validate(values)
