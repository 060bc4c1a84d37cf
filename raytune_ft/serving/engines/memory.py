"""Memory for keys and values: how much there is, which lane a request gets, what is kept.

A request needs room for its prompt and its longest answer, and gets a row of a lane of that size
or up to four times of it, so that few lanes run side by side. Beside the lanes, keys and values of
ended requests stay for those that begin alike, the ones used longest ago go first. All of it
stays within one number of tokens.
"""

from __future__ import annotations

import os
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import Cache

from raytune_ft.model import fixed_cache
from raytune_ft.model.lanes import Kept, Lane, size_for

CPU_GIB = 2.0
"""For keys and values on a CPU, if so much is free twice."""
CUDA_SHARE = 0.85
"""Of what is free on a device once the weights are there."""
CUDA_LEFT = 3 * 2**30
"""Bytes of a device that stay free for passes and graphs."""
PREFIX_SHARE = 0.25
"""Of all tokens, that ended requests may keep."""
SHORTEST = 16
"""Tokens that are worth keeping, or taking over."""
MOST_KEPT = 256
ROWS_AT_FIRST = {"cpu": 4, "cuda": 16}
WIDE = 4
"""Times that a lane may be larger than a request needs."""


@dataclass
class _Prefix:
    model: str
    ids: npt.NDArray[np.int32]
    kept: Kept


class Prefixes:
    """Keys and values by the tokens that they belong to, each model's on their own."""

    def __init__(self) -> None:
        self._held: OrderedDict[int, _Prefix] = OrderedDict()
        self._alike: defaultdict[tuple[str, bytes], dict[int, None]] = defaultdict(dict)
        """Those of one model that begin with the same tokens, the least that is worth taking."""
        self._next = 0
        self.tokens = 0

    def find(self, model: str, ids: Sequence[int]) -> tuple[Kept, int]:
        """Return what is known of a prompt's beginning and how long that is, 0 if not worth it.

        The last token is never among it: its logits are wanted.
        """
        wanted = np.asarray(ids[:-1], np.int32)
        best, length = None, SHORTEST - 1
        for key in self._alike.get(_beginning(model, wanted), ()):
            if (n := _alike(self._held[key].ids, wanted)) > length:
                best, length = key, n
        if best is None:
            return [], 0
        return self._used(best).kept, length

    def keep(self, model: str, ids: Sequence[int], kept: Callable[[], Kept], most: int) -> None:
        """Keep what belongs to `ids`, within `most` tokens in all."""
        new = np.asarray(ids, np.int32)
        if not SHORTEST <= len(new) <= most:
            return
        beginning = _beginning(model, new)
        for key in list(self._alike.get(beginning, ())):
            held = self._held[key]
            n = _alike(held.ids, new)
            if n == len(new):
                self._used(key)  # a longer one has it all
                return
            if n == len(held.ids):
                self._drop(key)
        while self._held and (self.tokens + len(new) > most or len(self._held) >= MOST_KEPT):
            self.drop_oldest()
        self._held[self._next] = _Prefix(model, new, kept())
        self._alike[beginning][self._next] = None
        self._next += 1
        self.tokens += len(new)

    def drop_oldest(self) -> bool:
        """Let the one go that was used longest ago; return whether there was one."""
        if not self._held:
            return False
        self._drop(next(iter(self._held)))
        return True

    def forget(self, model: str) -> None:
        """Let all of one model go."""
        for key in [key for key, prefix in self._held.items() if prefix.model == model]:
            self._drop(key)

    def _used(self, key: int) -> _Prefix:
        self._held.move_to_end(key)
        found = self._held[key]
        alike = self._alike[_beginning(found.model, found.ids)]
        alike[key] = alike.pop(key)
        return found

    def _drop(self, key: int) -> None:
        gone = self._held.pop(key)
        self.tokens -= len(gone.ids)
        beginning = _beginning(gone.model, gone.ids)
        del self._alike[beginning][key]
        if not self._alike[beginning]:
            del self._alike[beginning]


def _beginning(model: str, ids: npt.NDArray[np.int32]) -> tuple[str, bytes]:
    return model, ids[:SHORTEST].tobytes()


def _alike(one: npt.NDArray[np.int32], other: npt.NDArray[np.int32]) -> int:
    """Return how many tokens two prompts begin with in common."""
    n = min(len(one), len(other))
    differ = one[:n] != other[:n]
    return int(differ.argmax()) if differ.any() else n


