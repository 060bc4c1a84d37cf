"""An embedding on the host: ids of a pass in, their rows on the device out; 0.8 GiB of a 7B less.

2,048 rows of a 7B are 16 MiB a pass. The device's own kernels read them (`kernels.host_rows`), so
that answers in training and recorded steps go the same way; a device that cannot read the host's
memory waits for ids and rows instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from raytune_ft.kernels.host_rows import gather
from raytune_ft.model.host_table import HostTable

DIRECTLY = "host_rows_directly"
"""Attribute: whether the device reads the table by itself."""
SCALED = ("Gemma3TextScaledWordEmbedding",)
"""Classes that multiply rows by their `embed_scale`."""


class HostEmbedding(HostTable):
    """Form of an embedding."""

    def forward(self: Any, ids: Tensor) -> Tensor:
        """Return the rows (..., H) of ids (...)."""
        rows = gather(self.weight, ids, directly=getattr(self, DIRECTLY))
        if type(self).__name__ in SCALED:
            rows.mul_(self.embed_scale.to(rows))
        return rows


def refusal(embedding: Any) -> str | None:
    """Return why an embedding cannot lie on the host; None if it can."""
    name = type(embedding).__name__
    if type(embedding) is not nn.Embedding and name not in SCALED:
        return f"{name} is no plain table"
    if embedding.weight.requires_grad:
        return "it is trained"
    if embedding.max_norm is not None:
        return "it changes its rows"
    return None if embedding.weight.dtype is not torch.float64 else "float64 is for proofs"
