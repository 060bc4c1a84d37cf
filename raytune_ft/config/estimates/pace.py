"""Pace: a recipe, a model's counts and a device in, seconds of a step out. No torch.

A micro-step takes the device as long as its products, attention, passes over memory and unpacking
of weights take, and the host as long as Python needs to start them; the slower of the two decides,
and near balance both count. A pass that is replayed from a CUDA graph is one start. Shares of the
device's rates were fitted to measured runs: transformers' way on an H200 (`python -m
benchmarks.memory_plan`), the fast path on an H100 (`benchmarks.qlora_gpu`; docs/planning.md); other
devices come in by their rates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from raytune_ft.config.estimates.footprint import Counts
from raytune_ft.config.estimates.peak import MOMENTS, kept_per_token
from raytune_ft.config.estimates.setting import (
    EMBEDDING,
    HEAD,
    INPUTS,
    PART_WORDS,
    PARTS_AHEAD,
    Setting,
)
from raytune_ft.config.schema import Recipe

GIB = 2**30
PCIE_4, PCIE_5 = 22e9, 50e9
"""Copies from pinned memory in bytes per second; 55 GB/s were measured beside an H200."""
FLOAT8_FROM = (8, 9)
"""Compute capability of the first GPUs that multiply in float8, as `kernels.fp8` asks for it."""


@dataclass(frozen=True)
class Device:
    """Rates of a GPU and of the machine around it."""

    name: str
    memory: int
    """Bytes."""
    products: float
    """Floating-point operations per second of large bfloat16 products."""
    copies: float
    """Bytes per second, read and written, of a copy in the device's memory."""
    start: float
    """Seconds in which Python starts one operation."""
    is_measured: bool = True
    """Whether the rates were measured; else a data sheet's, reached as the H200 reaches its own."""
    host: float = PCIE_4
    """Bytes per second from pinned memory of the host, and to it."""
    capability: tuple[int, int] = (9, 0)
    """Compute capability, by which float8 is refused."""

    @property
    def has_float8(self) -> bool:
        """Whether it multiplies in float8."""
        return tuple(self.capability) >= FLOAT8_FROM


_REACHED, _COPIED = 785e12 / 989e12, 4.27e12 / 4.8e12
_START = 6.5e-6


def _by_sheet(
    name: str, gib: float, products: float, copies: float, capability: tuple[int, int]
) -> Device:
    memory, rates = int(gib * GIB), (products * 1e12 * _REACHED, copies * 1e12 * _COPIED)
    return Device(name, memory, *rates, _START, False, capability=capability)


DEVICES = {
    "h200": Device("H200", int(139.8 * GIB), 785e12, 4.27e12, _START, host=PCIE_5),
    "h100": Device("H100", int(79.2 * GIB), 798e12, 3.0e12, _START, host=PCIE_5),
    "a100": _by_sheet("A100", 79.2, 312, 2.04, (8, 0)),
    "l40s": _by_sheet("L40S", 44.4, 362, 0.864, (8, 9)),
    "l4": _by_sheet("L4", 22.0, 121, 0.30, (8, 9)),
    "rtx 4090": _by_sheet("RTX 4090", 23.5, 165, 1.01, (8, 9)),
    "rtx 3090": _by_sheet("RTX 3090", 23.6, 71, 0.94, (8, 6)),
}
"""By the word in the driver's name. The first two are measured: 8192^3 numbers multiplied, a GiB
copied; of others it is bfloat16 without sparsity, and TB/s, of the vendor's sheets."""


@dataclass(frozen=True)
class Way:
    """Shares of a device's rates that layers reach, and numbers of operations that they start.

    These are counted in starts of one small operation, though most of it is Python in between.
    """

    products: float
    attention: float
    """Of the rate of products, counted without a mask, which spares half; of very long samples."""
    attention_half: float
    """Tokens of a sample of which half of that rate is reached."""
    passes: float
    """Times that what a layer keeps is written or read, over forward and backward pass."""
    unpacking: float
    """Memory traffic per weight unpacked, in bytes, at the rate of copies."""
    layer_starts: float
    """Of a decoder layer forward, whose adapters start the ten that torch's dispatcher counts."""
    adapter_starts: float
    """Of each of its adapters."""
    backward_starts: float
    tail: float
    """Seconds of the device for a decoder layer of a pass, however few its tokens: gaps between
    kernels, and their ends, where few processors work."""
    balance: float
    """Exponent of the norm that joins the device's and the host's seconds: the higher, the less the
    faster side counts."""


