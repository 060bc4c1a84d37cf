"""Inheriting: a trial of a population gets another one's weights, optimizer state and values.

Its folder stays a run's that can be taken up: what it has then is the other's checkpoint, said to
belong to its own recipe, which has the new values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from raytune_ft.config import loader
from raytune_ft.sweeping.space import with_values
from raytune_ft.sweeping.trials import Trial, Turn
from raytune_ft.training.run_folder import Event, RunFolder, read_jsonl
from raytune_ft.training.saving import checkpoint, identity


def inherit(trial: Trial, source: Trial, turn: Turn) -> None:
    """Have a trial go on from another one's checkpoint; done again it is the same.

    Raises:
        CheckpointError: the other one's checkpoint is damaged, or the disk refuses.
    """
    own, other = RunFolder(trial.folder), RunFolder(source.folder)
    recipe = with_values(loader.load_recipe(str(own.recipe)), turn.values)
    place = other.checkpoints / checkpoint.folder_name(turn.step)
    checkpoint.hand_on(place, own.checkpoints, recipe_hash=identity.recipe_hash(recipe))
    temporary = own.path / f".{own.recipe.name}"
    temporary.write_text(loader.dump_yaml(recipe), encoding="utf-8")
    temporary.replace(own.recipe)


class Pause:
    """Whether a trial has come to where it is compared, by what it says.

    Args:
        until: step at which, or first measured behind which, it is; None: it is not.
        metric: of the sweep.
    """

    def __init__(self, until: int | None, metric: str) -> None:
        self.until, self.metric = until, metric
        self.reached: Event | None = None

    def hear(self, event: Mapping[str, Any]) -> None:
        """Take an optimizer step's event."""
        is_measured = event.get(self.metric) is not None
        if self.until is not None and event["step"] >= self.until and is_measured:
            self.reached = {"step": event["step"], "metric": event[self.metric]}

    def find(self, folder: RunFolder) -> bool:
        """Look whether a trial stands there already, behind a checkpoint, from an earlier life."""
        if self.until is None:
            return False
        newest = checkpoint.latest(folder.checkpoints)
        return newest is not None and self.is_at(folder, checkpoint.step_of(newest))

    def is_at(self, folder: RunFolder, step: int) -> bool:
        """Tell whether a trial whose last checkpoint is of `step` has to train no further."""
        for event in read_jsonl(folder.metrics):
            if self.reached is None:
                self.hear(event)
        if self.reached is not None and self.reached["step"] != step:
            self.reached = None
        return self.reached is not None
