"""`python -m raytune_ft.merge`: the verb `merge` of the console script."""

from raytune_ft.cli import run_verb

if __name__ == "__main__":
    run_verb("merge")
