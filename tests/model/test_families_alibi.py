"""Baichuan-13B's linear attention biases, against a forward pass written from their description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.model.families.alibi import biased_mask, slopes
from raytune_ft.model.generate import stream_ids
from raytune_ft.model.loss import TokenLoss
from tests.model.families import HEADS, HIDDEN, LAYERS, make, tensors
from tests.model.test_families_files import load

WIDTH = HIDDEN // HEADS
IDS = torch.randint(3, 64000, (19,), generator=torch.Generator().manual_seed(4))


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight


def oracle(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of ids (n,): 4 heads with slopes 1/4, 1/16, 1/64 and 1/256."""
    n = len(ids)
    x = weights["model.embed_tokens.weight"][ids]
    steps = torch.arange(n)
    bias = 0.25 ** torch.arange(1, 5).view(4, 1, 1) * (steps - steps[:, None])
    bias = bias.masked_fill(steps > steps[:, None], -torch.inf)
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        h = rms(x, weights[at + "input_layernorm.weight"])
        packed = (h @ weights[at + "self_attn.W_pack.weight"].T).view(n, 3, HEADS, WIDTH)
        q, k, v = packed.permute(1, 2, 0, 3)
        seen = (q @ k.transpose(1, 2) / WIDTH**0.5 + bias).softmax(-1) @ v
        x = x + seen.transpose(0, 1).reshape(n, HIDDEN) @ weights[at + "self_attn.o_proj.weight"].T
        h = rms(x, weights[at + "post_attention_layernorm.weight"])
        gate = nn.functional.silu(h @ weights[at + "mlp.gate_proj.weight"].T)
        up = h @ weights[at + "mlp.up_proj.weight"].T
        x = x + (gate * up) @ weights[at + "mlp.down_proj.weight"].T
    return rms(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("baichuan-13b", tmp_path_factory.mktemp("alibi") / "base")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return load(folder)


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return oracle(tensors("baichuan-13b"), IDS)


def close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """float32, logits of a few units."""
    assert wanted.abs().max() > 1
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def test_slopes_of_forty_heads_in_closed_form() -> None:
    """32 from the series of 32 heads, 8 from every second of 64."""
    found = slopes(40)
    assert found[:32] == [2 ** (-(i + 1) / 4) for i in range(32)]
    assert found[32:] == [2 ** (-(2 * i + 1) / 8) for i in range(8)]
    assert slopes(8) == [2.0**-i for i in range(1, 9)]
    assert len(slopes(5)) == 5
    assert slopes(5)[4] == 2**-1.0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_those_of_the_oracle(
    folder: Path, expected: torch.Tensor, attention: str
) -> None:
    model = load(folder)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        close(model(IDS.unsqueeze(0)).logits[0], expected)


def test_padding_on_either_side_changes_nothing(model: Any, expected: torch.Tensor) -> None:
    pad = torch.zeros(5, dtype=torch.long)
    rows = torch.stack([torch.cat([pad, IDS]), torch.cat([IDS, pad])])
    seen = torch.ones_like(rows)
    seen[0, :5] = seen[1, -5:] = 0
    with torch.no_grad():
        logits = model(rows, attention_mask=seen).logits
    close(logits[0, 5:], expected)
    close(logits[1, :-5], expected)
    assert bool(logits.isfinite().all())


def test_greedy_answers_with_a_cache_are_those_without(model: Any) -> None:
    """Thirty tokens through the loop that chat uses, then each prefix from the beginning."""
    prompt = IDS[:6].tolist()
    answer = list(stream_ids(model, prompt, stop_ids=(), max_new_tokens=30))
    whole = torch.tensor(prompt + answer)
    wanted = oracle(tensors("baichuan-13b"), whole[:-1]).argmax(-1)[len(prompt) - 1 :]
    assert answer == wanted.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_segments_are_as_far_apart_as_alone(
    folder: Path, attention: str, recompute: bool
) -> None:
    """Loss and gradients of two samples in one row are those of the samples apart."""
    model = load(folder).requires_grad_(True)
    model.set_attn_implementation(attention)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    loss = TokenLoss(model)

    def run(ids: torch.Tensor, position: torch.Tensor, segment: torch.Tensor) -> torch.Tensor:
        total, _ = loss(ids[None], ids[None], position[None], segment[None])
        total.backward()
        return total.detach()  # type: ignore[no-any-return]

    def gradients() -> list[torch.Tensor]:
        found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        return found

    first, second = torch.arange(7), torch.arange(12)
    packed = run(
        IDS, torch.cat([first, second]), torch.cat([torch.zeros(7), torch.ones(12)]).long()
    )
    together = gradients()
    apart = run(IDS[:7], first, torch.zeros(7).long()) + run(
        IDS[7:], second, torch.zeros(12).long()
    )
    torch.testing.assert_close(packed, apart, rtol=1e-6, atol=1e-5)
    for one, other in zip(together, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_far_keys_keep_their_digits_in_bfloat16() -> None:
    """Absolute indexes in bfloat16 would make neighbours 8 to 16 apart at 4,000."""
    like = torch.zeros(1, dtype=torch.bfloat16)
    bias = biased_mask(None, 8, 4000, 4000, like)
    near = bias[0, :, -1, -4:].float()
    assert near.tolist() == [[-s * d for d in (3, 2, 1, 0)] for s in slopes(8)]


def test_a_row_that_sees_nothing_is_no_nan() -> None:
    mask = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    assert bool(biased_mask(mask, 4, 2, 2, torch.zeros(1)).softmax(-1).isfinite().all())
