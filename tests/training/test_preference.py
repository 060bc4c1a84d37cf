"""Steps of preference pairs, from rows to weights: any packing, batch and ranks, one mathematics.

What is expected comes from `plain_loss`, which runs each conversation of each pair alone.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from raytune_ft.chat import ChatModel, open_chat
from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import Pack
from raytune_ft.data.places import Placed, iter_packs
from raytune_ft.model.preference import build_loss
from raytune_ft.training.batching import StepData, steps
from raytune_ft.training.build import build_engine
from raytune_ft.training.engine import Engine, State
from raytune_ft.training.run_folder import RunFolder
from tests import runs
from tests.conftest import WORDS
from tests.model.test_preference_loss import adapted, close, gradients, moved, plain_loss
from tests.ranks import run_ranks
from tests.training import test_load_from
from tests.training.test_worker import cut_back, feed_of, ledger, train

CPU = torch.device("cpu")
BETA = 0.3
OBJECTIVES = ("dpo", "orpo")


def write_pairs(path: Path, rows: int) -> Path:
    """Pairs of ragged lengths: the chosen answer is of reds and rivers, the rejected one is not."""
    random = np.random.default_rng(2)

    def answer(first: str) -> str:
        words = random.choice(WORDS[4:], int(random.integers(1, 6))).tolist()
        return " ".join([first, *words])

    made = [
        {"prompt": f"question {number} about {random.choice(WORDS)}?",
         "chosen": answer(str(random.choice(["red", "river"]))),
         "rejected": answer(str(random.choice(["blue", "stone"])))}
        for number in range(rows)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 24)


def recipe_of(model: Path, rows: Path, objective: str, **changes: Any) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": str(model)},
        "lora": {"r": 4, "alpha": 8, "dropout": changes.pop("dropout", 0.0)},
        "data": {
            "sources": [{"path": str(rows)}], "max_length": 160, "window": 8,
            "pack": changes.pop("pack", True),
        },
        "train": {
            "objective": objective, "beta": BETA, "lr": 1e-2, "deepspeed": "none", "epochs": 1,
            "micro_batch_size": 1, "accumulation": 4, **changes,
        },
        "checkpoint": {"every": 1, "keep": -1},
        "chat_eval": {"every": None},
        "run": {"trackers": []},
    })  # fmt: skip


def placed_of(recipe: Recipe) -> list[Placed]:
    return list(iter_packs(feed_of(recipe), epochs=recipe.train.epochs))


def as_pairs(packs: list[Pack]) -> list[Any]:
    """The conversations of packs, each on its own."""
    sides = [
        (ids.tolist(), labels.tolist())
        for pack in packs
        for ids, labels in zip(
            np.split(pack.input_ids, pack.cu_seqlens[1:-1]),
            np.split(pack.labels, pack.cu_seqlens[1:-1]),
            strict=True,
        )
    ]
    return list(zip(sides[::2], sides[1::2], strict=True))


def float64_model(folder: Path) -> Any:
    from transformers import LlamaForCausalLM

    return adapted(LlamaForCausalLM.from_pretrained(folder).double())


SPLITS = [(1, 4, 1), (4, 1, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)]
"""Micro-batch, accumulation and ranks of four packs."""


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("pack", [True, False], ids=["packed", "single"])
def test_a_step_is_the_mean_over_its_pairs_however_it_is_split(
    tiny_model: Path, rows: Path, objective: str, pack: bool
) -> None:
    """float64, 1e-10; the last step of the epoch is short, and ranks without a pack add zero."""
    model = float64_model(tiny_model)
    reference = copy.deepcopy(model)
    recipe = recipe_of(tiny_model, rows, objective, pack=pack)
    ours = build_loss(model, recipe.train)
    moved(model)
    placed = placed_of(recipe)
    packs = [one.pack for one in placed]
    groups = [packs[i : i + 4] for i in range(0, len(packs), 4)]
    assert len(groups) > 1 and sum(len(as_pairs(group)) for group in groups) == 24
    checked = [0, len(groups) - 1]
    expected = {number: plainly(objective, model, reference, groups[number]) for number in checked}
    for micro, accumulation, ranks in SPLITS:
        train = recipe.train.model_copy(
            update={"micro_batch_size": micro, "accumulation": accumulation}
        )
        shares = [list(steps(placed, train, rank=rank, workers=ranks)) for rank in range(ranks)]
        for number in checked:
            loss, found = summed(ours, model, [share[number] for share in shares])
            assert loss == pytest.approx(expected[number][0], rel=1e-10)
            close(found, expected[number][1], 1e-10)


def plainly(
    objective: str, model: Any, reference: Any, packs: list[Pack]
) -> tuple[float, dict[str, torch.Tensor]]:
    loss = plain_loss(objective, model, reference, as_pairs(packs))
    loss.backward()
    return float(loss.detach()), gradients(model)


def summed(ours: Any, model: Any, shares: list[StepData]) -> tuple[float, dict[str, torch.Tensor]]:
    """Add up what all ranks compute of a step, as engines do."""
    total = 0.0
    for share in shares:
        for batch in share.micro_batches:
            loss, _ = ours(**batch)
            (loss / share.n_targets).backward()
            total += float(loss.detach()) / share.n_targets
    return total, gradients(model)


# Engines: ranks of gloo, ZeRO and plain torch.


def after_steps(recipe: Recipe, folder: Path, rank: int = 0, workers: int = 1) -> State:
    """Train all steps of an epoch; the weights behind them, on rank 0."""
    engine, _ = build_engine(recipe, folder, CPU)
    engine.module.train()
    for data in steps(placed_of(recipe), recipe.train, rank=rank, workers=workers):
        take(engine, data)
    return engine.weights()


def take(engine: Engine, data: StepData) -> None:
    for batch in data.micro_batches:
        engine.forward_backward(batch, data.n_targets)
    assert engine.step(1e-2) is not None


def two_ranks(rank: int, folder: Path, rows: Path, out: Path) -> None:
    """Entry of one of two gloo processes: both objectives, plain and sharded."""
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=2)
    for objective in OBJECTIVES:
        for zero in ("none", "zero2"):
            recipe = recipe_of(folder, rows, objective, accumulation=2, deepspeed=zero)
            weights = after_steps(recipe, folder, rank, 2)
            if rank == 0:
                torch.save(weights, out / f"{objective}_{zero}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_and_zero_train_the_same_weights(tiny_model: Path, tmp_path: Path) -> None:
    """float32: only the order of additions may differ."""
    entry: Callable[..., None] = two_ranks
    rows = write_pairs(tmp_path / "pairs.jsonl", 12)
    run_ranks(entry, (tiny_model, rows, tmp_path), 2)
    for objective in OBJECTIVES:
        one = after_steps(recipe_of(tiny_model, rows, objective, accumulation=4), tiny_model)
        wide = after_steps(
            recipe_of(tiny_model, rows, objective, accumulation=1, micro_batch_size=4), tiny_model
        )
        start = build_engine(recipe_of(tiny_model, rows, objective), tiny_model, CPU)[0].weights()
        for zero in ("none", "zero2"):
            two = torch.load(tmp_path / f"{objective}_{zero}.pt", weights_only=True)
            same(two, one, start)
        same(wide, one, start)


def same(found: State, expected: State, start: State) -> None:
    """Equal to a ten-thousandth of how far training moved."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        way = float((value - start[name]).norm())
        assert float((found[name] - value).norm()) <= 1e-4 * way, name


