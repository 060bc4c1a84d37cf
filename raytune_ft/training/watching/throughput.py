"""Throughput: what an optimizer step computes, by arithmetic, and how much of the device that is.

FLOPs are those that the mathematics needs, as for the MFU of PaLM (arXiv 2204.02311, appendix B):
what gradient checkpointing computes again and what padding costs is not counted, so they lower
the figure. With a weight of a matrix product, one token needs

    2 FLOPs forward, 2 for the gradient of the product's input, 2 for the weight's, if it is trained

so 6 N in full training and 4 N + 6 N_adapter with LoRA. The head counts at labelled positions
only, since it runs nowhere else. Attention adds 6 * s * s * width per layer to a segment of s
tokens: two products over the s * s / 2 pairs that causal attention needs, forward once and
backward twice. Sliding windows count as if they were as wide as their segment.

Shapes: s = tokens of a segment, width = heads * head_dim of the queries.
"""

from __future__ import annotations

import re
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from raytune_ft.model.loss import TokenLoss, causal_model

GIB = 2**30
MOMENTARY = frozenset({
    "seconds", "tokens_per_s", "targets_per_s", "data_seconds", "data_wait", "rank_seconds", "mfu",
    "eta_seconds", "memory_gib", "memory_reserved_gib", "memory_device_gib", "rss_gib",
})  # fmt: skip
"""Fields of a step's line that a clock or a machine says: two equal runs differ in them alone."""

TERA = 1e12
PEAKS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"GB200", {"16": 2500, "32": 80}),
    (r"B200", {"16": 2250, "32": 80}),
    (r"(H100|H800).*PCIe", {"16": 756, "32": 51}),
    (r"(H100|H200).*NVL", {"16": 835, "32": 60}),
    (r"GH200|H100|H200|H800", {"16": 989, "32": 67}),
    (r"H20", {"16": 148, "32": 44}),
    (r"A100|A800", {"16": 312, "32": 19.5}),
    (r"A30", {"16": 165, "32": 10.3}),
    (r"A10G", {"16": 70, "32": 31.2}),
    (r"A10", {"16": 125, "32": 31.2}),
    (r"A40", {"16": 149.7, "32": 37.4}),
    (r"RTX A6000", {"16": 154.8, "32": 38.7}),
    (r"RTX 6000 Ada", {"16": 364, "32": 91.1}),
    (r"L40S", {"16": 362, "32": 91.6}),
    (r"L40", {"16": 181, "32": 90.5}),
    (r"L4", {"16": 121, "32": 30.3}),
    (r"RTX 5090", {"16": 209.5, "32": 104.8}),
    (r"RTX 4090", {"16": 165.2, "32": 82.6}),
    (r"RTX 3090 Ti", {"16": 80, "32": 40}),
    (r"RTX 3090", {"16": 71, "32": 35.6}),
    (r"V100", {"float16": 125, "32": 15.7}),
    (r"T4", {"float16": 65, "32": 8.1}),
)
"""Dense TFLOP/s of NVIDIA's data sheets, sums in float32: device -> bits or dtype -> peak."""
PARTIAL = r"MIG|Laptop|Max-Q|4090 D|5090 D|vGPU|GRID"
"""Devices by these words are less than the whole one of the same name."""


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """Return a device's FLOP/s in dense products of a dtype; None where it is not known.

    Args:
        device_name: as `torch.cuda.get_device_name` says it.
        dtype: that the model computes in.
    """
    if re.search(PARTIAL, device_name):
        return None
    kind = str(dtype).removeprefix("torch.")
    bits = {"float16": "16", "bfloat16": "16", "float32": "32"}.get(kind, kind)
    for pattern, peaks in PEAKS:
        if re.search(rf"(?<![A-Za-z0-9])({pattern})(?![A-Za-z0-9])", device_name):
            found = peaks.get(kind, peaks.get(bits))
            return None if found is None else found * TERA
    return None


