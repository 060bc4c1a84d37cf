"""Held-out loss: the same number whatever the batches, the packing and the number of ranks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.config.schema import LoraSection, ModelSection, Recipe
from raytune_ft.data import sources
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import IGNORE_INDEX, Pack
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed
from raytune_ft.errors import TrainingError
from raytune_ft.model import adapter, loading
from raytune_ft.model.loss import TokenLoss
from raytune_ft.model.preference import build_loss
from raytune_ft.training import presets
from raytune_ft.training.engine import Engine, TorchEngine, ZeroEngine, rank
from raytune_ft.training.evaluating.answering import Voice
from raytune_ft.training.evaluating.validation import batches, held_out_figures
from tests.conftest import write_chats
from tests.ranks import run_ranks
from tests.training import test_preference as preference

CPU = torch.device("cpu")
TOKENS = 192
"""Of a batch: three packs of 64, or many unpacked rows."""


def recipe_of(model: Path, rows: Path, **data: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": str(model)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.5},
        "data": {
            "sources": [{"path": str(rows)}], "max_length": 64, "window": 16,
            "shuffle_before_pack": False, **data,
        },
        "train": {"deepspeed": "none"},
    })  # fmt: skip


def engine_of(recipe: Recipe, dtype: torch.dtype = torch.float32) -> Engine:
    """An adapter with dropout that is not zero, in training mode as between two steps."""
    section = ModelSection(path=recipe.model.path)
    model: Any = loading.load_model(Path(recipe.model.path), section, CPU)
    model = adapter.attach(model, LoraSection(r=4, alpha=8, dropout=0.5), 1)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    module = TokenLoss(model.to(dtype))
    config = presets.resolve(recipe, torch.float32, on_gpu=False)
    engine = (
        TorchEngine(module, CPU, recipe.train)
        if config is None
        else ZeroEngine(module, CPU, recipe.train, config)
    )
    engine.module.train()
    return engine


def packs_of(recipe: Recipe) -> list[Pack]:
    tokenizer = TextTokenizer.from_folder(recipe.model.path)
    source = sources.open_sources(recipe.data, 1)
    feed = make_feed(source, Encoder.of(recipe, tokenizer), 1)
    return [pack for number in range(feed.n_windows) for pack in feed.window(0, number).packs]


def by_hand(engine: Engine, packs: Sequence[Pack]) -> float:
    """Every sample alone through the plain network, without our loss, masks or batches."""
    engine.module.eval()
    total, count = [], 0
    for pack in packs:
        for start, end in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True):
            ids = torch.from_numpy(pack.input_ids[start:end].astype(np.int64))[None]
            labels = torch.from_numpy(pack.labels[start:end].astype(np.int64))
            with torch.no_grad():
                logits = engine.module.model(input_ids=ids).logits[0, :-1].double()
            kept = labels[1:] != IGNORE_INDEX
            losses = nn.functional.cross_entropy(logits[kept], labels[1:][kept], reduction="none")
            total += losses.tolist()
            count += int(kept.sum())
    engine.module.train()
    return math.fsum(total) / count


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("held_out") / "rows.jsonl", 37)


@pytest.mark.parametrize("packing", ["best_fit", "none"])
@pytest.mark.parametrize("tokens", [1, 64, TOKENS, 10_000])
def test_loss_is_that_of_every_token_alone_whatever_the_batches(
    tiny_model: Path, rows: Path, packing: str, tokens: int
) -> None:
    """float64, so that nothing but a wrong weight of a token could differ by more than 1e-12."""
    recipe = recipe_of(tiny_model, rows, pack=packing)
    engine, packs = engine_of(recipe, torch.float64), packs_of(recipe)
    found = held_out_figures(engine, packs, tokens)
    expected = by_hand(engine, packs_of(recipe_of(tiny_model, rows, pack="none")))
    assert found["val_loss"] == pytest.approx(expected, rel=1e-12)
    assert found["val_perplexity"] == pytest.approx(math.exp(expected), rel=1e-11)


def test_asked_twice_it_is_the_same_number_and_training_goes_on_as_before(
    tiny_model: Path, rows: Path
) -> None:
    recipe = recipe_of(tiny_model, rows)
    engine, packs = engine_of(recipe), packs_of(recipe)
    modes = [module.training for module in engine.module.modules()]
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = held_out_figures(engine, packs, TOKENS)
    assert torch.equal(torch.get_rng_state(), state), "dropout is off"
    torch.manual_seed(8)
    assert held_out_figures(engine, packs, TOKENS) == first
    assert [module.training for module in engine.module.modules()] == modes
    assert any(modes)


def test_batches_hold_their_tokens_and_every_pack_once(tiny_model: Path, rows: Path) -> None:
    packs = packs_of(recipe_of(tiny_model, rows, pack="none"))
    for tokens in (1, 64, TOKENS):
        made = list(batches(packs, tokens))
        assert [pack for batch in made for pack in batch] == packs
        for batch in made:
            assert len(batch) == 1 or len(batch) * max(len(p.input_ids) for p in batch) <= tokens
    assert max(len(batch) for batch in made) > 2


def test_nothing_to_measure_is_an_error_and_no_number(tiny_model: Path, rows: Path) -> None:
    engine = engine_of(recipe_of(tiny_model, rows))
    with pytest.raises(TrainingError, match="no token is labelled"):
        held_out_figures(engine, [], TOKENS)


@pytest.mark.parametrize("objective", ["dpo", "orpo"])
def test_held_out_pairs_are_the_mean_over_all_of_them_whatever_the_batches(
    tiny_model: Path, tmp_path: Path, objective: str
) -> None:
    """Against each conversation alone; the weights have moved since the run began."""
    rows = preference.write_pairs(tmp_path / "pairs.jsonl", 9)
    recipe = preference.recipe_of(tiny_model, rows, objective)
    model = preference.float64_model(tiny_model)
    start = copy.deepcopy(model)
    engine = TorchEngine(build_loss(model, recipe.train), CPU, recipe.train)
    preference.moved(model)
    packs = [placed.pack for placed in preference.placed_of(recipe)]
    with torch.no_grad():
        alone = preference.plain_loss(objective, model, start, preference.as_pairs(packs))
    for tokens in (1, 400, 10_000):
        found = held_out_figures(engine, packs, tokens)
        assert found.keys() == {"val_loss", "val_rewards_margin", "val_rewards_accuracy"}
        assert found["val_loss"] == pytest.approx(float(alone), rel=1e-10)
        assert 0.0 <= found["val_rewards_accuracy"] <= 1.0
    assert len(list(batches(packs, 400))) > 1


QUESTIONS = [[5, 6, 7], [11, 12, 13, 14, 15, 16], [40], [21, 22], [60, 61, 62, 63]]


def measured(engine: Engine, packs: list[Pack], voice: Voice) -> dict[str, Any]:
    """All that ranks share: figures of all packs, of two (fewer than ranks), and answers."""
    free = voice.answer(QUESTIONS, 40)
    # what some answers say at different places ends them there
    stops = frozenset({free[0].ids[3], free[1].ids[20]})
    answers = replace(voice, template=SimpleNamespace(stop_ids=stops)).answer(QUESTIONS, 40)
    return {
        "all": held_out_figures(engine, packs, TOKENS),
        "two": held_out_figures(engine, packs[:2], 1),
        "again": held_out_figures(engine, packs, TOKENS),
        "answers": [[answer.ids, answer.stopped] for answer in answers],
    }


def _rank(number: int, model: Path, rows: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    recipe = recipe_of(model, rows)
    packs = packs_of(recipe)
    tokenizer = TextTokenizer.from_folder(model)
    template = get_template("tokenizer", tokenizer)
    for size in (4, 2, 1):
        if number < size:
            store = f"file://{folder}/store_{size}"
            dist.init_process_group("gloo", init_method=store, rank=number, world_size=size)
            engine = engine_of(recipe)
            found = measured(engine, packs, Voice(engine.module.model, tokenizer, template, engine))
            (folder / f"ranks_{size}_{rank()}.json").write_text(json.dumps(found))
            if size == 2:
                sharded = recipe.model_copy(
                    update={"train": recipe.train.model_copy(update={"deepspeed": "zero3"})}
                )
                three = engine_of(sharded)
                voice = Voice(three.module.model, tokenizer, template, three)
                (folder / f"zero3_{rank()}.json").write_text(
                    json.dumps(measured(three, packs, voice))
                )
            dist.barrier()
            dist.destroy_process_group()


def test_every_rank_of_1_2_or_4_tells_the_same_and_so_does_zero_3(
    tiny_model: Path, rows: Path, tmp_path: Path
) -> None:
    run_ranks(_rank, (tiny_model, rows, tmp_path), 4)
    alone = json.loads((tmp_path / "ranks_1_0.json").read_text())
    assert alone["again"] == alone["all"]
    lengths = {len(ids) for ids, _ in alone["answers"]}
    assert len(lengths) > 1, "ranks write answers of differing lengths"
    for size in (2, 4):
        for number in range(size):
            found = json.loads((tmp_path / f"ranks_{size}_{number}.json").read_text())
            assert found["answers"] == alone["answers"]
            for which in ("all", "two", "again"):
                assert found[which] == pytest.approx(alone[which], rel=1e-12, abs=0.0)
    for number in range(2):
        found = json.loads((tmp_path / f"zero3_{number}.json").read_text())
        assert found["answers"] == alone["answers"]
        assert found["all"] == pytest.approx(alone["all"], rel=1e-6)
        assert found["two"] == pytest.approx(alone["two"], rel=1e-6)
