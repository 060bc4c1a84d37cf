"""Throughput: FLOPs by formula against those that torch counts, and devices by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM

from raytune_ft.data.packing import IGNORE_INDEX
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training.batching import to_tensors
from raytune_ft.training.watching.throughput import Meter, Work, memory_use, peak_flops, work_of

LENGTH, SEGMENTS = 64, [64, 64]


@pytest.fixture
def network(tiny_model: Path) -> Any:
    """Attention written as plain products, which torch counts; it computes all s * s pairs."""
    return AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation="eager")


class Counting(TorchDispatchMode):
    """Torch's own formulas, applied to every product; its counter refuses a gradient in a pass."""

    total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def batch() -> tuple[dict[str, torch.Tensor], int]:
    """Two packs of one segment each, without padding; half of the labels count."""
    shape = (len(SEGMENTS), LENGTH)
    ids = np.arange(np.prod(shape), dtype=np.int32).reshape(shape) % 90
    labels = ids.copy()
    labels[:, : LENGTH // 2] = IGNORE_INDEX
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), shape)
    segments = np.zeros(shape, np.int32)
    arrays = {"input_ids": ids, "labels": labels, "position_ids": places, "segment_ids": segments}
    return to_tensors(arrays), len(SEGMENTS) * LENGTH // 2


def counted(module: TokenLoss) -> int:
    """Count the products of one forward and backward pass with torch."""
    tensors, n_targets = batch()
    with Counting() as counter:
        loss, found = module(**tensors)
        loss.backward()
    assert int(found) == n_targets
    return counter.total


def formula(module: TokenLoss) -> tuple[float, Work, int]:
    work = work_of(module)
    assert work is not None
    n_targets = batch()[1]
    pairs = sum(s * s for s in SEGMENTS)
    flops = work.flops(len(SEGMENTS) * LENGTH, n_targets, pairs)
    # torch counts what the mask hides as well: twice the causal half
    return flops + 6.0 * work.layers * work.width * pairs, work, n_targets


def test_full_training_costs_six_flops_a_weight_and_token(network: Any) -> None:
    module = TokenLoss(network)
    flops, work, n_targets = formula(module)
    again = 2 * work.head * n_targets  # the loss runs a trained head once more, chunk by chunk
    assert counted(module) == flops + again
    assert work.frozen == 0 and work.head_trained


def test_lora_spares_the_gradients_of_frozen_weights(network: Any) -> None:
    network.enable_input_require_grads()  # the first layer's inputs, which the formula counts
    config = LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    module = TokenLoss(get_peft_model(network, config))
    flops, work, _ = formula(module)
    assert counted(module) == flops
    adapters = [p for n, p in module.named_parameters() if "lora_" in n]
    assert work.trained == sum(p.numel() for p in adapters) and not work.head_trained
    shapes = [layer.weight.shape for layer in network.modules() if type(layer) is torch.nn.Linear]
    everything = sum(rows * columns for rows, columns in shapes)
    assert work.frozen + work.trained + work.head == everything


def test_a_module_trained_beside_the_adapter_counts_once(network: Any) -> None:
    whole = work_of(TokenLoss(network))
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["down_proj"])
    work = work_of(TokenLoss(get_peft_model(network, config)))
    assert whole is not None and work is not None
    saved = 2 * 128 * 64
    adapters = 2 * 4 * (64 + 64)
    assert work.trained == saved + adapters
    assert work.frozen == whole.trained - saved


def test_a_reference_model_costs_one_more_forward_pass(network: Any) -> None:
    module = TokenLoss(network)
    plain, again = work_of(module), work_of(module, forward_again=True)
    assert plain is not None and again is not None
    with torch.no_grad(), Counting() as counter:
        module(**batch()[0])
    pairs = sum(s * s for s in SEGMENTS)
    sizes = (len(SEGMENTS) * LENGTH, batch()[1], pairs)
    hidden_half = 2.0 * plain.layers * plain.width * pairs
    more = again.flops(*sizes) - plain.flops(*sizes)
    assert more + hidden_half == counter.total


def test_mixtures_of_experts_and_other_modules_are_not_guessed_at(network: Any) -> None:
    network.config.num_local_experts = 8
    assert work_of(TokenLoss(network)) is None
    assert work_of(torch.nn.Module()) is None


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756),
        ("NVIDIA H200", torch.float16, 989),
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312),
        ("NVIDIA A10G", torch.bfloat16, 70),
        ("NVIDIA A10", torch.bfloat16, 125),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165.2),
        ("NVIDIA L4", torch.bfloat16, 121),
        ("NVIDIA L40S", torch.bfloat16, 362),
        ("Tesla T4", torch.float16, 65),
        ("Tesla T4", torch.bfloat16, None),  # it has none
        ("NVIDIA A100-SXM4-40GB", torch.float32, 19.5),
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, None),  # a seventh of one
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, None),
        ("NVIDIA RTX A1000", torch.bfloat16, None),  # no A100
        ("Some Other GPU", torch.bfloat16, None),
    ],
)
def test_devices_are_known_by_their_whole_names(
    name: str, dtype: torch.dtype, tera: float | None
) -> None:
    assert peak_flops(name, dtype) == (None if tera is None else pytest.approx(tera * 1e12))


def test_a_meter_turns_counts_and_seconds_into_shares() -> None:
    work = Work(frozen=7e9, trained=1e8, head=1e8, head_trained=False, layers=32, width=4096)  # type: ignore[arg-type]
    meter = Meter(work, 2 * 989e12, torch.device("cpu"))
    figures = meter.figures(
        tokens=40_000, targets=10_000, pairs=16 * 2048**2, seconds=2.0, waited=[0.1, 0.5]
    )
    attention = 6 * 32 * 4096 * 16 * 2048**2
    flops = 40_000 * (4 * 7e9 + 6 * 1e8) + 4 * 1e8 * 10_000 + attention
    assert figures["mfu"] == pytest.approx(flops / 2.0 / (2 * 989e12))
    assert (figures["tokens_per_s"], figures["targets_per_s"]) == (20_000, 5_000)
    assert figures["data_wait"] == 0.25, "the slowest rank holds up all"


def test_what_a_cpu_cannot_tell_is_null_and_not_zero(network: Any) -> None:
    meter = Meter.of(TokenLoss(network), torch.device("cpu"), workers=1)
    figures = meter.figures(tokens=10, targets=5, pairs=100, seconds=1.0, waited=[])
    assert figures["mfu"] is None and figures["memory_reserved_gib"] is None
    assert figures["data_wait"] == 0.0


def test_resident_memory_is_that_of_the_process() -> None:
    psutil = pytest.importorskip("psutil")
    use = memory_use(torch.device("cpu"))
    assert use["rss_gib"] == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.05)
    assert use["memory_gib"] is not None and use["memory_gib"] >= use["rss_gib"] * 0.99