# Whole runs of a worker.


@pytest.fixture(scope="module", params=OBJECTIVES)
def whole(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, RunFolder]:
    """A run of one worker on forty pairs, dropout on."""
    folder = tmp_path_factory.mktemp(f"whole_{request.param}")
    rows = write_pairs(folder / "pairs.jsonl", 40)
    recipe = recipe_of(tiny_model, rows, request.param, epochs=6, dropout=0.1, lr=2e-2)
    return recipe, train(recipe, folder / "run")


def test_a_run_learns_to_prefer_the_chosen_answers(whole: tuple[Recipe, RunFolder]) -> None:
    recipe, run = whole
    lines = ledger(run)
    first = [line for line in lines if line["epoch"] == 0]
    last = [line for line in lines if line["epoch"] == 5]
    assert sum(len(line["rows"]) for line in first) == len({r for e in first for r in e["rows"]})
    assert sum(len(line["rows"]) for line in first) == 40
    assert 0.2 < lines[0]["rewards_accuracy"] < 0.8
    weighed = [line["rewards_accuracy"] * len(line["rows"]) for line in last]
    assert sum(weighed) / 40 > 0.9
    assert last[-1]["rewards_margin"] > lines[0]["rewards_margin"] + 0.1
    assert last[-1]["loss"] < lines[0]["loss"]
    if recipe.train.objective == "dpo":
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=0.05)


