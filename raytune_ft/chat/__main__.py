"""`python -m raytune_ft.chat`: the verb `chat` of the console script."""

from raytune_ft.cli import run_verb

run_verb("chat")
