"""Decoding: prompts in, the logits of each row's next token out, one forward pass a token.

Two ways with one interface. The plain one runs the model as it is over a cache that grows; it
takes every model and is the reference. On a CUDA device a step of a large model is bound by the
launches of its kernels, so there the tokens behind a prompt take steps of fixed shapes: the first
is run as it is and watched, the second is captured as a CUDA graph, and all others replay it. A
model whose step asks the device for a number, draws, or moves weights cannot be captured; the
watch sees that in the first step, before any harm is done, and the plain way goes on.

Weights may change between two steps in place, as an optimizer does it. No random state is touched.

Shapes: B = rows not yet ended, P = longest prompt, n = tokens so far, V = words, S = tokens that
the fixed cache has room for, R = rows of it, ended ones included.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from raytune_ft.model.capturable import NotFixedError, Watch
from raytune_ft.model.capture import aside, capture, stream_of
from raytune_ft.model.hosting import is_hosted
from raytune_ft.model.loss import causal_model

if TYPE_CHECKING:
    from transformers import Cache

log = logging.getLogger(__name__)

WORTHWHILE = 8
"""Tokens to come that pay for a capture, which takes as long as one or two plain steps."""
TOKENS_AHEAD = 2048
"""Of all rows together, for which a fixed cache is made; longer answers get another one."""
SMALLEST = 256
"""S at least; it is a power of two, so that few graphs serve many prompts."""
HEADROOM = 2**30
"""Bytes that a captured step may take beside the cache: a layer's weights in full, the logits."""

Way = Literal["auto", "plain", "fixed"]


class Graphs:
    """Steps of one model that were captured once, lent to one decoder at a time.

    Whoever asks a model again and again keeps one of these; `close` gives the memory back.
    """

    def __init__(self, way: Way = "auto") -> None:
        """Begin without a step.

        Args:
            way: `auto` captures where there is CUDA; `plain` never; `fixed` takes fixed shapes
                on every device, captured or not, which shows on a CPU what a GPU would do.
        """
        self.way = way
        self.seen_safe = False
        self.refused = False
        self.may_capture = True
        self.captured = 0
        """Graphs made so far."""
        self._idle: dict[tuple[int, int], _Step] = {}
        self._weights = 0

    def can(self, model: nn.Module, device: torch.device) -> bool:
        """Return whether a model may be tried."""
        if self.way == "plain" or (self.way == "auto" and device.type != "cuda") or self.refused:
            return False
        if is_hosted(model):  # its head comes by a stream of its own, and takes longer than starts
            return False
        # ZeRO-3 gives a weight's memory back behind the layer
        return not any(hasattr(weight, "ds_id") for weight in model.parameters())

    def step(self, model: nn.Module, cache: Any, rows: int, size: int) -> _Step:
        """Return a step for `rows` of `size` tokens; NotFixedError where memory is short."""
        weights = _addresses(model)
        if weights != self._weights:  # a graph reads weights where they were
            self.close()
            self._weights = weights
        found = self._idle.pop((rows, size), None)
        if found is not None:
            return found
        self.close()
        return _Step(self, model, cache, rows, size)

    def give(self, step: _Step) -> None:
        """Keep a step for whoever comes next; the one of the same shapes before it goes."""
        self._idle[step.rows, step.size] = step

    def close(self) -> None:
        """Let all idle steps go, and their memory."""
        held = [step.graph for step in self._idle.values() if step.graph is not None]
        self._idle.clear()
        for graph in held:
            graph.reset()
        if held:  # what a graph's own pool held serves nobody else until it is given back
            torch.cuda.empty_cache()