PLAIN = Way(0.51, 0.42, 0, 4.3, 0.0095 * 4.27e12 / 6_476_005_376, 338, 10, 226, 0.0, 3.5)
"""As transformers and peft compute; fitted to the medians of up to three runs on the H200."""
FAST = Way(0.87, 1.2, 2048 / 3, 5.7, 2.75, 425, 17, 480, 0.00031, 8)
"""As `kernels` compute; fitted to runs of InternLM-7B, QLoRA, r 64, dropout 0.1, chat rows of 380
tokens, on an H100, 2026-11-26. Of 2,048 tokens in a pass of 8,192 a profile has 81 ms of products,
11 of attention, 19 of the rest; unpacking all weights twice takes 12. The tail is what passes of
2,048 and 4,096 tokens take more; starts are what a pass takes that no graph replays, 210 ms, parted
between forward and backward pass as their operations are. Nothing waits for the device within a
step, so the balance is sharper: the profile's kernels alone make up the step. Attention's rate was
fitted to samples of 8,192 to 131,072 tokens on an H200, 2026-11-26 (`benchmarks.lengths`), through
that of these packs."""
FLOAT8 = 1.66
"""Times the rate of bfloat16 that products in float8 with exact sums reach, on that H100, weighed
by the model's shapes: 1,200 to 1,400 TFLOP/s beside 730 to 790."""
ROUNDED = 7.4
"""Bytes moved for each number that meets a weight in float8; fitted to the same model's run there.
Rounding takes 3 of them; the rest are sums with the adapters' part, which bfloat16's products do on
their way."""
FLOAT32 = 0.040
"""Share of the rate that products with float32 adapters reach, in transformers' way."""
AGAIN = 0.33
"""Share of these passes, and of an adapter's products, that recomputation adds."""
UNPACKING_STARTS = {"none": 0, "nf4": 377, "int8": 720}
"""Starts of a layer's weights each time they are unpacked, or what they read is packed."""
FAST_UNPACKING_STARTS = 14
"""The same of NF4 in the fast path."""
HOOK_STARTS = 13.5
"""Those of DeepSpeed for the gradient of one trained tensor."""
WHOLE_TENSORS = 9
"""Tensors of a decoder layer that full training trains, biases left out."""
HOSTED_STARTS = 24
"""Those of sending a layer's input away and back."""
PASSES_OF_PARTS = 28
"""Bytes that sums over parts of the head read and write for each logit, beside its products."""
GRAPHED_BELOW = 8192
"""Tokens of a pass from which on it is not replayed from a CUDA graph: the device takes longer than
Python there."""
REPLAY_STARTS = 50
"""Those of a replay: 0.32 ms on the H100, of four layers."""
UPDATE_BYTES, UPDATE_SECONDS = 30, 0.035
"""Of an optimizer step: traffic per weight, and what DeepSpeed or bitsandbytes takes besides: on
the H100 what a step takes beyond the kernels of its passes."""
HOST_RATE, LINK_RATE = 20e9, 100e9
"""Bytes per second from and to the host, and between GPUs; assumed, not measured."""


@dataclass(frozen=True)
class Sides:
    """Seconds of a micro-step, apart for those who work at it."""

    device: float
    host: float
    balance: float
    """As in `Way`."""

    def joined(self, sharing: int = 1) -> float:
        """Return the seconds of both together, `sharing` processes with a host each on the device.

        A processor of their own is assumed for each of them.
        """
        power = self.balance
        both: float = ((sharing * self.device) ** power + self.host**power) ** (1 / power)
        return both


def device_called(name: str) -> Device | None:
    """Return the device whose word stands in `name`, a driver's or a user's; None if none does."""
    said = name.lower().replace("-", " ").replace("_", " ")
    found = [word for word in DEVICES if word in said or word.replace(" ", "") in said]
    return DEVICES[max(found, key=len)] if found else None


