"""`raytune-ft VERB`: one function per verb, which parses, calls one library function and prints.

Results go to stdout, words for people to stderr. Imports that cost time stand inside the verbs.
"""

from raytune_ft.cli import recipes, runs, results, evaluation, watching, following, reference  # noqa: I001  registers verbs in the help's order
from raytune_ft.cli.app import dispatch, main, run_verb

__all__ = [
    "dispatch", "evaluation", "following", "main", "recipes", "reference", "results", "run_verb",
    "runs", "watching",
]  # fmt: skip
