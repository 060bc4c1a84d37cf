"""`python -m raytune_ft.serve`: the verb `serve` of the console script."""

from raytune_ft.cli import run_verb

if __name__ == "__main__":
    run_verb("serve")
