"""Setting: a recipe's numbers on one kind of device, as estimates of memory and time need them.

In: a recipe, a model's counts, and what its layout keeps where. Out: widths, tokens, what computes
in its fast form, what DeepSpeed is told. No torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from raytune_ft.config.estimates.footprint import Counts
from raytune_ft.config.schema import Recipe

TILE, LONG = 8192, 16384
"""Tokens that go through an MLP at a time in the fast path, where a micro-batch has over `LONG`."""
RECOMPUTE_FROM_TOKENS = 512
"""`gradient_checkpointing: auto` recomputes above this many tokens per micro-batch."""
EMBEDDING, INPUTS, HEAD = "embedding", "layer inputs", "head"
LADDER = ((EMBEDDING,), (EMBEDDING, INPUTS), (EMBEDDING, INPUTS, HEAD))
"""What a layout may keep on the host, the cheapest in time first."""
PART_WORDS, PARTS_AHEAD = 4096, 6
"""A head on the host comes in parts of so many words; so many lie on the device at once."""
PART_ROWS = 1024
"""Tokens that meet a part at a time."""
STREAMED = {"paged_adamw_32bit"}
"""Optimizers whose averages can wait on the host between steps, brought and taken in parts."""
STATE_PART, STATE_AHEAD = 2**21, 2
"""Weights of such a part; parts that are on their way while one is updated, to it and from it."""


@dataclass(frozen=True)
class Zero:
    """What DeepSpeed is told, as far as it takes memory."""

    stage: int = 0
    optimizer_on_host: bool = False
    weights_on_host: bool = False
    bucket: int | None = None
    """Elements; None: as `bucket_elements` says."""
    sizes_batches: bool = False
    """Whether a user's file says how large micro-batches are."""


@dataclass(frozen=True)
class Setting:
    """A recipe's numbers on one kind of device."""

    recipe: Recipe
    counts: Counts
    on_gpu: bool
    resident: bool = False
    """Whether a quantised base lies beside its codes in the model's type, unpacked once."""
    hosted: tuple[str, ...] = ()
    """What lies on the host: names of `LADDER`."""

    @cached_property
    def width(self) -> int:
        """Bytes of a number that the model computes with."""
        dtype = self.recipe.model.dtype
        if dtype == "auto":
            return 2 if self.on_gpu else 4
        return 4 if dtype == "float32" else 2

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained."""
        return self.recipe.model.method == "full"

    @cached_property
    def adapter_width(self) -> int:
        """Bytes of a trained weight as the model computes with it: PEFT's adapters are float32."""
        return self.width if self.is_full or self.zero.stage else 4

    @cached_property
    def zero(self) -> Zero:
        """DeepSpeed's settings, as the engine takes them."""
        from raytune_ft.config.zero import sums_once

        train, found = self.recipe.train, zero_of(self.recipe.train.deepspeed)
        if sums_once(train.deepspeed, self.counts.trained, train.accumulation):
            return replace(found, stage=1)
        return found

    @property
    def ranks(self) -> int:
        """Workers that optimizer state is spread over."""
        return self.recipe.run.workers if self.zero.stage else 1

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.recipe.train.micro_batch_size * self.recipe.data.max_length

    @cached_property
    def recomputed(self) -> int:
        """Decoder layers, the first ones, that are run again in the backward pass."""
        return recomputed_layers(self.recipe, self.counts.layers, on_gpu=self.on_gpu)

    @cached_property
    def is_fast(self) -> bool:
        """Whether layers compute by `kernels`, which keep less."""
        wanted = self.recipe.model.fast_path is not False
        return self.on_gpu and wanted and self.zero.stage < 3 and self.counts.has_fast_form

    @cached_property
    def has_fast_linears(self) -> bool:
        """Whether linear layers with adapters do so too."""
        recipe = self.recipe
        plain = self.is_full or recipe.lora.use_dora or recipe.model.quantization == "int8"
        return self.is_fast and not plain

    @cached_property
    def tiles(self) -> int:
        """Parts in which tokens go through an MLP, each run again in the backward pass; 0: none."""
        return -(-self.tokens // TILE) if self.is_fast and self.tokens > LONG else 0

    @property
    def inputs(self) -> int:
        """Bytes of one layer's input."""
        return self.tokens * self.width * self.counts.hidden

    @cached_property
    def hosted_tables(self) -> int:
        """Weights of the embedding and the head that lie on the host; tied ones go together."""
        counts, head = self.counts, HEAD in self.hosted
        embedding = EMBEDDING in self.hosted and (head or counts.head > 0)
        return counts.embedding * embedding + counts.head * head

    @property
    def streams_state(self) -> bool:
        """Whether the optimizer's averages wait on the host and come in parts, not by pages."""
        plain = self.zero.stage == 0 and self.recipe.train.optimizer in STREAMED
        return bool(self.hosted) and plain

    @property
    def unpacks(self) -> bool:
        """Whether weights are unpacked, or rounded to float8, each time they are multiplied."""
        other = self.recipe.model.quantization != "none" or self.in_float8
        return other and not self.resident

    @property
    def in_float8(self) -> bool:
        """Whether frozen weights are multiplied in float8."""
        return self.recipe.model.compute == "fp8" and self.has_fast_linears


def recomputed_layers(recipe: Recipe, layers: int, *, on_gpu: bool) -> int:
    """Return in how many of `layers` decoder layers `model.gradient_checkpointing` recomputes."""
    choice = recipe.model.gradient_checkpointing
    if choice == "auto":
        tokens = recipe.train.micro_batch_size * recipe.data.max_length
        choice = on_gpu and tokens > RECOMPUTE_FROM_TOKENS
    if isinstance(choice, bool):
        return layers if choice else 0
    return min(choice, layers)


@functools.cache
def zero_of(name: str) -> Zero:
    """Return the memory side of `train.deepspeed`; what cannot be read is taken for stage 2."""
    from raytune_ft.config import zero
    from raytune_ft.errors import RecipeError

    if name == "none":
        return Zero()
    if name in zero.PRESETS:  # none of them sizes its buckets
        host = name.endswith("_offload")
        return Zero(int(name[4]), host, host and name.startswith("zero3"))
    try:
        content = zero.read(name)
    except RecipeError:
        return Zero(2)
    found, block = zero.offloads(content), content.get("zero_optimization") or {}
    bucket: Any = block.get("reduce_bucket_size", zero.AUTO)
    sizes = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return Zero(
        zero.stage_of(content), "offload_optimizer" in found, "offload_param" in found,
        None if bucket == zero.AUTO else int(bucket),
        any(content.get(key, zero.AUTO) != zero.AUTO for key in sizes),
    )  # fmt: skip
