"""Every family from every form of file and in every storage: the same tensors, the same modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.config.schema import LoraSection
from raytune_ft.model.adapter import attach
from raytune_ft.model.families.alibi import slopes
from tests.families.checkpoints import SPECS, weights_of
from tests.families.conftest import Checkpoint, Loaded
from tests.families.loaded import TOLERANCE, difference, load, logits, random_ids
from tests.families.oracles import alibi_slopes, logits_of

pytestmark = pytest.mark.families

FAMILIES = tuple(SPECS)
NORM_HEADS = ("baichuan2_7b", "baichuan2_13b")
FORMS: tuple[dict[str, Any], ...] = ({"fmt": "bin", "shards": 3}, {"shards": 3}, {"fmt": "bin"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_file_gives_the_same_tensors(
    family: str, checkpoint: Checkpoint, loaded: Loaded
) -> None:
    expected = loaded(family).state_dict()
    # a file of all pickled tensors is read as several are; one family each with and without
    # fused tensors, and the one with a tied head, show it
    for form in FORMS if family in ("llama", "chatglm2", "starcoder") else FORMS[:2]:
        found = load(checkpoint(family, **form)).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_half_precision_files_keep_their_bits(family: str, checkpoint: Checkpoint) -> None:
    """`head_trained` leaves Baichuan2's head as it is in the file."""
    folder = checkpoint(family, dtype=torch.bfloat16, shards=2)
    model = load(folder, dtype="bfloat16", head_trained=True)
    wide = load(checkpoint(family), head_trained=True).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, wide[name].bfloat16()), name
    # bfloat16 has 8 bits: the logits are the same numbers, coarsely
    ids = random_ids(300, 17)
    wanted = logits_of(family, SPECS[family].config, weights_of(family), ids)
    assert difference(logits(model, ids)[0], wanted) < 0.2


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_models_have_the_same_modules(
    family: str, quantization: str, checkpoint: Checkpoint, loaded: Loaded
) -> None:
    """Every linear layer but the head is quantised, and `all-linear` puts an adapter on each."""
    plain = loaded(family)
    model = load(checkpoint(family), quantization=quantization)
    assert [name for name, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    linear = {
        name
        for name, module in plain.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    quantised = {
        name
        for name, module in model.named_modules()
        if {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization] in type(module).__name__
    }
    assert quantised == linear

    adapted = attach(model, LoraSection(r=2), seed=0)
    prefix = "base_model.model."
    assert {
        name.removeprefix(prefix)
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    } == linear


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_weights_are_those_of_the_file_rounded(
    family: str, checkpoint: Checkpoint, loaded: Loaded
) -> None:
    """Parts of fused tensors are quantised after the split, each in its own place."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    model = load(checkpoint(family), quantization="nf4")
    plain = loaded(family)
    compared = 0
    for name, module in model.named_modules():
        if "Linear4bit" in type(module).__name__:
            seen = dequantize_4bit(module.weight.data, module.weight.quant_state)
            weight = plain.get_submodule(name).weight.detach().contiguous()
            packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            assert torch.equal(seen, dequantize_4bit(packed, state)), name
            compared += 1
    assert compared >= 4 * 2


def test_the_slopes_of_forty_heads() -> None:
    """Baichuan-13B: 32 regular slopes 2^(-i/4), then 8 of the series of 64, 2^(-(2i-1)/8)."""
    closed_form = [2 ** (-i / 4) for i in range(1, 33)] + [
        2 ** (-(2 * i - 1) / 8) for i in range(1, 9)
    ]
    assert slopes(40) == pytest.approx(closed_form, rel=1e-15)
    assert slopes(40) == pytest.approx(alibi_slopes(40), rel=1e-15)
    assert slopes(8) == pytest.approx([2.0**-i for i in range(1, 9)], rel=1e-15)


@pytest.mark.parametrize("family", NORM_HEADS)
def test_folded_and_normalising_heads_agree(family: str, checkpoint: Checkpoint) -> None:
    folded, live = load(checkpoint(family)), load(checkpoint(family), head_trained=True)
    stored = weights_of(family)["lm_head.weight"]
    assert torch.equal(live.lm_head.weight, stored)
    rows = folded.lm_head.weight.norm(dim=1)
    torch.testing.assert_close(rows, torch.ones_like(rows), rtol=1e-6, atol=0)
    ids = random_ids(300, 17)
    assert difference(logits(folded, ids), logits(live, ids)) <= TOLERANCE


@pytest.mark.parametrize("family", NORM_HEADS)
def test_gradients_go_through_the_lengths_of_the_head(family: str, checkpoint: Checkpoint) -> None:
    """Of the head only where it is trained; of the body with a folded head as well."""
    ids, config = random_ids(300, 12), SPECS[family].config
    exact = {name: w.double().requires_grad_() for name, w in weights_of(family).items()}
    loss = nn.functional.cross_entropy(logits_of(family, config, exact, ids)[:-1], ids[1:])
    names = ("lm_head.weight", "model.layers.0.mlp.up_proj.weight", "model.norm.weight")
    wanted = dict(zip(names, torch.autograd.grad(loss, [exact[n] for n in names]), strict=True))

    for head_trained in (True, False):
        model = load(checkpoint(family), head_trained=head_trained).requires_grad_(True)
        ours = model(ids.unsqueeze(0), use_cache=False).logits[0]
        nn.functional.cross_entropy(ours[:-1], ids[1:]).backward()
        found = {name: model.get_parameter(name).grad for name in names}
        for name in names[1:]:
            assert (
                difference(
                    found[name] / wanted[name].abs().max(), wanted[name] / wanted[name].abs().max()
                )
                <= TOLERANCE
            )
        if head_trained:
            top = wanted["lm_head.weight"].abs().max()
            assert (
                difference(found["lm_head.weight"] / top, wanted["lm_head.weight"] / top)
                <= TOLERANCE
            )
            along = (found["lm_head.weight"] * weights_of(family)["lm_head.weight"]).sum(1) / top
            assert along.abs().max() <= TOLERANCE, "a row's length must not matter"
