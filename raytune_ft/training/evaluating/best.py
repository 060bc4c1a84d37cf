"""Best: the weights of the best measurement put back at the end, and what the run says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from raytune_ft.config.schema import EvalSection
from raytune_ft.errors import CheckpointError
from raytune_ft.training.engine import Engine
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.saving.checkpoint import TrainState


def put_back(engine: Engine, checkpoints: Path, state: TrainState) -> None:
    """Load the best checkpoint's weights; every rank has to call it.

    Raises:
        CheckpointError: that checkpoint is gone or damaged; says how to export the last one.
    """
    if state.best_step == state.step:
        return
    folder = checkpoints / checkpoint.folder_name(state.best_step)
    try:
        loaded = checkpoint.load(folder)
    except CheckpointError as error:
        raise CheckpointError(
            f"eval.export best: {error}; or go on with --resume and eval.export=last"
        ) from None
    engine.load(loaded.weights, loaded.optimizer)


def record(state: TrainState, wanted: EvalSection) -> dict[str, Any]:
    """Return what run.json says of the best measurement; nothing where none was made."""
    exported = state.best_step if wanted.export == "best" else state.step
    if state.best is None:
        return {"exported_step": exported}
    return {
        "best": {"metric": wanted.metric, "step": state.best_step, "value": state.best},
        "exported_step": exported,
        "stopped_early": state.stopped,
    }
