"""What a family has to say about its checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """How to read one kind of checkpoint with a network that transformers ships."""

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    """Content of config.json -> is it ours."""
    translate: Callable[[Mapping[str, Any]], Any]
    """Content of config.json -> a PreTrainedConfig; a pure function."""
    network: Callable[[Any], Any]
    """The PreTrainedConfig -> its model class."""
    spare_keys: tuple[str, ...] = ()
    """Endings of tensor names in the files that the network does not need."""