@dataclass(frozen=True)
class Work:
    """What one token costs: numbers of weights that stand in matrix products."""

    frozen: int
    """In the body, not trained."""
    trained: int
    """In the body, trained."""
    head: int
    """Of the output head."""
    head_trained: bool
    layers: int
    width: int
    """Of the queries: heads * head_dim."""
    forward_again: bool = False
    """Whether every token runs once more without gradients: a reference model's pass."""

    def flops(self, tokens: int, targets: int, pairs: int) -> float:
        """Return the FLOPs of a step.

        Args:
            tokens: of all its packs.
            targets: labelled ones among them.
            pairs: sum of the squared lengths of all segments.
        """
        once = 2.0 * (self.frozen + self.trained) * tokens
        body = 4.0 * self.frozen * tokens + 6.0 * self.trained * tokens
        head = (6.0 if self.head_trained else 4.0) * self.head * targets
        attention = 6.0 * self.layers * self.width * pairs
        again = once + 2.0 * self.head * targets + attention / 3 if self.forward_again else 0.0
        return body + head + attention + again


def work_of(module: nn.Module, *, forward_again: bool = False) -> Work | None:
    """Count the weights of a network; None where not every token meets every weight (experts).

    Quantised layers count by their shape, not by their bytes; an adapter's layers are layers.
    """
    model = causal_model(module.model if isinstance(module, TokenLoss) else module)
    config = model.config.get_text_config() if hasattr(model, "config") else None
    if config is None or _has_experts(config):
        return None
    head = model.get_output_embeddings()
    frozen = trained = 0
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head and "original_module" not in name:
            size = layer.in_features * layer.out_features
            if layer.weight.requires_grad:
                trained += size
            else:
                frozen += size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Work(
        frozen=frozen,
        trained=trained,
        head=config.hidden_size * config.vocab_size,
        head_trained=any(p.requires_grad for p in head.parameters()),
        layers=config.num_hidden_layers,
        width=heads * head_dim,
        forward_again=forward_again,
    )


def _has_experts(config: object) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


@dataclass(frozen=True)
class Meter:
    """Turns a step's counts and seconds into the figures of its line in metrics.jsonl."""

    work: Work | None
    peak: float | None
    """FLOP/s of all workers' devices together; None: unknown, or no GPU."""
    device: torch.device

    @classmethod
    def of(
        cls, module: nn.Module, device: torch.device, workers: int, *, forward_again: bool = False
    ) -> Meter:
        """Measure an engine's network on its device."""
        work = work_of(module, forward_again=forward_again)
        if device.type != "cuda" or work is None:
            return cls(work, None, device)
        model = causal_model(module.model if isinstance(module, TokenLoss) else module)
        dtype = model.get_input_embeddings().weight.dtype
        peak = peak_flops(torch.cuda.get_device_name(device), dtype)
        return cls(work, None if peak is None else peak * workers, device)

    def figures(
        self, *, tokens: int, targets: int, pairs: int, seconds: float, waited: list[float]
    ) -> dict[str, float | None]:
        """Return speeds, shares 0 to 1 and memory in GiB; None what cannot be told here.

        Args:
            tokens: of all ranks.
            targets: of all ranks.
            pairs: as `Work.flops` takes them.
            seconds: of the step, data included.
            waited: seconds for data by rank; the slowest holds up all.
        """
        mfu = None
        if self.work is not None and self.peak is not None:
            mfu = self.work.flops(tokens, targets, pairs) / (seconds * self.peak)
        return {
            "tokens_per_s": tokens / seconds,
            "targets_per_s": targets / seconds,
            "mfu": mfu,
            "data_wait": min(1.0, max(waited, default=0.0) / seconds),
            **memory_use(self.device),
        }


def memory_use(device: torch.device) -> dict[str, float | None]:
    """Return this process's memory and its device's, in GiB.

    `memory_gib` is the peak so far, allocated on a GPU or resident in a CPU process;
    `memory_reserved_gib` what torch took of the GPU for it; `memory_device_gib` what is in use
    of the whole GPU now, by whom ever; `rss_gib` what is resident now.
    """
    resident = _resident_bytes() / GIB
    if device.type != "cuda":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB
        return {
            "memory_gib": peak, "memory_reserved_gib": None, "memory_device_gib": None,
            "rss_gib": resident,
        }  # fmt: skip
    free, total = torch.cuda.mem_get_info(device)
    return {
        "memory_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "memory_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "memory_device_gib": (total - free) / GIB,
        "rss_gib": resident,
    }


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):  # not Linux: the peak is the nearest known
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return pages * resource.getpagesize()
