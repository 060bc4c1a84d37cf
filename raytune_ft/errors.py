"""Every error that a user can cause or meet, and the exit code of each.

RaytuneError (1)
├── RecipeError (2)       a recipe, an argument or a path cannot be used
│   └── ModelError (2)    a model folder cannot be read, or lacks what the recipe needs
├── DataError (3)         a row or file of training data cannot be used
├── MemoryPlanError (4)   the run does not fit into the memory there is
├── CheckpointError (2)   a run folder or checkpoint is missing, damaged or of another recipe
├── TrainingError (5)     training stopped: loss not finite, nothing to learn from, worker lost
├── ServeError (6)        the chat endpoint cannot start
└── Interrupted (75)      a run was asked to stop and did so behind a checkpoint: resumable

A message is one line: where - what was found - what to do. Exceptions travel through Ray by
pickle, so each is rebuilt from its message alone.
"""


class RaytuneError(Exception):
    """Base of all errors that are reported as one line."""

    exit_code = 1


class RecipeError(RaytuneError):
    """A recipe, an argument or a path cannot be used."""

    exit_code = 2


class ModelError(RecipeError):
    """A model folder cannot be read, or lacks what the recipe needs."""


class DataError(RaytuneError):
    """A row or file of training data cannot be used."""

    exit_code = 3


class MemoryPlanError(RaytuneError):
    """The run does not fit into the memory there is."""

    exit_code = 4


class CheckpointError(RaytuneError):
    """A run folder or checkpoint is missing, damaged or of another recipe."""

    exit_code = 2


class TrainingError(RaytuneError):
    """Training stopped: loss not finite, nothing to learn from, worker lost."""

    exit_code = 5


class ServeError(RaytuneError):
    """The chat endpoint cannot start."""

    exit_code = 6


class Interrupted(RaytuneError):  # noqa: N818, it is no fault
    """A run was asked to stop and did so behind a checkpoint; 75 is sysexits.h's "try again"."""

    exit_code = 75
