"""`python -m raytune_ft.evaluate`: the verb `eval` of the console script."""

from raytune_ft.cli import run_verb

run_verb("eval")
