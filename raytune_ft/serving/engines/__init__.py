"""The engines behind the endpoint: options in, one ChatEngine out.

`build` is the only way to one, so that the endpoint knows none of them by name.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from raytune_ft.serving.engine import ChatEngine, EmbeddedEngine

if TYPE_CHECKING:
    from raytune_ft.chat.model import ChatModel

logger = logging.getLogger(__name__)

EngineName = Literal["auto", "embedded", "vllm"]


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What decides how a model is served."""

    path: str
    """Run folder, adapter, model folder, or `smollm2-135m-instruct`."""
    bits: int | None = None
    """4, 8, 16 or 32; none: the precision that training saw."""
    engine: EngineName = "auto"
    max_waiting: int = 16
    """Requests that may wait beside those being answered."""
    slots: int | None = None
    """Requests that are answered at a time; none: by the device."""
    kv_gib: float | None = None
    """GiB for keys and values; none: by the device."""
    adapters: str | None = None
    """A folder of run folders or adapter folders, served by their names."""
    max_adapters: int = 4
    """Adapters of that folder in memory at once."""


def build(options: EngineOptions) -> ChatEngine:
    """Load a model and return the engine that answers with it.

    Raises:
        CheckpointError, ModelError, RecipeError: one line that names the path.
        ServeError: an engine that is asked for is not installed.
    """
    import torch

    from raytune_ft.chat.model import load_source
    from raytune_ft.chat.source import find_source
    from raytune_ft.serving.engines import vllm

    source = find_source(options.path, options.bits)
    if options.engine == "vllm":
        vllm.check_installed()
    wanted = options.engine == "vllm" or (
        options.engine == "auto"
        and torch.cuda.is_available()
        and vllm.is_installed()
        and vllm.why_not(source) is None
    )
    if wanted:
        return vllm.VllmEngine(
            source,
            options.max_waiting,
            slots=options.slots or vllm.SLOTS,
            adapters=options.adapters,
            max_adapters=options.max_adapters,
        )
    return embedded(load_source(source), options)


def embedded(chat: ChatModel, options: EngineOptions) -> ChatEngine:
    """Return the engine of this process; one request at a time where a model allows no more."""
    from raytune_ft.model.lanes import NotBatchedError
    from raytune_ft.serving.engines.batched import BatchedEngine

    try:
        return BatchedEngine(
            chat,
            options.max_waiting,
            slots=options.slots,
            kv_gib=options.kv_gib,
            adapters=options.adapters,
            max_adapters=options.max_adapters,
        )
    except NotBatchedError as why:
        logger.warning("%s answers one request at a time: %s", chat.name, why)
        return EmbeddedEngine(chat, options.max_waiting)
