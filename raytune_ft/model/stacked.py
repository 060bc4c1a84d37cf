"""Stacked LoRA layers: one frozen layer, the updates of several adapters on rows of their own.

The base multiplies all rows at once. Every adapter draws the dropout that it would draw alone: the
random state is wound back before each, since adapters that are trained side by side have the same
seed and draw as often.

Shapes: x (k * B, ..., in) of k adapters, adapter j's rows are [j * B, (j + 1) * B).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class StackedLora(nn.Module):
    """PEFT's LoRA layers of several adapters around the same base layer, in one seat."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        """Hold `members`, plain LoRA layers of one adapter each, in the order of their rows."""
        super().__init__()
        self.members = nn.ModuleList(members)

    @property
    def base_layer(self) -> Any:
        """The frozen layer."""
        return self.members[0].base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return base and updates, (k * B, ..., out)."""
        out: torch.Tensor = self.base_layer(x)
        rewound = _Rewound(x.device)
        parts = x.chunk(len(self.members))
        updates = [
            _update(member, part, rewound) for member, part in zip(self.members, parts, strict=True)
        ]
        rewound.leave()
        if getattr(self.base_layer.weight, "quant_state", None) is not None:
            return out + torch.cat([update.to(out.dtype) for update in updates])  # as PEFT's 4-bit
        return (out + torch.cat(updates)).to(out.dtype)


class _Rewound:
    """The random state of a device, the same at the beginning of each draw."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: torch.Tensor | None = None
        self.behind: torch.Tensor | None = None

    def drop(self, dropout: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not (dropout.training and isinstance(dropout, nn.Dropout) and dropout.p):
            untouched: torch.Tensor = dropout(x)
            return untouched
        if self.before is None:
            self.before = random_state(self.device)
        else:
            set_random_state(self.before, self.device)
        dropped: torch.Tensor = dropout(x)
        if self.behind is None:
            self.behind = random_state(self.device)
        return dropped

    def leave(self) -> None:
        """Go on behind one adapter's draws."""
        set_random_state(self.behind, self.device)


def random_state(device: torch.device) -> torch.Tensor:
    """Return the state of torch's own generator of a device."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state: torch.Tensor | None, device: torch.device) -> None:
    """Put back what `random_state` returned; None changes nothing."""
    if state is None:
        return
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


def _update(member: Any, x: torch.Tensor, rewound: _Rewound) -> torch.Tensor:
    name = member.active_adapters[0]
    a, b = member.lora_A[name], member.lora_B[name]
    x = x.to(a.weight.dtype)
    update: torch.Tensor = b(a(rewound.drop(member.lora_dropout[name], x)))
    scaling: float = member.scaling[name]
    return update * scaling
