"""Together: several adapters trained in one process on one frozen base, each as if alone."""

from raytune_ft.training.together.group import GivenUp, Outcome, run_together

__all__ = ["GivenUp", "Outcome", "run_together"]