def micro_seconds(
    recipe: Recipe,
    counts: Counts,
    device: Device,
    fill: float = 1.0,
    *,
    resident: bool = False,
    hosted: tuple[str, ...] = (),
) -> float:
    """Predict a micro-step's seconds: one forward and backward pass of one worker.

    Args:
        recipe: the run.
        counts: of its model.
        device: on which each worker runs.
        fill: tokens over the room in the packs, where packs are as short as their rows.
        resident: whether a quantised base is unpacked once, not at each use.
        hosted: what lies on the host, as in `setting.Setting`.
    """
    way: dict[str, Any] = {"resident": resident, "hosted": hosted}
    joined = sides(recipe, counts, device, fill, **way).joined()
    if recipe.train.objective == "dpo":  # the reference's forward pass
        joined *= 4 / 3
    return joined


def sides(
    recipe: Recipe,
    counts: Counts,
    device: Device,
    fill: float = 1.0,
    *,
    resident: bool = False,
    hosted: tuple[str, ...] = (),
) -> Sides:
    """Return the seconds of a micro-step that the device needs, and those that the host needs."""
    setting = Setting(recipe, counts, on_gpu=True, resident=resident, hosted=hosted)
    seconds = _device_seconds(setting, device, fill), _host_seconds(setting, device)
    return Sides(*seconds, _way(setting).balance)


def update_seconds(
    recipe: Recipe, counts: Counts, device: Device, *, hosted: tuple[str, ...] = ()
) -> float:
    """Predict an optimizer step's seconds beside its micro-steps."""
    setting = Setting(recipe, counts, on_gpu=True, hosted=hosted)
    traffic = UPDATE_BYTES * counts.trained / setting.ranks / device.copies
    # bitsandbytes' optimizers wait for the device behind each tensor
    slow = setting.zero.stage > 0 or recipe.train.optimizer not in ("adamw", "muon")
    on_host = setting.zero.optimizer_on_host
    offloaded = UPDATE_BYTES * counts.trained / setting.ranks / HOST_RATE if on_host else 0
    besides = UPDATE_SECONDS if slow else 0
    if setting.streams_state:  # both ways at once; not measured, so no faster than by pages
        besides = max(besides, MOMENTS[recipe.train.optimizer] * counts.trained / device.host)
    return traffic + offloaded + besides


def epoch_seconds(
    recipe: Recipe,
    counts: Counts,
    device: Device,
    packs: float,
    fill: float = 1.0,
    *,
    resident: bool = False,
    hosted: tuple[str, ...] = (),
) -> float:
    """Predict an epoch's seconds, without what is evaluated and written."""
    per_step = recipe.global_batch_size
    micro_steps = packs / (recipe.train.micro_batch_size * recipe.run.workers)
    each = micro_seconds(recipe, counts, device, fill, resident=resident, hosted=hosted)
    update = update_seconds(recipe, counts, device, hosted=hosted)
    return micro_steps * each + packs / per_step * update


def _device_seconds(setting: Setting, device: Device, fill: float) -> float:
    counts, tokens, way = setting.counts, setting.tokens * fill, _way(setting)
    again = setting.recomputed / counts.layers
    passes = 3 if setting.is_full else 2  # weights that are trained have gradients of their own
    head = counts.vocabulary * counts.hidden * passes
    mlp = 3 * counts.hidden * counts.mlp * counts.layers
    tiled = mlp if setting.tiles else 0  # run again, layer by layer recomputed or not
    layers = (counts.linear * (passes + again) + tiled) / (FLOAT8 if setting.in_float8 else 1)
    products = 2 * tokens * (layers + head)
    seconds = products / (way.products * device.products)
    length = setting.recipe.data.max_length * fill
    attention = 4 * tokens * length * counts.queries * counts.layers * (3.5 + again)
    rate = way.attention * length / (length + way.attention_half)
    seconds += attention / (rate * device.products)
    traffic = way.passes * kept_per_token(setting) * tokens * counts.layers * (1 + AGAIN * again)
    if setting.unpacks:
        # a tiled MLP's weights are unpacked for each tile, once more as it runs again
        at_once = (counts.linear - tiled) * (2 + again)
        traffic += way.unpacking * (at_once + tiled * setting.tiles * (3 + again))
    if setting.in_float8:
        traffic += ROUNDED * _rounded_per_token(setting) * tokens
    if not (setting.is_full or setting.has_fast_linears) and setting.adapter_width == 4:
        products = 6 * counts.trained * tokens * (1 + AGAIN * again)
        seconds += products / (FLOAT32 * device.products)
    seconds += traffic / device.copies + _sent_weights(setting) * (2 + again)
    seconds += way.tail * (counts.layers + setting.recomputed / 3)  # forward is a third of it
    return seconds + _waits_for_host(setting, device, seconds)


