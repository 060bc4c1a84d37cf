"""Lanes: answers of different lengths side by side in, the logits of each one's next token out.

A lane holds keys and values of R answers of up to S tokens in fixed places and runs one token of
each in one pass. Rows come and go between passes; those in use stand in front. Prompts begin as
new rows, several in one pass from wherever their keys and values are known (`Lane.extend`); one
too long for that runs in parts over transformers' own growing cache (`prefill`) and joins behind.
Each row has its own positions and its own mask, so that what it gets does not depend on the
others, but for the order in which a GEMM of more rows adds.

A pass reads the first rows and tokens only. On a CUDA device its sizes are rounded up to a few
shapes, and each shape's second pass is captured as a graph (`model.decoding`).

Shapes: B = rows of a pass, P = tokens of each in it, R = rows that there is room for, S = tokens
of a row, T = tokens that a pass looks at, V = words, H = key heads, D = width of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin

from raytune_ft.model import fixed_cache
from raytune_ft.model.loss import causal_model
from raytune_ft.model.replayed import Replayed

log = logging.getLogger(__name__)

Kept = list[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer, (1, H, n, D)."""

FULL, SLIDING = "full_attention", "sliding_attention"
SMALLEST = 256
GRANULE = 32
"""Tokens to which a pass on a CPU rounds up what it looks at."""
ROW_STEPS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
WIDTH_STEPS = (8, 16, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
CLOSE, CLOSE_IN_HALVES = 0.01, 0.2
"""Of the logits' spread, between a lane and plain passes (root mean squares). Sums in another
order leave up to 5e-4 in float32 (30 trained layers, measured), a token too many or too few in a
mask 1 to 5. Halves also where layers are int8: they round activations by row, and choose the
columns that stay float by the whole batch."""


class NotBatchedError(Exception):
    """A model cannot answer several requests at a time here; says why."""


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
        self.index = torch.zeros(0, dtype=torch.long)
        """Rows (B,)."""
        self.places = torch.zeros(0, 0, dtype=torch.long)
        """Of each row's new tokens (B, P)."""
        self.shown = 0
        self.some: slice | None = None
        """The same rows where they are read as they lie."""


class _RowsLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values (R, H, S, D) of one layer; each row's new tokens have places of their own."""

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
        """Put the new tokens of each row (B, H, P, D) in; return what the pass looks at."""
        where = self.where
        rows = where.index[:, None]
        self.keys[rows, :, where.places] = key_states.transpose(1, 2)
        self.values[rows, :, where.places] = value_states.transpose(1, 2)
        keys, values = self.keys[:, :, : where.shown], self.values[:, :, : where.shown]
        if where.some is not None:
            return keys[where.some], values[where.some]
        return keys.index_select(0, where.index), values.index_select(0, where.index)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys there are, and the first one's place."""
        return self.where.shown, 0

    def get_seq_length(self) -> int:
        """Return a length behind which new tokens see every key that their mask allows."""
        return self.where.shown - 1

    def get_max_length(self) -> int:
        """Return S."""
        return int(self.keys.shape[2])


class _RowsCache(Cache):  # type: ignore[misc]
    """The layers of a lane."""

    def __init__(self, layers: list[_RowsLayer], where: _Where) -> None:
        super().__init__(layers=layers)
        self._where = where

    @property
    def places(self) -> torch.Tensor:
        """Each new token's place in its row (B, P), for positions that are biases (ALiBi)."""
        return self._where.places


class Lane:
    """R rows of S tokens of one model, the first of them in use."""

    def __init__(self, model: nn.Module, like: Cache, size: int, rows: int) -> None:
        """Take memory for `rows` rows of `size` tokens, shaped as the layers of `like` are."""
        self.model, self.size, self.rows = model, size, rows
        self.lengths: list[int] = []
        """Tokens whose keys and values each row in use has."""
        self._where = _Where()
        layers = [_RowsLayer(layer, rows, size, self._where) for layer in like.layers]
        self.cache = _RowsCache(layers, self._where)
        self.device: torch.device = layers[0].keys.device
        self._masks = _Masks(model)
        self._columns = torch.arange(size, device=self.device)
        self._begin()

    def _begin(self) -> None:
        self._inputs = torch.zeros(2, self.rows, dtype=torch.long, device=self.device)
        self._index = torch.arange(self.rows, device=self.device)
        self._prompts: dict[tuple[int, int], torch.Tensor] = {}
        self._rows: dict[int, list[torch.Tensor]] = {}
        self._graphs = Replayed(self.device)

    def grow(self, rows: int) -> None:
        """Make room for more rows; captured passes are made anew."""
        self._rows.clear()  # views, which would keep every layer's former memory until the end
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

    def join(self, kept: Kept, n: int) -> None:
        """Begin a row behind those in use with `n` tokens of what is kept."""
        place = len(self.lengths)
        if n:
            some = [part[0, :, :n] for pair in kept for part in pair]
            torch._foreach_copy_([row[:, :n] for row in self._row(place)], some)
        self.lengths.append(n)

    def leave(self, place: int) -> None:
        """Let a row go; the last one takes its place."""
        last = len(self.lengths) - 1
        if place < last:
            # whole rows, dense ones: a few kernels for all layers
            torch._foreach_copy_(self._row(place), self._row(last))
            self.lengths[place] = self.lengths[last]
        self.lengths.pop()

    def copy_of(self, place: int) -> Kept:
        """Return a row's keys and values, on their own."""
        n = self.lengths[place]
        some = [part[:, :n] for part in self._row(place)]
        if len({part.shape for part in some}) == 1:
            new = list(some[0].new_empty(len(some), *some[0].shape).unbind())
        else:
            new = [part.new_empty(part.shape) for part in some]
        torch._foreach_copy_(new, some)
        return [
            (keys[None], values[None]) for keys, values in zip(new[::2], new[1::2], strict=True)
        ]

    def _row(self, place: int) -> list[torch.Tensor]:
        """Return keys and values (H, S, D) of all layers of one row, layer by layer.

        Views, which stay: making some dozens of them takes longer than what is done with them.
        """
        if place not in self._rows:
            layers = self.cache.layers
            self._rows[place] = [part[place] for one in layers for part in (one.keys, one.values)]
        return self._rows[place]

    def decode(self, ids: Sequence[int]) -> torch.Tensor:
        """Run one token of each row; return float32 (B, V), which the next pass may overwrite."""
        rows, shown = len(ids), self._shown(max(self.lengths) + 1)
        if self.device.type == "cuda":
            rows = min(_up(rows, ROW_STEPS), self.rows)
        idle = [0] * (rows - len(ids))
        self._inputs[:, :rows] = torch.tensor([[*ids, *idle], [*self.lengths, *idle]])

        def forward() -> torch.Tensor:
            new, places = self._inputs[:, :rows, None]
            return self._forward(new, places, self._index[:rows], shown, slice(rows))

        logits = self._graphs.run((rows, 1, shown), forward)
        self.lengths = [n + 1 for n in self.lengths]
        return logits[: len(ids)]

    def extend(self, ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run some tokens of each of the last rows; return float32 (B, V) behind their last ones.

        Tokens stand at the right of P; what fills up on the left writes to the last place of its
        row, which a token takes before any other looks there.
        """
        first, n_rows = len(self.lengths) - len(ids), len(ids)
        rows, width = n_rows, max(map(len, ids))
        shown = self._shown(
            max(n + len(new) for n, new in zip(self.lengths[first:], ids, strict=True))
        )
        some: slice | None = slice(first, first + rows)
        if self.device.type == "cuda":  # a graph reads the same rows each time, but by an index
            rows, width, some = _up(rows, ROW_STEPS), _up(width, WIDTH_STEPS), None
        filled = [self._filled(first + at, new, width) for at, new in enumerate(ids)]
        filled += [[[0] * width, [self.size - 1] * width, [first] * width]] * (rows - n_rows)
        given = torch.tensor(filled).transpose(0, 1)  # (3, B, P)
        inputs = given
        if self.device.type == "cuda":  # a graph reads them where they were at its capture
            inputs = self._prompts.setdefault((rows, width), given.to(self.device).contiguous())
            inputs.copy_(given)

        def forward() -> torch.Tensor:
            return self._forward(inputs[0], inputs[1], inputs[2, :, 0], shown, some)

        logits = self._graphs.run((rows, width, shown), forward)
        for at, new in enumerate(ids):
            self.lengths[first + at] += len(new)
        return logits[:n_rows]

    def close(self) -> None:
        """Let captured passes go."""
        self._graphs.close()

    def _filled(self, row: int, ids: Sequence[int], width: int) -> list[list[int]]:
        """Return the ids, places and row of one row's tokens in a pass of so many."""
        idle, n = width - len(ids), self.lengths[row]
        places = [self.size - 1] * idle + list(range(n, n + len(ids)))
        return [[0] * idle + list(ids), places, [row] * width]

    def _shown(self, tokens: int) -> int:
        if self.device.type == "cuda":
            return min(size_for(tokens, self.size), self.size)
        return min(-(-tokens // GRANULE) * GRANULE, self.size)

    def _forward(
        self,
        ids: torch.Tensor,
        places: torch.Tensor,
        index: torch.Tensor,
        shown: int,
        some: slice | None,
    ) -> torch.Tensor:
        where = self._where
        where.index, where.places, where.shown, where.some = index, places, shown, some
        outputs = self.model(
            input_ids=ids,
            attention_mask=self._masks(places, self._columns[:shown]),
            position_ids=places,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = outputs.logits[:, -1].float()
        return logits


def _up(least: int, steps: Sequence[int]) -> int:
    return next((step for step in steps if step >= least), least)


class _Masks:
    """Masks of a pass, as a model's attention takes them."""

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
        """Return (B, 1, P, T), or one for each kind of layer where a model has both."""
        made = {kind: self._of(kind, places, columns) for kind in sorted(self.kinds)}
        return made if len(made) > 1 else next(iter(made.values()))

    def _of(self, kind: str, places: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        seen = columns <= places[:, :, None]
        if kind == SLIDING and self.window is not None:
            seen = seen & (columns > places[:, :, None] - self.window)
        seen = seen[:, None]
        if not self.added:
            return seen
        lowest = torch.finfo(self.dtype).min
        return torch.zeros_like(seen, dtype=self.dtype).masked_fill(~seen, lowest)


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
        try:
            _compare(model, like, ids, plain)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            why = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise NotBatchedError(f"its passes take no rows side by side ({why})") from None
    return like


def _compare(model: nn.Module, like: Cache, ids: list[int], plain: list[torch.Tensor]) -> None:
    """Check two rows of different lengths against whole passes over their tokens."""
    lane = Lane(model, like, GRANULE, 3)
    lane._graphs.may = False
    cache = growing()
    prefill(model, cache, ids[:2], 0)
    lane.join(contents(cache), 2)
    lane.join([], 0)
    lane.extend([ids[2:4], ids[3:4]])
    for token in ids[4:6]:
        found = lane.decode([token, token])
    expected = torch.cat(plain)
    exact = model_dtype(model) is torch.float32 and not getattr(model, "is_loaded_in_8bit", False)
    spread = (expected - expected.mean(-1, keepdim=True)).norm().clamp(min=1e-6)
    far = (found - expected).norm() / spread
    if not bool(far <= (CLOSE if exact else CLOSE_IN_HALVES)):
        raise NotBatchedError(f"rows side by side differ from rows alone by {float(far):.1e}")
