"""Token loss: against the model's own loss, against samples apart, and for isolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)  # fmt: skip

from raytune_ft.config.schema import LoraSection
from raytune_ft.model import loss as loss_module
from raytune_ft.model.adapter import attach
from raytune_ft.model.loss import TokenLoss

SHAPE: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "pad_token_id": 0,
}  # fmt: skip
Sample = tuple[list[int], list[int]]


def llama(dtype: torch.dtype = torch.float64, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes})).to(dtype)


def samples(lengths: Sequence[int], seed: int = 1) -> list[Sample]:
    """Random samples of which the second half is labelled."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for n in lengths:
        ids = torch.randint(1, 97, (n,), generator=generator).tolist()
        result.append((ids, [-100] * (n // 2) + ids[n // 2 :]))
    return result


def batch(rows: Sequence[Sequence[Sample]], length: int | None = None) -> dict[str, torch.Tensor]:
    """Pack each row's samples one after the other and pad rows to one length."""
    length = length or max(sum(len(ids) for ids, _ in row) for row in rows)
    keys = {"input_ids": 0, "labels": -100, "position_ids": 0, "segment_ids": -1}
    made = {k: torch.full((len(rows), length), v) for k, v in keys.items()}
    for r, row in enumerate(rows):
        start = 0
        for s, (ids, labels) in enumerate(row):
            part = slice(start, start + len(ids))
            made["input_ids"][r, part] = torch.tensor(ids)
            made["labels"][r, part] = torch.tensor(labels)
            made["position_ids"][r, part] = torch.arange(len(ids))
            made["segment_ids"][r, part] = s
            start += len(ids)
    return made


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("head_trained", [True, False])
def test_a_pack_is_the_sum_of_its_samples(head_trained: bool) -> None:
    """float64: values and gradients differ by the order of additions only."""
    model = llama()
    model.lm_head.requires_grad_(head_trained)
    rows = [samples([9, 30, 17]), samples([40, 5], seed=2)]
    packed, count = TokenLoss(model)(**batch(rows))
    packed.backward()
    together = gradients(model)
    parts = [TokenLoss(model)(**batch([[one]])) for row in rows for one in row]
    alone = sum(part for part, _ in parts)
    alone.backward()

    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-10)
    assert int(count) == sum(int(n) for _, n in parts) == 5 + 15 + 9 + 20 + 3
    for name, value in gradients(model).items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-10)
    assert ("lm_head.weight" in together) is head_trained


def test_one_sample_has_the_models_own_loss() -> None:
    model = llama()
    data = batch([samples([50])])
    own = model(input_ids=data["input_ids"], labels=data["labels"]).loss
    ours, count = TokenLoss(model)(**data)
    torch.testing.assert_close(ours / count, own.double(), rtol=0, atol=1e-6)  # HF sums in float32


def test_samples_of_a_pack_do_not_see_each_other() -> None:
    """Bit for bit: what stands in sample A has no effect on sample B, before or after it."""
    model = llama(torch.float32)
    (a, _), b, (c, _) = samples([20, 30, 25])
    silent: list[list[int]] = [[-100] * 20, [-100] * 25]
    first, _ = TokenLoss(model)(**batch([[(a, silent[0]), b, (c, silent[1])]]))
    others = [[x % 90 + 1 for x in ids] for ids in (a, c)]
    second, _ = TokenLoss(model)(**batch([[(others[0], silent[0]), b, (others[1], silent[1])]]))
    assert others != [a, c]
    assert torch.equal(first, second)


def test_padding_changes_nothing() -> None:
    model = llama()
    rows = [samples([9, 13])]
    plain, _ = TokenLoss(model)(**batch(rows))
    padded, _ = TokenLoss(model)(**batch(rows, length=40))
    torch.testing.assert_close(plain, padded, rtol=0, atol=1e-10)


def test_a_batch_without_label_has_zero_gradients() -> None:
    model = llama(torch.float32)
    ids = list(range(1, 11))
    loss, count = TokenLoss(model)(**batch([[(ids, [-100] * 10)]], length=14))
    loss.backward()
    assert (loss.item(), int(count)) == (0.0, 0)
    found = gradients(model)
    assert found
    assert not any(bool(g.any()) for g in found.values())


def test_a_label_on_the_first_token_is_not_predicted() -> None:
    model = llama()
    ids = list(range(1, 11))
    loss, count = TokenLoss(model)(**batch([[(ids, [ids[0]] + [-100] * 9), (ids, ids)]]))
    alone, _ = TokenLoss(model)(**batch([[(ids, ids)]]))
    assert int(count) == 9
    torch.testing.assert_close(loss, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("head_trained", [True, False])
def test_chunks_of_the_head_change_nothing(
    monkeypatch: pytest.MonkeyPatch, head_trained: bool
) -> None:
    model = llama()
    model.lm_head.requires_grad_(head_trained)
    data = batch([samples([60])])
    whole, _ = TokenLoss(model)(**data)
    whole.backward()
    expected = gradients(model)
    monkeypatch.setattr(loss_module, "CHUNK_ROWS", 7)
    parts, _ = TokenLoss(model)(**data)
    parts.backward()
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-10)
    for name, value in gradients(model).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)


OTHERS = [
    (Gemma2ForCausalLM, Gemma2Config, {"head_dim": 16, "sliding_window": 8}),
    (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 4.0}),
    (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    (
        Qwen3ForCausalLM,
        Qwen3Config,
        {"head_dim": 16, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
]


@pytest.mark.parametrize("kind, config, changes", OTHERS, ids=[k.__name__ for k, _, _ in OTHERS])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_other_families(kind: Any, config: Any, changes: dict[str, Any], attention: str) -> None:
    """Capped and scaled logits and sliding windows: packed equals the models' own loss, summed."""
    torch.manual_seed(0)
    model = kind(config(**SHAPE, **changes))
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("this network has eager attention only")
    model.set_attn_implementation(attention)
    model.double()
    row = samples([33, 21, 8])
    packed, _ = TokenLoss(model)(**batch([row], length=70))
    own = 0.0
    for ids, labels in row:
        logits = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        own += float(nn.functional.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum"))
    assert float(packed) == pytest.approx(own, abs=1e-4)  # Gemma's norms work in float32
    unlabelled = batch([[(ids, [-100] * len(ids)) for ids, _ in row]])
    assert float(TokenLoss(model)(**unlabelled)[0]) == 0.0


def test_gradient_checkpointing_and_adapters() -> None:
    """Recomputed activations give the same gradients of an adapter."""
    found = []
    for recompute in (False, True):
        model = attach(llama(torch.float32), LoraSection(r=4, dropout=0.0), seed=1)
        torch.manual_seed(5)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        TokenLoss(model)(**batch([samples([30, 20])]))[0].backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    assert all("lora_" in name for name in found[0])
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)