class Memory:
    """Lanes of several models and sizes, and prefixes, within one number of tokens."""

    def __init__(self, like: Cache, context: int, slots: int, gib: float | None = None) -> None:
        """Reckon with the device that `like` is on.

        Args:
            like: one row's cache, as `lanes.probed` gives it.
            context: tokens of a row at most.
            slots: rows of a lane at most.
            gib: GiB for keys and values; none: by what is free.
        """
        self.like, self.context, self.slots = like, context, slots
        self.device: torch.device = like.layers[0].keys.device
        per_token = fixed_cache.bytes_of(like, 1, 1)
        given = int(gib * 2**30) if gib is not None else free_for_cache(self.device)
        self.tokens = max(given // per_token, 1)
        self.prefixes = Prefixes()
        self.lanes: list[tuple[str, Lane]] = []
        self.held: dict[int, int] = {}
        """Rows of a lane, by its id, that are promised to requests not yet in it."""

    @property
    def taken(self) -> int:
        """Tokens that lanes and prefixes have memory for."""
        return sum(lane.rows * lane.size for _, lane in self.lanes) + self.prefixes.tokens

    @property
    def used(self) -> float:
        """Share of all tokens that belongs to rows in use."""
        rows = sum(self._rows(lane) * lane.size for _, lane in self.lanes)
        return min(rows / self.tokens, 1.0)

    def place(self, model: str, network: nn.Module, need: int) -> Lane | None:
        """Promise a row for `need` tokens; None while there is no memory for it."""
        mine = [lane for owner, lane in self.lanes if owner == model and lane.size >= need]
        mine.sort(key=lambda lane: lane.size)
        near = [lane for lane in mine if lane.size <= WIDE * max(need, 64)]
        for lane in near:
            if self._rows(lane) < lane.rows:
                return self._promised(lane)
        for lane in near:
            if self._grown(lane):
                return self._promised(lane)
        made = self._made(model, network, need)
        if made is not None:
            return self._promised(made)
        free = next((lane for lane in mine if self._rows(lane) < lane.rows), None)
        return None if free is None else self._promised(free)

    def settle(self, lane: Lane) -> None:
        """Take a promise back: the request is in the lane now, or never will be."""
        self.held[id(lane)] -= 1

    def is_promised(self, lane: Lane) -> bool:
        """Whether a row of a lane is promised to a request that is not in it yet."""
        return self.held.get(id(lane), 0) > 0

    def fits_ever(self, need: int) -> bool:
        """Whether a request could have its memory if it were alone."""
        return size_for(need, self.context) <= self.tokens

    def forget(self, model: str) -> None:
        """Let everything of a model go that is not in use."""
        self.prefixes.forget(model)
        for owner, lane in list(self.lanes):
            if owner == model and not self._rows(lane):
                self._drop(owner, lane)

    def spare(self) -> None:
        """Let everything go that is not in use."""
        while self.prefixes.drop_oldest():
            pass
        for owner, lane in list(self.lanes):
            if not self._rows(lane):
                self._drop(owner, lane)

    def keep(self, model: str, ids: Sequence[int], kept: Callable[[], Kept]) -> None:
        """Keep a request's keys and values for those that begin alike, if there is room."""
        most = min(int(self.tokens * PREFIX_SHARE), self.tokens - self.taken + self.prefixes.tokens)
        if len(ids) <= most:
            self.prefixes.keep(model, ids, kept, most)

    def _rows(self, lane: Lane) -> int:
        return len(lane.lengths) + self.held.get(id(lane), 0)

    def _promised(self, lane: Lane) -> Lane:
        self.held[id(lane)] = self.held.get(id(lane), 0) + 1
        return lane

    def _grown(self, lane: Lane) -> bool:
        for rows in (min(2 * lane.rows, self.slots), lane.rows + 1):
            if lane.rows < rows <= self.slots and self._room((rows - lane.rows) * lane.size, lane):
                lane.grow(rows)
                return True
        return False

    def _made(self, model: str, network: nn.Module, need: int) -> Lane | None:
        size = size_for(need, self.context)
        rows = min(ROWS_AT_FIRST.get(self.device.type, 4), self.slots)
        while rows and not self._room(rows * size):
            rows //= 2
        if not rows:
            return None
        lane = Lane(network, self.like, size, rows)
        self.lanes.append((model, lane))
        return lane

    def _room(self, tokens: int, but: Lane | None = None) -> bool:
        """Make room for more tokens; what is not in use goes if that helps."""
        idle = [
            (owner, lane) for owner, lane in self.lanes if lane is not but and not self._rows(lane)
        ]
        spare = sum(lane.rows * lane.size for _, lane in idle) + self.prefixes.tokens
        if self.taken + tokens - spare > self.tokens:
            return False
        for owner, lane in idle:
            if self.taken + tokens <= self.tokens:
                return True
            self._drop(owner, lane)
        while self.taken + tokens > self.tokens:
            self.prefixes.drop_oldest()
        return True

    def _drop(self, owner: str, lane: Lane) -> None:
        lane.close()
        self.lanes.remove((owner, lane))
        self.held.pop(id(lane), None)


def free_for_cache(device: torch.device) -> int:
    """Return the bytes that keys and values may take on a device."""
    if device.type == "cuda":
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + idle
        return max(min(int(free * CUDA_SHARE), free - CUDA_LEFT), free // 4)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(int(CPU_GIB * 2**30), free // 2)