def _waits_for_host(setting: Setting, device: Device, seconds: float) -> float:
    """Return what a device waits for rows, layer inputs and parts of the head from the host.

    Args:
        setting: with `hosted`.
        device: whose rate of copies counts.
        seconds: of the pass without it, beside which layer inputs and the head's parts travel.
    """
    counts, width, waits = setting.counts, setting.width, 0.0
    if EMBEDDING in setting.hosted:
        waits += setting.inputs / device.host
    if INPUTS in setting.hosted:  # a layer runs forward in a quarter of its time, at least
        layer = seconds / counts.layers
        waits += 2 * setting.recomputed * max(0.0, setting.inputs / device.host - layer / 4)
        waits += 2 * setting.recomputed * setting.inputs / device.copies  # there and back
    if HEAD in setting.hosted:
        behind = max(0, counts.vocabulary - PARTS_AHEAD * PART_WORDS) * counts.hidden * width
        logits = setting.tokens * counts.vocabulary
        own = 4 * logits * counts.hidden / (_way(setting).products * device.products)
        own += PASSES_OF_PARTS * logits / device.copies
        waits += PASSES_OF_PARTS * logits / device.copies + max(0.0, behind / device.host - own)
    return waits


def _rounded_per_token(setting: Setting) -> float:
    """Return how many numbers meet frozen weights per token: inputs, and gradients of outputs."""
    counts = setting.counts
    inputs = 2 * counts.hidden + counts.queries + counts.mlp
    gradients = counts.attention + 2 * counts.hidden + 2 * counts.mlp
    return (counts.layers + setting.recomputed) * inputs + counts.layers * gradients


def _sent_weights(setting: Setting) -> float:
    """Return the seconds in which ZeRO-3 brings all weights together, or from the host, once."""
    if setting.zero.stage < 3:
        return 0.0
    size = setting.counts.total * setting.width
    if setting.zero.weights_on_host:
        return size / HOST_RATE
    return size * (1 - 1 / setting.ranks) / LINK_RATE


def is_replayed(setting: Setting) -> bool:
    """Tell whether passes are replayed from a CUDA graph, if there is memory for it.

    As `training.micro_graph` decides, but for what only the network tells: of attention that the
    fast path does not take, `has_fast_form` knows, of logits that the model changes, nothing.
    """
    recipe, zero = setting.recipe, setting.zero
    # DeepSpeed keeps whole sums apart in its stage 1 of bfloat16 weights
    sums_apart = zero.stage == 0 or (zero.stage == 1 and recipe.model.dtype in ("auto", "bfloat16"))
    plain = recipe.train.objective == "sft" and recipe.train.neftune_noise_alpha is None
    fixed = plain and recipe.data.packing != "none" and sums_apart
    asks = recipe.lora.use_dora or recipe.model.quantization == "int8"
    return setting.is_fast and fixed and not asks and setting.tokens < GRAPHED_BELOW


def _host_seconds(setting: Setting, device: Device) -> float:
    if is_replayed(setting):
        return REPLAY_STARTS * device.start
    again = setting.recomputed / setting.counts.layers
    adapted = 0 if setting.is_full else setting.counts.adapted
    way, stored = _way(setting), setting.recipe.model.quantization
    starts = (way.layer_starts + way.adapter_starts * adapted) * (1 + again) + way.backward_starts
    if setting.unpacks:
        each = FAST_UNPACKING_STARTS if setting.has_fast_linears else UNPACKING_STARTS[stored]
        starts += each * (2 + again)
    if setting.zero.stage and not (setting.has_fast_linears and setting.zero.stage == 1):
        starts += HOOK_STARTS * (WHOLE_TENSORS if setting.is_full else 2 * adapted)
    if INPUTS in setting.hosted:
        starts += HOSTED_STARTS * again
    return setting.counts.layers * starts * device.start


def _way(setting: Setting) -> Way:
    """Return how a layer computes, by its linear layers, in which most of its time passes."""
    return FAST if setting.has_fast_linears else PLAIN
