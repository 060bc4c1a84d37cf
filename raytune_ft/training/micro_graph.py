"""Micro-graph: a micro-batch in, its gradient added and its loss out, by one launch.

A pass of few tokens is bound by Python, which starts thousands of kernels: 2,048 tokens of a 7B
take the device 100 ms and the host 311. Here a pass has fixed shapes (`micro_shapes`): forward,
loss, backward and the sums of gradients. The first pass of a shape runs as it is, the very first
one watched; the second is captured as a CUDA graph, and all others replay it. What a replay does
not know is read from memory: tokens, bounds, the seed of the adapters' dropout, the loss's weight.
All graphs work in the same memory (`graph_memory`), and so do first passes of further shapes.

The numbers are those of the same pass without a graph. Seeds are drawn outside, from the same
random state as without, so that resuming needs nothing new. A pass that asks the device, draws or
moves memory cannot be captured; the watch finds that before anything has changed, and the run goes
on without, with one line that says why.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol

import torch

from raytune_ft.config.estimates.pace import GRAPHED_BELOW
from raytune_ft.kernels.dropout import draw_seed
from raytune_ft.kernels.linear import shared_buffers
from raytune_ft.model import fast as fast_path
from raytune_ft.model.capturable import NotFixedError, Watch
from raytune_ft.model.capture import capture
from raytune_ft.model.fastpath.lane import Packed
from raytune_ft.model.loss import TokenLoss
from raytune_ft.training.batching import TensorBatch
from raytune_ft.training.engine import Engine
from raytune_ft.training.graph_memory import GraphMemory
from raytune_ft.training.guarding.room import Room
from raytune_ft.training.laid_out import decoder_layers
from raytune_ft.training.micro_shapes import Shape

log = logging.getLogger(__name__)

SPARE = 32
"""Part of a small device that stays free instead of `HEADROOM`: a layout leaves it no more."""
LOSS = 512
"""Bytes that torch's allocator takes for a number."""
HEADROOM = 2**30
"""Bytes that stay free beside a graph: gradients of a pass, workspaces, answers between steps."""

Tell = Callable[[str], object]
Way = Literal["auto", "fixed"]


class Clock(Protocol):
    """Times passes on the device, `guarding.stragglers.ForwardClock`."""

    def begin(self) -> None: ...

    def end(self) -> None: ...


def attach(engine: Engine, room: Room, tell: Tell, way: Way = "auto") -> MicroStep | None:
    """Let an engine's passes be replayed from graphs, where that is faster and can be.

    Args:
        engine: as it is built; the dry step, if any, is behind it.
        room: whose passes they are.
        tell: gets the line that says why not, where it would be faster.
        way: `fixed` takes fixed shapes on every device, captured or not, which shows on a CPU what
            a GPU would do.
    """
    engine.micro = None
    tokens = room.micro_batch_size * room.recipe.data.max_length
    if way == "auto" and (engine.device.type != "cuda" or tokens >= GRAPHED_BELOW):
        log.debug("passes of %d tokens on %s are not captured", tokens, engine.device.type)
        return None
    if (reason := refusal(engine, room)) is not None:
        tell(_line(reason))
        return None
    engine.micro = MicroStep(engine, room.recipe.data.max_length, tell)
    return engine.micro


