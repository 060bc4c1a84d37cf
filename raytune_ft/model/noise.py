"""Noise: embeddings in training are shaken a little (NEFTune, arXiv 2310.05914).

Each number gets uniform noise of up to alpha / sqrt(L * d): L is the length of the token's own
segment, since a pack holds several samples, and d the embedding's width. Noise is torch's own
random numbers, which the loop seeds anew for each step and rank, so a resumed run draws the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def install(loss: nn.Module, model: Any, alpha: float) -> None:
    """Shake the embeddings of `model` whenever `loss`, which holds it, runs in training mode.

    Args:
        loss: called with `segment_ids` (B, L) by name, -1 for padding.
        model: with or without an adapter.
        alpha: the paper's 5 to 15.
    """
    lengths: list[torch.Tensor] = []

    def look(module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        lengths.clear()
        if module.training:
            lengths.append(segment_lengths(kwargs["segment_ids"]))

    def forget(*_call: Any) -> None:
        lengths.clear()

    def shake(module: nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        # an answer between two steps comes past no `look`, and DPO's reference is in eval mode
        if not lengths or not module.training:
            return output
        return output + noise(output, lengths[0], alpha)

    loss.register_forward_pre_hook(look, with_kwargs=True)
    loss.register_forward_hook(forget, always_call=True)
    model.get_input_embeddings().register_forward_hook(shake)


def noise(like: torch.Tensor, lengths: torch.Tensor, alpha: float) -> torch.Tensor:
    """Draw noise for embeddings (B, L, d), with the length (B, L) of each token's segment."""
    size = alpha / (lengths * like.shape[-1]).float().sqrt()
    drawn = torch.empty_like(like, dtype=torch.float32).uniform_(-1.0, 1.0)
    return (drawn * size.unsqueeze(-1)).to(like)


def segment_lengths(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return for each token (B, L) the number of tokens in its segment of its row."""
    places = segment_ids.long() + 1
    counts = torch.zeros(
        places.shape[0], places.shape[1] + 1, dtype=torch.long, device=places.device
    )
    counts.scatter_add_(1, places, torch.ones_like(places))
    return counts.gather(1, places)
