"""Lanes: answers of different lengths side by side in, the logits of each one's next token out.

A prompt runs alone over transformers' own growing cache (`prefill`), from wherever keys and values
are known. Then its row is copied into a lane, which holds keys and values of R answers of up to S
tokens in fixed places and runs one token of each in one pass. Rows come and go between passes;
those in use stand in front. Each row has its own position and its own mask, so that what it gets
does not depend on the others, but for the order in which a GEMM of more rows adds.

A pass reads the first rows and tokens only. On a CUDA device these are rounded up to a few
shapes, and each shape's second pass is captured as a graph (`model.decoding`).

Shapes: B = rows in use, R = rows that there is room for, S = tokens of a row, T = tokens that a
pass looks at, V = words, H = key heads, D = width of a head.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from raytune_ft.model import decoding, fixed_cache
from raytune_ft.model.capturable import NotFixedError, Watch
from raytune_ft.model.loss import causal_model

log = logging.getLogger(__name__)

Kept = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (1, H, n, D)."""

FULL, SLIDING = "full_attention", "sliding_attention"
SMALLEST = 256
GRANULE = 32
"""Tokens to which a pass on a CPU rounds up what it looks at."""
GRAPHS = 48
"""Shapes of one lane that stay captured."""
ROW_STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
CLOSE, CLOSE_IN_HALVES = 1e-4, 0.05
"""Of the largest logit, between a lane and plain passes. Halves also where layers are int8: they
round activations by row, and choose the columns that stay float by the whole batch."""


class NotBatchedError(Exception):
    """A model cannot answer several requests at a time here; says why."""


class Choosing(Protocol):
    """Switches a model to an adapter or to none for a while."""

    def __call__(self) -> AbstractContextManager[Any]:
        """Return the context of one pass."""


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return what a model's states are in; weights may be whole numbers."""
    weights = (weight.dtype for weight in model.parameters())
    return next((dtype for dtype in weights if dtype.is_floating_point), torch.bfloat16)


def size_for(tokens: int, context: int) -> int:
    """Return S for a row of so many tokens: 256, 384, 512, 768, ... but the context at most."""
    size = SMALLEST
    while size < tokens:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, max(context, tokens))