class Decoder:
    """Rows that are written side by side, and what the model remembers of them.

    `logits` and `append` take turns; the caller holds the model in evaluation, without gradients.
    """

    def __init__(
        self, model: nn.Module, prompts: Sequence[Sequence[int]], room: int, graphs: Graphs
    ) -> None:
        """Take prompts; nothing runs yet.

        Args:
            model: a causal language model, quantised or not, with or without an adapter.
            prompts: at least one, of at least one id each.
            room: tokens that the longest answer may have.
            graphs: of this model.
        """
        from transformers import DynamicCache

        self.model, self.graphs = model, graphs
        device = next(model.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        self.n = longest
        self.end = longest + room
        sizes = torch.tensor([len(prompt) for prompt in prompts], device=device)
        self.padding = longest - sizes  # (B,)
        padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self.ids = torch.tensor(padded, device=device)  # new of each row: (B, P), then (B, 1)
        self.cache: Any = DynamicCache(config=causal_model(model).config)
        self.step: _Step | None = None
        self.places = torch.arange(len(prompts), device=device)  # of the rows in the fixed cache
        self.may_fix = room >= WORTHWHILE and graphs.can(model, device)

    def logits(self) -> torch.Tensor:
        """Run what is new of each row; return the last logits, float32 (B, V), until the next."""
        if self.may_fix and self.ids.shape[1] == 1 < self.n:  # a prompt may be one token
            try:
                return self._fixed()
            except (NotFixedError, torch.OutOfMemoryError) as why:
                log.debug("decoding goes on the plain way: %s", why)
                self._unfix()
        return self._plain()

    def append(self, chosen: Sequence[int]) -> None:
        """Put one id behind each row."""
        self.ids = torch.tensor(chosen, device=self.ids.device)[:, None]
        self.n += 1

    def keep(self, rows: Sequence[int]) -> None:
        """Let all other rows go; some of their memory may stay until fewer than half are left."""
        index = torch.tensor(rows, dtype=torch.long, device=self.ids.device)
        self.ids, self.padding = self.ids[index], self.padding[index]
        if self.step is not None:
            self.places = self.places[index]
            return
        self.places = torch.arange(len(rows), device=index.device)
        if rows and self.cache.get_seq_length():
            self.cache.batch_select_indices(index)

    def close(self) -> None:
        """Give the step back to whom it belongs."""
        if self.step is not None:
            self.graphs.give(self.step)
        self.step = self.cache = None

    def _plain(self) -> torch.Tensor:
        columns = torch.arange(self.n, device=self.ids.device)
        new = columns[self.n - self.ids.shape[1] :]
        positions = (new - self.padding[:, None]).clamp_(min=0)
        padded = bool(self.padding.any())
        outputs = self.model(
            input_ids=self.ids,
            attention_mask=(columns >= self.padding[:, None]).long() if padded else None,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = outputs.logits[:, -1].float()
        return logits

    def _fixed(self) -> torch.Tensor:
        held, step, places = self.n - 1, self.step, self.places
        rows = len(places)
        if step is None or held == step.size or (step.rows > 2 and 2 * rows <= step.rows):
            step = self._moved(held, _power_of_two(rows))
            places = torch.arange(rows, device=places.device)
        step.ids.index_copy_(0, places, self.ids)
        logits = step.run()
        self.step, self.places, self.cache = step, places, None  # not before all went well
        return logits if rows == step.rows else logits[places]

    def _moved(self, held: int, rows: int) -> _Step:
        """Put `held` tokens of the rows that go on into a step that has room for more."""
        from raytune_ft.model import fixed_cache

        old = self.cache if self.step is None else self.step.cache
        if self.step is None and not fixed_cache.is_growing(old):
            raise NotFixedError("a cache of another kind")
        ahead = min(self.end - held, max(TOKENS_AHEAD // rows, SMALLEST // 2))
        size = max(SMALLEST, _power_of_two(held + ahead))
        new = self.graphs.step(self.model, old, rows, size)
        index = torch.arange(rows, device=self.places.device).clamp_(max=len(self.places) - 1)
        new.begin(old, self.places[index], self.padding[index], held)
        return new

    def _unfix(self) -> None:
        """Go on the plain way."""
        from raytune_ft.model import fixed_cache

        self.may_fix = False
        if self.step is not None:
            config = causal_model(self.model).config
            self.cache = fixed_cache.growing(config, self.step.cache, self.places, self.n - 1)
            self.step = None


class _Step:
    """One forward pass of fixed shapes: what goes in, the cache, and the graph once captured."""

    def __init__(self, graphs: Graphs, model: nn.Module, cache: Any, rows: int, size: int) -> None:
        from raytune_ft.model import fixed_cache

        self.graphs, self.model, self.rows, self.size = graphs, model, rows, size
        device = cache.layers[0].keys.device
        _check_memory(device, fixed_cache.bytes_of(cache, rows, size))
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.padding = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self.mask = torch.ones(rows, size, dtype=torch.long, device=device)
        self.cache: Cache = fixed_cache.fixed(cache, size, self.place, rows)
        config = causal_model(model).config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        # rows that have ended go on unread, and must not ask for a position that is not there
        self.last_position = size if context is None else int(context) - 1
        self.stream = stream_of(device) if device.type == "cuda" else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.output: torch.Tensor | None = None

    def begin(self, cache: Any, rows: torch.Tensor, padding: torch.Tensor, held: int) -> None:
        """Take over `held` tokens of the given rows (R,) with their padding (R,)."""
        from raytune_ft.model import fixed_cache

        fixed_cache.fill(self.cache, cache, rows, held)
        self.place.fill_(held)
        self.padding.copy_(padding[:, None])
        self.mask.copy_(torch.arange(self.size, device=padding.device) >= padding[:, None])

    def run(self) -> torch.Tensor:
        """Run `ids`; return the logits, float32 (R, V), which the next run overwrites."""
        if self.graph is None and self.output is not None and self.graphs.may_capture:
            self._capture()
        if self.graph is None or self.output is None:
            self.output = self._aside()
        else:
            self.graph.replay()
        return self.output

    def _aside(self) -> torch.Tensor:
        """Run as it is, on the stream that a capture will use, and watch the first time."""
        if self.stream is None:
            return self._watched()
        with aside(self.stream.device):
            return self._watched()

    def _watched(self) -> torch.Tensor:
        if self.graphs.seen_safe:
            return self._forward()
        try:
            with Watch():
                found = self._forward()
        except NotFixedError:
            self.graphs.refused = True  # no use to try it at the next prompts
            raise
        self.graphs.seen_safe = True
        return found

    def _forward(self) -> torch.Tensor:
        outputs = self.model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=(self.place - self.padding).clamp_(max=self.last_position),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.place += 1
        logits: torch.Tensor = outputs.logits[:, -1].float()
        return logits

    def _capture(self) -> None:
        if self.stream is None:
            return
        device = self.stream.device
        try:
            check_room(device)
            self.graph, self.output = capture(
                self._forward, torch.cuda.graph_pool_handle(), self.stream
            )
        except NotFixedError:
            self.graphs.may_capture = False
        except RuntimeError as why:
            self.graphs.may_capture = False
            log.warning("decoding is not captured and slower: %s", str(why).partition("\n")[0])
        else:
            self.graphs.captured += 1


def check_room(device: torch.device) -> None:
    """Give back what lies idle; raise NotFixedError where a capture has too little memory."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info(device)[0] < HEADROOM:
        raise NotFixedError("too little memory is free")


def _check_memory(device: torch.device, needed: int) -> None:
    if device.type != "cuda":
        return
    idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + idle
    if free < needed + HEADROOM:
        raise NotFixedError(f"{needed + HEADROOM:,} bytes wanted, {free:,} free")


def _addresses(model: nn.Module) -> int:
    """Return where all weights are, as one number."""
    return hash(tuple(weight.data_ptr() for weight in model.parameters()))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()
