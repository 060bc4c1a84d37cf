"""Oracle: the gradient of a step in float64 plain torch, one sample after the other.

It knows nothing of packs, masks, micro-batches, ranks, PEFT or our loss: a sample goes through the
network alone, its token losses are added up, and the sum is divided by the labels of the step.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch.func import functional_call
from transformers import LlamaForCausalLM

from tests.exact.cells import WORDS

State = dict[str, torch.Tensor]
Stretch = tuple[np.ndarray, np.ndarray]
"""Ids and labels (n,) of a sample, or of the part of it that a pack holds."""


def gradient(
    network: LlamaForCausalLM, weights: State, stretches: Iterable[Stretch], scale: float | None
) -> State:
    """Return d(loss)/d(weight) for each trained weight.

    Args:
        network: in float64.
        weights: trained weights by the engine's names.
        stretches: what the step learns.
        scale: alpha / r of an adapter; None if all weights are trained.
    """
    trained = {name: w.double().requires_grad_() for name, w in weights.items()}
    own = dict(network.named_parameters())
    whole = _adapted(own, trained, scale) if scale else {_short(n): w for n, w in trained.items()}
    losses, labels = [], 0
    for ids, wanted in stretches:
        inputs = torch.from_numpy(ids.astype(np.int64)).unsqueeze(0)
        logits = functional_call(network, whole, (inputs,)).logits[0, :-1]
        logs = logits - logits.logsumexp(dim=-1, keepdim=True)
        for position, word in enumerate(wanted[1:].tolist()):
            if word >= 0:
                losses.append(-logs[position, word])
                labels += 1
    loss = torch.stack(losses).sum() / labels
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def _adapted(own: dict[str, torch.nn.Parameter], trained: State, scale: float) -> State:
    whole = {}
    for name, a in trained.items():
        if ".lora_A." in name:
            target = f"{_short(name).partition('.lora_A.')[0]}.weight"
            b = trained[name.replace(".lora_A.", ".lora_B.")]
            whole[target] = own[target].detach() + scale * (b @ a)
    return whole


def _short(name: str) -> str:
    """Cut what TokenLoss and PEFT put before a network's own name."""
    return name.removeprefix("model.").removeprefix("base_model.model.")


def norm(gradients: State) -> float:
    """Return the norm over all tensors."""
    return float(torch.stack([g.double().pow(2).sum() for g in gradients.values()]).sum().sqrt())


def difference(found: State, expected: State) -> float:
    """Return the largest difference of any element, over its tensor's largest element."""
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, wanted in expected.items():
        largest = float(wanted.abs().max())
        worst = max(worst, float((found[name].double() - wanted).abs().max()) / largest)
    return worst


def build_network(dtype: torch.dtype) -> LlamaForCausalLM:
    """Make the matrix's network; its weights are the same numbers whatever the dtype."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=0, eos_token_id=1, attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(5)
    network = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():  # larger than the default, so that all layers count
            parameter.copy_((parameter + 0.1 * torch.randn_like(parameter)).bfloat16())
    if dtype == torch.float64:
        _widen_norms(network)
    for parameter in network.parameters():  # alone: rotary frequencies stay as they are loaded
        parameter.data = parameter.data.to(dtype)
    return network


def _widen_norms(network: LlamaForCausalLM) -> None:
    """Replace norms, which compute in float32 whatever they get, by torch's own."""
    for module in network.modules():
        for name, child in list(module.named_children()):
            if "RMSNorm" in type(child).__name__:
                norm_ = torch.nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm_.weight = child.weight
                setattr(module, name, norm_)