def prefill(model: nn.Module, cache: DynamicCache, ids: Sequence[int], start: int) -> torch.Tensor:
    """Run a part of one prompt, whose first token is the `start`-th; return float32 (1, V)."""
    device = next(model.parameters()).device
    outputs = model(
        input_ids=torch.tensor([list(ids)], device=device),
        position_ids=torch.arange(start, start + len(ids), device=device)[None],
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits: torch.Tensor = outputs.logits[:, -1].float()
    return logits


def growing(kept: Kept | None = None, n: int = 0) -> DynamicCache:
    """Return a growing cache with the first `n` tokens of what was kept, which stays as it is."""
    # without a config no layer forgets what lies before its window: masks hide it
    cache = DynamicCache()
    for index, (keys, values) in enumerate(kept or ()):
        cache.update(keys[:, :, :n], values[:, :, :n], index)
    return cache


def contents(cache: Cache) -> Kept:
    """Return the keys and values of a growing cache."""
    return [(layer.keys, layer.values) for layer in cache.layers]


class _Where:
    """What all layers of a lane share during a pass."""

    def __init__(self) -> None:
        self.index = self.places = torch.zeros(0, dtype=torch.long)  # (B,)
        self.shown = 0


class _RowsLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values (R, H, S, D) of one layer; each row's next token has its own place."""

    is_sliding = False

    def __init__(self, like: CacheLayerMixin, rows: int, size: int, where: _Where) -> None:
        super().__init__()
        self.keys, self.values = (
            # zeros: what is masked is still multiplied, and memory as it comes may hold a NaN
            some.new_zeros(rows, some.shape[1], size, some.shape[3])
            for some in (like.keys, like.values)
        )
        self.where = where
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Do nothing: all is there."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Put one token of each row (B, H, 1, D) in; return what the pass looks at."""
        where = self.where
        self.keys[where.index, :, where.places] = key_states[:, :, 0]
        self.values[where.index, :, where.places] = value_states[:, :, 0]
        some = slice(len(where.index))
        return self.keys[some, :, : where.shown], self.values[some, :, : where.shown]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys there are, and the first one's place."""
        return self.where.shown, 0

    def get_seq_length(self) -> int:
        """Return a length behind which the next token sees every key that its mask allows."""
        return self.where.shown - 1

    def get_max_length(self) -> int:
        """Return S."""
        return int(self.keys.shape[2])


class Lane:
    """R rows of S tokens of one model, the first B of them in use."""

    def __init__(self, model: nn.Module, like: Cache, size: int, rows: int) -> None:
        """Take memory for `rows` rows of `size` tokens, shaped as the layers of `like` are."""
        self.model, self.size, self.rows = model, size, rows
        self.lengths: list[int] = []
        """Tokens whose keys and values each row in use has."""
        self._where = _Where()
        layers = [_RowsLayer(layer, rows, size, self._where) for layer in like.layers]
        self.cache: Cache = Cache(layers=layers)
        self.device: torch.device = layers[0].keys.device
        self._masks = _Masks(model)
        self._begin()

    def _begin(self) -> None:
        self._inputs = torch.zeros(2, self.rows, dtype=torch.long, device=self.device)
        self._index = torch.arange(self.rows, device=self.device)
        self._columns = torch.arange(self.size, device=self.device)
        self._graphs = _Captured(self.device)

    def grow(self, rows: int) -> None:
        """Make room for more rows; captured passes are made anew."""
        for layer in self.cache.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_zeros(rows, *old.shape[1:])
                new[: self.rows] = old
                setattr(layer, name, new)
                del old, new
        self.close()
        self.rows = rows
        self._begin()

    def join(self, cache: Cache, n: int) -> None:
        """Put `n` tokens of one prompt behind the rows in use."""
        place = len(self.lengths)
        for layer, (keys, values) in zip(self.cache.layers, contents(cache), strict=True):
            layer.keys[place, :, :n] = keys[0, :, :n]
            layer.values[place, :, :n] = values[0, :, :n]
        self.lengths.append(n)

    def leave(self, place: int) -> None:
        """Let a row go; the last one takes its place."""
        last = len(self.lengths) - 1
        if place < last:
            n = self.lengths[last]
            for layer in self.cache.layers:
                layer.keys[place, :, :n] = layer.keys[last, :, :n]
                layer.values[place, :, :n] = layer.values[last, :, :n]
            self.lengths[place] = n
        self.lengths.pop()

    def copy_of(self, place: int) -> Kept:
        """Return a row's keys and values, on their own."""
        n, row = self.lengths[place], slice(place, place + 1)
        return [
            (layer.keys[row, :, :n].clone(), layer.values[row, :, :n].clone())
            for layer in self.cache.layers
        ]

    def decode(self, ids: Sequence[int]) -> torch.Tensor:
        """Run one token of each row; return float32 (B, V), which the next pass may overwrite."""
        shown, rows = max(self.lengths) + 1, len(ids)
        if self.device.type == "cuda":
            wide = next((step for step in ROW_STEPS if step >= rows), rows)
            rows, shown = min(wide, self.rows), min(size_for(shown, self.size), self.size)
        else:
            shown = min(-(-shown // GRANULE) * GRANULE, self.size)
        idle = [0] * (rows - len(ids))
        self._inputs[:, :rows] = torch.tensor([[*ids, *idle], [*self.lengths, *idle]])
        logits = self._graphs.run((rows, shown), lambda: self._forward(rows, shown))
        self.lengths = [n + 1 for n in self.lengths]
        return logits[: len(ids)]

    def close(self) -> None:
        """Let captured passes go."""
        self._graphs.close()

    def _forward(self, rows: int, shown: int) -> torch.Tensor:
        where = self._where
        where.index, where.places, where.shown = self._index[:rows], self._inputs[1, :rows], shown
        outputs = self.model(
            input_ids=self._inputs[0, :rows, None],
            attention_mask=self._masks(where.places, self._columns[:shown]),
            position_ids=where.places[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = outputs.logits[:, -1].float()
        return logits


class _Masks:
    """Masks of one token per row, as a model's attention takes them."""

    def __init__(self, model: nn.Module) -> None:
        config = causal_model(model).config.get_text_config()
        self.window: int | None = getattr(config, "sliding_window", None)
        kinds = set(getattr(config, "layer_types", None) or ())
        self.kinds = kinds or {SLIDING if self.window else FULL}
        if not self.kinds <= {FULL, SLIDING}:
            raise NotBatchedError(f"layers of kind {', '.join(sorted(self.kinds))}")
        self.added = config._attn_implementation == "eager"
        self.dtype = model_dtype(model)

    def __call__(self, places: torch.Tensor, columns: torch.Tensor) -> Any:
        """Return (B, 1, 1, T), or one for each kind of layer where a model has both."""
        made = {kind: self._of(kind, places, columns) for kind in sorted(self.kinds)}
        return made if len(made) > 1 else next(iter(made.values()))

    def _of(self, kind: str, places: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        seen = columns <= places[:, None]
        if kind == SLIDING and self.window is not None:
            seen = seen & (columns > places[:, None] - self.window)
        seen = seen[:, None, None]
        if not self.added:
            return seen
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, lowest)


class _Captured:
    """Passes of one lane by their shape: plain the first time, captured from the second on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.may = device.type == "cuda"
        self._known: OrderedDict[tuple[int, int], tuple[Any, torch.Tensor] | None] = OrderedDict()
        self._pool: Any = None
        self._safe = False

    def run(self, key: tuple[int, int], forward: Any) -> torch.Tensor:
        """Run a pass of the shape `key`."""
        if not self.may:
            found: torch.Tensor = forward()
            return found
        known = self._known.get(key)
        if known is not None:
            self._known.move_to_end(key)
            known[0].replay()
            return known[1]
        if key in self._known:
            return self._capture(key, forward)
        self._known[key] = None
        return self._first(forward)

    def _first(self, forward: Any) -> torch.Tensor:
        """Run as it is, on the stream of captures; the first of all is watched."""
        found: torch.Tensor
        with decoding.aside(self.device):
            if self._safe:
                found = forward()
                return found
            try:
                with Watch():
                    found = forward()
                self._safe = True
            except NotFixedError as why:
                log.warning("passes are not captured and slower: %s", why)
                self.may = False
                found = forward()
        return found

    def _capture(self, key: tuple[int, int], forward: Any) -> torch.Tensor:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            graph, output = decoding.captured(self.device, self._pool, forward)
        except (RuntimeError, NotFixedError) as why:
            log.warning("passes are not captured and slower: %s", str(why).partition("\n")[0])
            self.may = False
            found: torch.Tensor = forward()
            return found
        self._known[key] = (graph, output)
        held = [other for other, made in self._known.items() if made is not None]
        if len(held) > GRAPHS:
            self._drop(held[0])
        graph.replay()
        return output

    def _drop(self, key: tuple[int, int]) -> None:
        made = self._known.pop(key)
        if made is not None:
            made[0].reset()

    def close(self) -> None:
        """Let all go, and their memory."""
        some = any(self._known.values())
        for key in list(self._known):
            self._drop(key)
        if some:
            torch.cuda.empty_cache()


def probed(model: nn.Module) -> Cache:
    """Return a cache of one row whose layers show what a lane's must look like.

    Raises:
        NotBatchedError: the model keeps something else than keys and values by token, or a lane
            gives other logits than plain passes do.
    """
    ids = [1, 2, 3, 4, 5, 6, 7]
    with torch.no_grad():
        known: Any = DynamicCache(config=causal_model(model).config)
        prefill(model, known, ids[:2], 0)
        if not fixed_cache.is_growing(known):
            raise NotBatchedError("its cache holds more than keys and values by token")
        like = growing()
        prefill(model, like, ids[:2], 0)
        plain = [prefill(model, growing(), ids[start:6], 0) for start in (0, 3)]
        _compare(model, like, ids, plain)
    return like


def _compare(model: nn.Module, like: Cache, ids: list[int], plain: list[torch.Tensor]) -> None:
    """Check two rows of different lengths against whole passes over their tokens."""
    lane = Lane(model, like, GRANULE, 3)
    lane._graphs.may = False
    for start in (0, 3):
        cache = growing()
        prefill(model, cache, ids[start:4], 0)
        lane.join(cache, 4 - start)
    for token in ids[4:6]:
        found = lane.decode([token, token])
    expected = torch.cat(plain)
    exact = model_dtype(model) is torch.float32 and not getattr(model, "is_loaded_in_8bit", False)
    far = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
    if not bool(far <= (CLOSE if exact else CLOSE_IN_HALVES)):
        raise NotBatchedError(f"rows side by side differ from rows alone by {float(far):.1e}")
