"""Packs of real windows: each row's own tokens, isolated; worth to the model what its pieces are.

Differential: packs against rows encoded alone, loss and gradients of packs against those of their
pieces, a loss with packing against the one without.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.packing import Pack, collate
from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed
from raytune_ft.errors import DataError
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training.batching import count_targets, to_tensors
from tests.conftest import write_chats
from tests.data.conftest import join_examples
from tests.data.feeds import (
    COMPAT,
    feed_of,
    lone_examples,
    measured,
    open_rows,
)


@pytest.mark.parametrize(
    "changes", [{}, {"pack": False}, {"shuffle_before_pack": False}, {"shuffle_rows": 10}]
)
def test_two_epochs_hold_every_row_twice_with_its_own_tokens(
    chats: Path, tokenizer: TextTokenizer, changes: dict[str, Any]
) -> None:
    feed = feed_of(chats, tokenizer, window=16, **changes)
    packs = [placed.pack for placed in iter_packs(feed, epochs=2)]
    seen = Counter(int(row) for pack in packs for row in pack.row_ids)
    assert seen == dict.fromkeys(range(40), 2)
    for pack in packs:
        assert len(pack.input_ids) <= 128
        for sample, row in enumerate(pack.row_ids):
            start, end = pack.cu_seqlens[sample : sample + 2]
            alone = feed.encoder.encode(
                feed.source.rows([row])[0], feed.source.source_of(row), "row"
            )
            assert alone is not None
            assert pack.input_ids[start:end].tolist() == alone.input_ids.tolist()
            assert pack.labels[start:end].tolist() == alone.labels.tolist()
            assert pack.labels[start] == IGNORE_INDEX
            assert pack.position_ids[start:end].tolist() == list(range(end - start))


@pytest.mark.parametrize("pack", ["concat", "best_fit"])
def test_pieces_of_cut_rows_put_together_are_the_rows(
    varied: Path, tokenizer: TextTokenizer, pack: str
) -> None:
    """Each piece is a stretch of its row with positions from 0; together they are all of it."""
    feed = feed_of(varied, tokenizer, max_length=64, window=7, pack=pack, over_length="split",
                   source={"loss": "all"})  # fmt: skip
    alone = lone_examples(feed)
    found: dict[int, list[list[int]]] = {row: [] for row in range(40)}
    for placed in iter_packs(feed, epochs=1):
        one = placed.pack
        assert len(one.input_ids) <= 64
        for row, start, stop in zip(
            one.row_ids.tolist(), one.cu_seqlens[:-1], one.cu_seqlens[1:], strict=True
        ):
            found[row].append(one.input_ids[start:stop].tolist())
            assert one.position_ids[start:stop].tolist() == list(range(stop - start))
    for row, stretches in found.items():
        whole = alone[row].tolist()
        assert sum(map(len, stretches)) == len(whole)
        assert any(
            list(itertools.chain(*order)) == whole for order in orders_from(stretches, whole)
        )


def orders_from(stretches: list[list[int]], whole: list[int]) -> Iterator[list[list[int]]]:
    """Orders of the stretches that begin as the row does, one piece after the other."""
    if not stretches:
        yield []
    for place, first in enumerate(stretches):
        if whole[: len(first)] == first:
            rest = stretches[:place] + stretches[place + 1 :]
            for order in orders_from(rest, whole[len(first) :]):
                yield [first, *order]


def test_compat_packs_hold_the_rows_tokens_end_to_end_as_one_segment(
    chats: Path, tokenizer: TextTokenizer
) -> None:
    feed = feed_of(chats, tokenizer, window=16, compat=COMPAT, shuffle_before_pack=False)
    source = feed.source
    alone = [feed.encoder.encode(row, source.source_of(0), "row") for row in source.rows(range(40))]
    examples = [example for example in alone if example is not None]
    ids, labels = (
        np.concatenate([getattr(example, key) for example in examples])
        for key in ("input_ids", "labels")
    )
    packs = [placed.pack for placed in iter_packs(feed, epochs=1)]
    packs.sort(key=lambda pack: int(pack.row_ids[0]))
    used = len(packs) * 128
    assert feed.plan is not None
    assert len(ids) - used == feed.plan.lost_tokens < 128
    assert np.concatenate([pack.input_ids for pack in packs]).tolist() == ids[:used].tolist()
    assert np.concatenate([pack.labels for pack in packs]).tolist() == labels[:used].tolist()
    for pack in packs:
        assert pack.cu_seqlens.tolist() == [0, 128]
        assert pack.position_ids.tolist() == list(range(128))
    assert any(pack.input_ids[0] not in tokenizer.bos_ids for pack in packs)  # a row was cut


def test_under_compat_a_row_without_a_trained_token_stays_in_the_packs(
    mixed: Path, tokenizer: TextTokenizer
) -> None:
    source, encoder, _ = open_rows(mixed, tokenizer, on_error="skip", compat=COMPAT)
    got = measured(source, encoder)
    assert "without a trained token" not in got.report["dropped"]
    assert (got.lengths[2], got.targets[2]) == (128, 0)


def test_under_compat_a_file_that_changed_since_it_was_counted_is_noticed(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    path = write_chats(tmp_path / "a.jsonl", 40)
    before = feed_of(path, tokenizer, compat=COMPAT)
    path.write_text(path.read_text().replace("question", "quest"))
    source, encoder, _ = open_rows(path, tokenizer, compat=COMPAT)
    changed = Feed(source, encoder, before.seed, before.order, before.plan)
    with pytest.raises(DataError, match="changed since the rows were counted"):
        list(iter_packs(changed, epochs=1))


@pytest.mark.parametrize(
    ("pack", "over_length"), [("best_fit", "cut"), ("best_fit", "split"), ("concat", "cut")]
)
def test_loss_and_gradients_of_packs_are_the_sum_of_those_of_their_pieces(
    varied: Path, tokenizer: TextTokenizer, pack: str, over_length: str
) -> None:
    """float64: values and gradients differ by the order of additions only."""
    feed = feed_of(varied, tokenizer, max_length=64, window=12, pack=pack,
                   over_length=over_length)  # fmt: skip
    model = tiny_llama()
    made = [one for number in range(feed.n_windows) for one in feed.window(0, number).packs]
    packs = sorted(made, key=lambda one: -len(one.row_ids))[:4]
    assert sum(len(one.row_ids) for one in packs) > len(packs)
    together = loss_and_gradients(model, [packs])
    alone = loss_and_gradients(model, [[piece] for one in packs for piece in apart(one)])
    assert together[1] == alone[1] == sum(count_targets(one) for one in packs)
    torch.testing.assert_close(together[0], alone[0], rtol=0, atol=1e-9)
    for name, gradient in together[2].items():
        torch.testing.assert_close(gradient, alone[2][name], rtol=0, atol=1e-9)


def apart(pack: Pack) -> list[Pack]:
    """The pieces of a pack as packs of their own, positions from 0 and labels as they are."""
    borders = itertools.pairwise(pack.cu_seqlens.tolist())
    return [
        join_examples([Example(pack.input_ids[a:b], pack.labels[a:b], b - a)], [row])
        for row, (a, b) in zip(pack.row_ids.tolist(), borders, strict=True)
    ]


def tiny_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "max_position_embeddings": 256}  # fmt: skip
    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**shape)).double()
    return model


def loss_and_gradients(
    model: torch.nn.Module, batches: Iterable[list[Pack]]
) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    loss, count = torch.zeros((), dtype=torch.float64), 0
    for packs in batches:
        part, targets = TokenLoss(model)(**to_tensors(collate(packs)))
        part.backward()
        loss, count = loss + part.detach(), count + int(targets)
    named = model.named_parameters()
    return loss, count, {name: p.grad.clone() for name, p in named if p.grad is not None}


def test_validation_loss_is_the_same_with_packing_on_and_off(
    varied: Path, tokenizer: TextTokenizer
) -> None:
    """The mean over labelled tokens knows nothing of packs, windows or padding."""
    model = tiny_llama()
    losses = []
    for pack, window, size in (("best_fit", 40, 4), ("none", 40, 5), ("best_fit", 7, 1)):
        feed = feed_of(varied, tokenizer, max_length=64, window=window, pack=pack)
        packs = [one.pack for one in iter_packs(feed, epochs=1)]
        batches = [packs[start : start + size] for start in range(0, len(packs), size)]
        with torch.no_grad():
            parts = [TokenLoss(model)(**to_tensors(collate(batch))) for batch in batches]
        losses.append((float(sum(p for p, _ in parts)), sum(int(n) for _, n in parts)))
    assert losses[0][1] == losses[1][1] == losses[2][1] > 200
    assert [loss for loss, _ in losses] == pytest.approx([losses[0][0]] * 3, rel=1e-12)
