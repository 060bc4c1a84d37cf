"""Passes that come again and again: plain the first time, replayed from a CUDA graph later.

A pass is known by its shapes; what it reads and writes lies in the same places each time. The
first of all is watched, so that one which cannot be captured is never tried (`model.capturable`).
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import Any

import torch

from raytune_ft.model import decoding
from raytune_ft.model.capturable import NotFixedError, Watch
from raytune_ft.model.capture import aside, capture, stream_of

log = logging.getLogger(__name__)

GRAPHS = 64
"""Shapes that stay captured; the one used longest ago goes."""

Shape = tuple[int, int, int]
"""Rows, tokens of each, tokens that are looked at."""


class Replayed:
    """Passes of one lane by their shape: plain the first time, captured from the second on."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.may = device.type == "cuda"
        self._known: OrderedDict[Shape, tuple[Any, torch.Tensor] | None] = OrderedDict()
        self._pool: Any = None
        self._safe = False

    def run(self, key: Shape, forward: Any) -> torch.Tensor:
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
        with aside(self.device):
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

    def _capture(self, key: Shape, forward: Any) -> torch.Tensor:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        try:
            decoding.check_room(self.device)
            graph, output = capture(forward, self._pool, stream_of(self.device))
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

    def _drop(self, key: Shape) -> None:
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
