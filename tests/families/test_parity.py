"""Every family loaded from its original layout gives the logits of an independent network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from raytune_ft.model.generate import stream_ids
from raytune_ft.model.loss import Attention, TokenLoss
from tests.families.checkpoints import SPECS, WINDOW, Weights, weights_of
from tests.families.conftest import Checkpoint, Loaded
from tests.families.loaded import TOLERANCE, difference, load, logits, random_ids
from tests.families.oracles import greedy, logits_of

pytestmark = pytest.mark.families

FAMILIES = tuple(SPECS)
WORDS = 300
"""Ids are drawn below this: all families know as many."""
LENGTHS = (17, 11)


def expected(family: str, ids: Tensor) -> Tensor:
    return logits_of(family, SPECS[family].config, weights_of(family), ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_independent_network(family: str, loaded: Loaded) -> None:
    model = loaded(family)
    ids = random_ids(WORDS, 2, 17)
    ours = logits(model, ids)
    wanted = torch.stack([expected(family, row) for row in ids])
    assert wanted.abs().max() > 0.5, "logits this small would hide a wrong tensor"
    assert difference(ours, wanted) <= TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(
    family: str, side: Literal["left", "right"], loaded: Loaded
) -> None:
    """Two samples of 17 and 11 tokens in one batch; padded places are not compared."""
    model = loaded(family)
    ids, mask = torch.zeros(2, 17, dtype=torch.long), torch.zeros(2, 17, dtype=torch.long)
    places = [slice(17 - n, 17) if side == "left" else slice(0, n) for n in LENGTHS]
    for row, (n, place) in enumerate(zip(LENGTHS, places, strict=True)):
        ids[row, place] = random_ids(WORDS, n, seed=row)
        mask[row, place] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours = logits(model, ids, attention_mask=mask, position_ids=positions)
    for row, place in enumerate(places):
        assert difference(ours[row, place], expected(family, ids[row, place])) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_samples_do_not_see_each_other(family: str, loaded: Loaded) -> None:
    """Logits and loss of packs equal those of each sample alone, through the loss's own mask."""
    model = loaded(family)
    packs = ((9, 12, 5), (10, 3))
    ids = torch.zeros(2, 26, dtype=torch.long)
    segments, positions = torch.full_like(ids, -1), torch.zeros_like(ids)
    samples = []
    for row, lengths in enumerate(packs):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        for number, (n, end) in enumerate(zip(lengths, ends, strict=True)):
            place = slice(end - n, end)
            ids[row, place] = random_ids(WORDS, n, seed=10 * row + number)
            segments[row, place], positions[row, place] = number, torch.arange(n)
            samples.append((row, place))

    mask = Attention(model.config).mask(segments)
    ours = logits(model, ids, attention_mask=mask, position_ids=positions)
    total = torch.zeros((), dtype=torch.float64)
    for row, place in samples:
        wanted = expected(family, ids[row, place])
        assert difference(ours[row, place], wanted) <= TOLERANCE
        total += cross_entropy(wanted[:-1], ids[row, place][1:], reduction="sum")

    labels = ids.masked_fill(segments < 0, -100)
    loss, count = TokenLoss(model)(ids, labels, positions, segments)
    assert int(count) == sum(n - 1 for lengths in packs for n in lengths)
    assert float(loss) == pytest.approx(float(total), rel=TOLERANCE)


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache_equals_generation_without(family: str, loaded: Loaded) -> None:
    """14 greedy tokens, over the sliding window's length, against whole forward passes."""
    prompt = random_ids(WORDS, 5).tolist()
    model = loaded(family)
    ours = list(stream_ids(model, prompt, stop_ids=(), max_new_tokens=14))
    wanted = greedy(family, SPECS[family].config, weights_of(family), prompt, 14)
    assert ours == wanted


def test_the_sliding_window_is_used(checkpoint: Checkpoint) -> None:
    """Past it the first token counts no longer: with one layer, two rows that differ there meet."""
    model = load(checkpoint("mistral", num_hidden_layers=1))
    ids = random_ids(WORDS, 1, WINDOW + 4).repeat(2, 1)
    ids[1, 0] += 1
    first, second = logits(model, ids)
    assert difference(first[WINDOW - 1], second[WINDOW - 1]) > 1e-3
    assert difference(first[WINDOW:], second[WINDOW:]) <= TOLERANCE


# Controls: what a wrong reading of the file would look like must not pass for the right one.


def swapped(first: str, second: str) -> Callable[[Weights], Weights]:
    """Swap the tensors whose names hold `first` with those that hold `second`."""

    def edit(weights: Weights) -> Weights:
        def other(name: str) -> str:
            return name.replace(first, second) if first in name else name.replace(second, first)

        return {name: weights[other(name)] for name in weights}

    return edit


def exchanged(part: str, a: slice, b: slice) -> Callable[[Weights], Weights]:
    """Exchange two runs of rows inside the fused tensors whose names hold `part`."""

    def edit(weights: Weights) -> Weights:
        result = dict(weights)
        for name, tensor in weights.items():
            if part in name:
                result[name] = tensor.clone()
                result[name][a], result[name][b] = tensor[b], tensor[a]
        return result

    return edit


CONTROLS: dict[str, tuple[str, Callable[[Weights], Weights]]] = {
    "internlm q, k": ("internlm_7b", swapped("q_proj", "k_proj")),
    "internlm gate, up": ("internlm_20b", swapped("gate_proj", "up_proj")),
    "llama q, k": ("llama", swapped("q_proj", "k_proj")),
    "llama 2 k, v": ("llama2_gqa", swapped("k_proj", "v_proj")),
    "mistral k, v": ("mistral", swapped("k_proj", "v_proj")),
    "zephyr gate, up": ("zephyr", swapped("gate_proj", "up_proj")),
    "chatglm2 k, v": ("chatglm2", exchanged("query_key", slice(64, 96), slice(96, 128))),
    "chatglm3 gate, up": ("chatglm3", exchanged("h_to_4h", slice(0, 128), slice(128, 256))),
    "qwen w1, w2": ("qwen", swapped("w1", "w2")),
    "qwen q, k": ("qwen_aug", exchanged("c_attn", slice(0, 64), slice(64, 128))),
    "baichuan q, k": ("baichuan_7b", exchanged("W_pack", slice(0, 64), slice(64, 128))),
    "baichuan2 k, v": ("baichuan2_7b", exchanged("W_pack", slice(32, 64), slice(64, 96))),
    "baichuan 13b q, k": ("baichuan_13b", exchanged("W_pack", slice(0, 80), slice(80, 160))),
    "baichuan2 13b q, v": ("baichuan2_13b", exchanged("W_pack", slice(0, 40), slice(80, 120))),
    "yi ln1, ln2": ("yi_first", swapped("ln1", "ln2")),
    "yi k, v": ("yi_later", swapped("k_proj", "v_proj")),
    "starcoder k, v": ("starcoder", exchanged("c_attn", slice(64, 80), slice(80, 96))),
}


@pytest.mark.parametrize("control", CONTROLS)
def test_a_swapped_tensor_shows(control: str, checkpoint: Checkpoint) -> None:
    family, edit = CONTROLS[control]
    ids = random_ids(WORDS, 17)
    model: Any = load(checkpoint(family, edit=edit))
    assert difference(logits(model, ids)[0], expected(family, ids)) > 1000 * TOLERANCE
