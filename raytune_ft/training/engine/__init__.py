"""Engines: how gradients are summed over ranks and applied; DeepSpeed ZeRO or plain torch."""

from raytune_ft.training.engine.base import Engine, State, check_names, rank, world_size
from raytune_ft.training.engine.plain import TorchEngine
from raytune_ft.training.engine.zero import ZeroEngine, quiet_deepspeed

__all__ = [
    "Engine", "State", "TorchEngine", "ZeroEngine", "check_names", "quiet_deepspeed", "rank",
    "world_size",
]  # fmt: skip