def test_a_run_of_pairs_taken_up_again_ends_with_the_same_bytes(
    whole: tuple[Recipe, RunFolder], tmp_path: Path
) -> None:
    """Also the reference is that of the run's start, not of where it was taken up."""
    recipe, run = whole
    again = train(recipe, cut_back(run, tmp_path / "run", len(ledger(run)) // 2))
    assert ledger(again) == ledger(run)
    weights = "adapter/adapter_model.safetensors"
    assert runs.sha256(again.path / weights) == runs.sha256(run.path / weights)


def test_the_adapter_of_a_run_is_plain_peft_and_chat_has_its_preference(
    whole: tuple[Recipe, RunFolder], tmp_path: Path
) -> None:
    recipe, run = whole
    moved_away = shutil.copytree(run.adapter, tmp_path / "adapter")
    assert all(
        ".lora_A.weight" in name or ".lora_B.weight" in name for name in runs.adapter_of(run.path)
    )
    chats = [open_chat(path, device="cpu") for path in (str(moved_away), recipe.model.path)]
    trained, base = (preference(chat) for chat in chats)
    assert trained > base + 0.15, (trained, base)


def preference(chat: ChatModel) -> float:
    """The share of answers with a red or a river among those that begin with a marked word."""
    prompt = chat.encode([{"role": "user", "content": "question 3 about glass?"}])
    with torch.no_grad():
        chances = chat.model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
    first = {word: chat.tokenizer.encode(word)[0] for word in ("red", "river", "blue", "stone")}
    liked = float(chances[first["red"]] + chances[first["river"]])
    return liked / (liked + float(chances[first["blue"]] + chances[first["stone"]]))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_preferences_after_answers_compare_with_the_run_that_they_begin_with(
    tiny_model: Path, chats: Path, rows: Path, tmp_path: Path, method: str
) -> None:
    """The reference is the trained model, not the base, and stays so where the run is resumed."""
    model = {"path": str(tiny_model), "method": method}
    answers = recipe_of(tiny_model, chats, "sft", max_steps=3)
    answers = Recipe.model_validate({**answers.model_dump(), "model": model})
    sft = test_load_from.train(answers, tmp_path / "answers")
    second = recipe_of(tiny_model, rows, "dpo", max_steps=4, accumulation=2)
    model |= {"load_from": str(sft.path)}
    second = Recipe.model_validate({**second.model_dump(), "model": model})
    dpo = test_load_from.train(second, tmp_path / "preferences")
    first, *_, last = ledger(dpo)
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert first["rewards_margin"] == 0.0 and last["rewards_margin"] > 0.0
    result = "adapter" if method == "lora" else "model"
    before = runs.sha256(next((dpo.path / result).glob("*.safetensors")))
    lines = ledger(dpo)
    shutil.rmtree(dpo.path / result)
    for step in (3, 4):
        shutil.rmtree(dpo.checkpoints / f"step_{step:06d}")
    again = test_load_from.train(second, dpo.path)
    assert ledger(again) == lines
    assert runs.sha256(next((again.path / result).glob("*.safetensors"))) == before
