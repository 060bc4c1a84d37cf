"""Rows of different ages side by side get the logits that whole passes over each one give."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from raytune_ft.config.schema import LoraSection
from raytune_ft.model import lanes
from raytune_ft.model.adapter import attach
from raytune_ft.model.capturable import Watch
from raytune_ft.model.lanes import Lane, NotBatchedError
from tests.families.checkpoints import SPECS, make
from tests.families.loaded import load
from tests.model.test_answers import model_of

CLOSE = 1e-5
"""Of the largest logit: float32 adds up in another order, over two layers."""


class Rows:
    """A lane, and what a whole pass needs to know of its rows."""

    def __init__(self, model: nn.Module, size: int = 96, rows: int = 2) -> None:
        self.model, self.words = model.eval(), model.get_input_embeddings().weight.shape[0]  # type: ignore[operator,union-attr]
        self.lane = Lane(model, lanes.probed(model), size, rows)
        self.known: list[list[int]] = []
        self.drawn = random.Random(0)

    def ids(self, n: int) -> list[int]:
        return [self.drawn.randrange(3, min(self.words, 250)) for _ in range(n)]

    def join(self, ids: list[int], kept: lanes.Kept | None = None, n: int = 0) -> None:
        """Run a prompt in two parts and put it into the lane; its last id comes next."""
        cache = lanes.growing(kept, n)
        half = n + (len(ids) - 1 - n) // 2
        for start, end in ((n, half), (half, len(ids) - 1)):
            if end > start:
                lanes.prefill(self.model, cache, ids[start:end], start)
        self.lane.join(lanes.contents(cache), len(ids) - 1)
        self.known.append(ids)

    def begin(self, prompts: list[list[int]], kept: lanes.Kept, n: int) -> None:
        """Run whole prompts in one pass, the first behind `n` tokens that are kept."""
        for place in range(len(prompts)):
            self.lane.join([] if place else kept, 0 if place else n)
        self.lane.extend([ids[0 if place else n : -1] for place, ids in enumerate(prompts)])
        self.known += prompts

    def leave(self, place: int) -> None:
        self.lane.leave(place)
        self.known[place] = self.known[-1]
        self.known.pop()

    def step(self) -> float:
        """Run one token of each row; return the largest difference from whole passes."""
        found = self.lane.decode([ids[-1] for ids in self.known])
        far = 0.0
        for row, ids in zip(found, self.known, strict=True):
            expected = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            far = max(far, float((row - expected).abs().max() / expected.abs().max()))
            ids.append(self.ids(1)[0])
        return far


def come_and_go(model: nn.Module) -> float:
    """Have rows of 3 to 60 tokens join, write, leave and grow a lane; return the difference."""
    far = 0.0
    with torch.no_grad():
        rows = Rows(model)
        for length in (5, 40):
            rows.join(rows.ids(length))
            far = max(far, rows.step(), rows.step())
        rows.lane.grow(6)
        for length in (3, 60, 17):
            rows.join(rows.ids(length))
            far = max(far, rows.step())
        for place in (1, 3, 0):
            rows.leave(place)
            far = max(far, rows.step(), rows.step())
        kept = rows.lane.copy_of(0)
        known = rows.known[0][: kept[0][0].shape[2]]
        rows.join([*known[:4], *rows.ids(9)], kept, 4)
        far = max(far, rows.step())
        rows.leave(0)
        rows.begin([[*known[:4], *rows.ids(9)], rows.ids(30), rows.ids(2)], kept, 4)
        return max(far, *(rows.step() for _ in range(20)))


@pytest.mark.parametrize("kind", ["llama", "alibi", "window", "mixed"])
def test_rows_come_and_go(kind: str) -> None:
    assert come_and_go(model_of(kind)) < CLOSE


@pytest.mark.parametrize("family", SPECS)
def test_every_family(family: str, tmp_path: Path) -> None:
    assert come_and_go(load(make(family, tmp_path / family))) < CLOSE


@pytest.mark.parametrize("kind", ["eager", "nf4", "int8", "lora"])
def test_every_kind_of_base(kind: str, tmp_path: Path) -> None:
    folder = make("llama2_gqa", tmp_path / "model")
    section = {"quantization": kind} if kind in ("nf4", "int8") else {}
    model: Any = load(folder, **section)
    if kind == "eager":
        model.set_attn_implementation("eager")
    if kind == "lora":
        model = attach(model, LoraSection(r=4), seed=1)
        torch.manual_seed(0)
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(weight, std=0.2)
    # int8 scales each row's activations in float16, and NF4 computes in bfloat16
    assert come_and_go(model) < (CLOSE if kind in ("eager", "lora") else 0.05)


def test_a_short_row_beside_a_long_one_keeps_its_nearness() -> None:
    """ALiBi in bfloat16: a bias counted from the end of all keys has no room for small steps."""
    model: Any = model_of("alibi").to(torch.bfloat16)
    with torch.no_grad():
        rows = Rows(model, size=1600)
        for length in (5, 1500):
            rows.join(rows.ids(length))
        assert max(rows.step() for _ in range(3)) < 0.03


def test_a_pass_asks_the_device_for_nothing() -> None:
    """So that it can be captured; and nothing of it is bound to the rows' lengths."""
    rows = Rows(model_of("llama"))
    with torch.no_grad():
        for length in (5, 9):
            rows.join(rows.ids(length))
        rows.lane.decode([3, 4])
        new, index = torch.tensor([[3, 4], [5, 6]]), torch.arange(2)
        for some in (slice(2), None):
            with Watch():
                rows.lane._forward(new, new + 9, index, 32, some)


def test_wrong_masks_and_other_caches_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lanes._Masks.__call__
    monkeypatch.setattr(lanes._Masks, "__call__", lambda s, places, c: right(s, places - 1, c))
    with pytest.raises(NotBatchedError, match="differ from rows alone"):
        lanes.probed(model_of("llama"))
    monkeypatch.undo()
    monkeypatch.setattr(lanes.fixed_cache, "is_growing", lambda _cache: False)
    with pytest.raises(NotBatchedError, match="more than keys and values"):
        lanes.probed(model_of("llama"))


def test_a_lane_that_grows_lets_each_layer_go_before_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else a GPU would hold all keys and values twice."""
    with torch.no_grad():
        rows = Rows(model_of("llama"))
        for length in (5, 9):
            rows.join(rows.ids(length))
        rows.lane.copy_of(0)
        rows.leave(0)
        lane, layers = rows.lane, rows.lane.cache.layers
        former = [StorageWeakRef(one.keys.untyped_storage()) for one in layers]
        seen: list[bool] = []
        monkeypatch.setattr(lane, "close", lambda: seen.extend(ref.expired() for ref in former))
        lane.grow(6)
    assert seen == [True] * len(layers)