def refusal(engine: Engine, room: Room) -> str | None:
    """Return why passes cannot have fixed shapes; None if only a look at one can tell."""
    recipe, module = room.recipe, engine.module
    objective, own = recipe.train.objective, isinstance(module, TokenLoss) and module.has_own_head
    fast = fast_path.report_of(module)
    reasons = {
        f"train.objective: {objective} compares answers": type(module) is not TokenLoss,
        "train.neftune_noise_alpha draws anew": recipe.train.neftune_noise_alpha is not None,
        "data.pack: none makes passes of many lengths": recipe.data.packing == "none",
        "ZeRO-3 parts the weights": any(hasattr(p, "ds_id") for p in module.parameters()),
        "the fast path does not take this model's attention": not (fast.is_on and fast.packed),
        "the model changes its logits behind the head": not own,
        "DeepSpeed sums gradients within them": not engine.sums_apart,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _line(reason: str) -> str:
    return f"passes are not replayed from a CUDA graph, Python's launches bound them: {reason}"


class MicroStep:
    """All fixed passes of an engine, by their shapes."""

    def __init__(self, engine: Engine, length: int, tell: Tell) -> None:
        """Begin without a pass.

        Args:
            engine: whose gradients stay at their places.
            length: tokens of the longest row.
            tell: gets the line that says why not.
        """
        self.engine, self.length, self.tell = engine, length, tell
        self.module: Any = engine.module
        self.layers = decoder_layers(self.module)
        self.clock: Clock | None = None
        self.refused = self.seen_safe = False
        self.may_capture = engine.device.type == "cuda"
        self.captured = 0
        """Graphs made so far."""
        self.memory: GraphMemory | None = None
        self._passes: dict[Shape, _Pass] = {}

    def take(self, batch: TensorBatch, share: float) -> torch.Tensor | None:
        """Add a micro-batch's gradient; return its summed loss, or None if it is not for here.

        Args:
            batch: of `batching.to_tensors`, on the host.
            share: what the loss's gradient is multiplied by.
        """
        if self.refused or not self.module.training or "places" not in batch:
            return None
        shape = Shape.holding(batch, self.length)
        if shape is None or shape.rows * shape.length >= GRAPHED_BELOW:
            return None
        found = self._passes.get(shape)
        if found is None:
            found = self._passes[shape] = _Pass(self, shape)
        state = None if self.seen_safe else _random_state(self.engine.device)
        found.fill(batch, share)
        try:
            return self._timed(found.run)
        except (NotFixedError, torch.OutOfMemoryError) as why:
            if self.seen_safe:
                raise  # out of memory: the step is taken again in another layout
            _put_random_state(self.engine.device, state)
            self._passes.clear()
            self.refused = True
            self.tell(_line(str(why).partition("\n")[0]))
            return None

    def close(self) -> None:
        """Let all passes go, and their memory; what comes next begins anew."""
        held = [one.graph for one in self._passes.values() if one.graph is not None]
        self._passes.clear()
        self.memory = None
        for graph in held:
            graph.reset()
        if held:
            torch.cuda.empty_cache()

    def stay_plain(self, why: str) -> None:
        """Capture nothing from now on; passes keep their shapes, and so their numbers."""
        self.may_capture = False
        self.tell(_line(why))

    def _timed(self, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self.clock is None:
            return run()
        self.clock.begin()
        found = run()
        self.clock.end()
        return found


class _Pass:
    """A pass of one shape: what it reads, and its graph once it is captured."""

    def __init__(self, owner: MicroStep, shape: Shape) -> None:
        self.owner, self.shape = owner, shape
        engine = owner.engine
        self.device = engine.device
        self.places = engine.places()
        self.row = torch.zeros(shape.size, dtype=torch.int64, device=self.device)
        self.weight = torch.ones((), device=self.device)
        drops = owner.module.fast.drops
        self.seed = torch.zeros(1, dtype=torch.int64, device=self.device) if drops else None
        self.ran = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: torch.Tensor | None = None
        self.buffers: list[torch.Tensor] = []
        """That the graph reads and others share."""

    def fill(self, batch: TensorBatch, share: float) -> None:
        """Write a micro-batch, which the shape holds, to where the pass reads."""
        self.owner.engine.places()
        row = self.shape.row(batch)
        if self.device.type == "cuda":
            row = row.pin_memory()
        self.row.copy_(row, non_blocking=True)
        self.weight.fill_(share)
        if self.seed is not None:
            self.seed.copy_(draw_seed(self.device))

    def run(self) -> torch.Tensor:
        """Run what is written; return the summed loss, a detached scalar of its own."""
        if self.graph is None and self.ran and self.owner.may_capture:
            self._capture()
        if self.graph is None or self.output is None:
            return self._plainly()
        self.graph.replay()
        return self.output.clone()  # the next replay writes there

    def work(self) -> torch.Tensor:
        """Compute the pass: all of it, and nothing that a graph could not repeat.

        Of what hooks do when a gradient is made, a graph repeats the sums, and counts no beat.
        """
        with _without_states(self.owner.layers):
            total = self._loss()
            (total * self.weight).backward()  # type: ignore[no-untyped-call]
        return total.detach()

    def watched(self) -> torch.Tensor:
        """Do the same under a watch; NotFixedError leaves no gradient behind."""
        if not any(bool(place.any()) for place in self.places.values()):
            return self._watched_from_zero()
        # gradients beside those of earlier passes, until all are there
        parameters = [self.owner.engine.trained[name] for name in self.places]
        with Watch(), _without_states(self.owner.layers):
            total = self._loss()
            made = torch.autograd.grad(total * self.weight, parameters, allow_unused=True)
        with torch.no_grad():
            for place, gradient in zip(self.places.values(), made, strict=True):
                if gradient is not None:
                    place.add_(gradient)
        return total.detach()

    def _watched_from_zero(self) -> torch.Tensor:
        """Do so as a step's first pass, which takes no memory that others do not take."""
        try:
            with Watch():
                return self.work()
        except (NotFixedError, torch.OutOfMemoryError):
            with torch.no_grad():
                for place in self.places.values():
                    place.zero_()
            raise

    def _loss(self) -> torch.Tensor:
        parts = self.shape.parts(self.row)
        packed = Packed(parts.cu_seqlens.int(), self.shape.length, self.seed)
        losses = self.owner.module.losses_at(
            parts.input_ids, parts.position_ids, parts.places, parts.targets, packed
        )
        counted = torch.arange(self.shape.places, device=self.device) < parts.count
        return torch.where(counted, losses, 0.0).sum()

    def _plainly(self) -> torch.Tensor:
        memory = self.owner.memory
        if memory is not None and self.owner.may_capture:
            return self._borrowing(memory)
        found = self.work() if self.owner.seen_safe else self.watched()
        self.owner.seen_safe = self.ran = True
        return found

    def _borrowing(self, memory: GraphMemory) -> torch.Tensor:
        with memory.lent():
            inside = self.work()
        found = inside.clone()
        del inside
        self.ran = True
        if (left := memory.left()) > LOSS:
            self.owner.close()
            self.owner.stay_plain(f"a pass keeps {left:,} bytes for later ones")
        return found

    def _capture(self) -> None:
        owner, device = self.owner, self.device
        gc.collect()
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        torch.cuda.empty_cache()
        free, whole = torch.cuda.mem_get_info(device)
        spare = min(HEADROOM, whole // SPARE)
        if free < idle * (not owner.captured) + spare:  # the first one takes what passes took
            owner.stay_plain(f"{free:,} bytes are free, {idle + spare:,} are wanted")
            return
        if owner.memory is None:
            owner.memory = GraphMemory(device)
        try:
            self.graph, self.output = capture(self.work, owner.memory.pool, owner.memory.stream)
        except RuntimeError as why:
            owner.stay_plain(str(why).partition("\n")[0])
        else:
            self.buffers = shared_buffers()
            owner.captured += 1


@contextmanager
def _without_states(layers: list[Any]) -> Iterator[None]:
    """Let layers run again without torch's random state, which a capture may not touch.

    Nothing draws in a pass that the watch let through: masks come from the seed.
    """
    again = [layer for layer in layers if layer.gradient_checkpointing]
    before = [layer._gradient_checkpointing_func for layer in again]
    for layer in again:
        own = layer._gradient_checkpointing_func  # it may take the layer's input to the host
        layer._gradient_checkpointing_func = partial(own, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer, func in zip(again, before, strict=True):
            layer._gradient_checkpointing_func = func


def _random_state(device: torch.device) -> torch.Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _put_random_state(device: torch.device, state: torch.Tensor | None) -> None:
    if state is None:
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
