"""Pulse: signs of life of this process, which is one rank, and where it is in its work.

Everything that takes long beats on the way: each decoder layer's forward pass (training, held-out
rows and answers alike), each gradient, each block of a checkpoint; while a model is loaded, each
weight that is put into it and each MiB that is read. Waiting for others or for data does not beat,
so a pulse that stands still is a rank that waits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

READS = Path("/proc/self/io")
READ_AT_ONCE = 2**20
"""Bytes between two looks that are a file's; what Ray's connections bring is a hundredth of it."""


@dataclass
class Pulse:
    """Counts beats; says what is done and for which optimizer step."""

    beats: int = 0
    phase: str = "start"
    step: int = 0
    """That is being taken, from 1."""
    attempt: int = 0
    """Number of this start of the run, the same on all ranks."""

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """Give a sign of life, and say what begins now if that is something else."""
        self.beats += 1
        if phase is not None:
            self.phase = phase
        if step is not None:
            self.step = step


PULSE = Pulse()
"""Of this process."""


def listen(module: nn.Module, trained: Iterable[nn.Parameter]) -> None:
    """Let a network's layers and its trained parameters' gradients beat.

    Layers are entries of the outermost lists of modules. Gradient checkpointing runs a layer's
    forward pass again, which beats as well.
    """
    for layer in _layers(module):
        layer.register_forward_pre_hook(_on_layer)
    for parameter in trained:
        cast(Any, parameter).register_post_accumulate_grad_hook(_on_gradient)


@contextmanager
def loading() -> Iterator[None]:
    """Let every weight beat that is put into any network while the block runs."""
    handle = register_module_parameter_registration_hook(_on_weight)
    try:
        yield
    finally:
        handle.remove()


def bytes_read() -> int:
    """Return what this process has read so far, by calls and from storage; 0: nobody counts."""
    try:
        lines = READS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    found = dict(line.split(": ") for line in lines)
    return int(found["rchar"]) + int(found["read_bytes"])  # a mapped file is read without calls


def _layers(module: nn.Module) -> Iterable[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _on_layer(_module: nn.Module, _inputs: object) -> None:
    PULSE.beats += 1


def _on_weight(_module: nn.Module, _name: str, _parameter: object) -> None:
    PULSE.beats += 1


def _on_gradient(_parameter: torch.Tensor) -> None:
    PULSE.beats += 1
