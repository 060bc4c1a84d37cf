"""Kept tokens: rows of any epoch's window in, what each was encoded to out, from disk or made.

A window of epoch 0 keeps what it makes, as the shard of its number. Later epochs ask the order
which shard has a row. So there is no pass of its own to fill the cache, and any part of it helps.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raytune_ft.data.cache.key import token_key
from raytune_ft.data.cache.shard import (
    MISSING,
    DamagedError,
    Missing,
    Numbers,
    Outcome,
    Shard,
    shard_bytes,
)
from raytune_ft.data.cache.store import store
from raytune_ft.data.examples import Encoder, encode_rows
from raytune_ft.data.order import RowOrder
from raytune_ft.data.sources import RowSource

__all__ = ["TokenCache", "bind"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenCache:
    """The kept tokens of one run's rows; picklable, each process opens its own machine's."""

    key: str
    source: RowSource
    encoder: Encoder
    order: RowOrder

    def encode(self, epoch: int, number: int, rows: Numbers) -> list[Outcome]:
        """Return what `examples.encode_rows` gives for the rows of a window.

        Raises:
            DataError: a file is not as it was when the run began.
        """
        store().note_use(self.key)
        if not epoch:
            places = number * self.order.window + np.arange(len(rows))
        else:
            places = self.order.places(0, rows)
        shards, slots = np.divmod(places, self.order.window)
        found: list[Outcome | Missing] = [MISSING] * len(rows)
        for shard in np.unique(shards).tolist():
            mine = np.flatnonzero(shards == shard)
            some = self._some(shard, rows[mine], slots[mine], make=not epoch)
            for place, outcome in zip(mine.tolist(), some, strict=True):
                found[place] = outcome
        return self._completed(rows, found)

    def _some(
        self, shard: int, rows: Numbers, slots: Numbers, *, make: bool
    ) -> Sequence[Outcome | Missing]:
        """Return what a shard has of some of its rows; a damaged one is made again."""
        path = store().path(self.key, shard)
        try:
            with Shard(path, self._identity(shard)) as opened:
                return opened.outcomes(rows, slots)
        except DamagedError as error:
            _log.warning("token cache %s: damaged (%s); made again", path, error)
            store().remove(self.key, shard)
        except OSError:
            if not make:
                return [MISSING] * len(rows)
        made = self._made(shard)
        return [made[slot] for slot in slots.tolist()]

    def _made(self, shard: int) -> list[Outcome]:
        """Encode a window of epoch 0 and keep it."""
        rows = self.order.window_rows(0, shard)
        outcomes: list[Outcome] = encode_rows(self.source, self.encoder, rows)
        self.source.check_unchanged(rows)  # else another file's tokens stood under this key
        content = shard_bytes(self._identity(shard), rows, outcomes)
        store().write(self.key, shard, content)
        return outcomes

    def _completed(self, rows: Numbers, found: list[Outcome | Missing]) -> list[Outcome]:
        """Encode the rows that are missing."""
        missing = [place for place, one in enumerate(found) if isinstance(one, Missing)]
        made = iter(encode_rows(self.source, self.encoder, rows[missing]) if missing else [])
        return [next(made) if isinstance(one, Missing) else one for one in found]

    def _identity(self, shard: int) -> str:
        return f"{self.key}/{shard}"


def bind(source: RowSource, encoder: Encoder, seed: int, order: RowOrder) -> TokenCache | None:
    """Return the cache of a run's tokens, None if the recipe wants none.

    `data.compat` has none: its packs are laid by a pass over all rows, not window by window.

    Raises:
        RecipeError: the size that the cache may have is no number.
    """
    if not encoder.data.cache or encoder.data.compat is not None:
        return None
    store().check_limit()
    return TokenCache(token_key(source, encoder, seed), source, encoder, order)
