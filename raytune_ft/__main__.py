"""`python -m raytune_ft`: the console script without an installed script."""

from raytune_ft.cli import main

main()
