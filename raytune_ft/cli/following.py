"""Verbs about a run that goes on: read along, and stop it."""

from __future__ import annotations

from typing import Annotated

import typer

from raytune_ft.cli.app import verb
from raytune_ft.errors import RecipeError

Run = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="A folder, a name under runs/, SWEEP/TRIAL, or s3://BUCKET/RUNS/NAME."
    ),
]


@verb("logs")
def logs(
    run: Run,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until it ends.")] = False,
    last: Annotated[
        int | None, typer.Option("--lines", "-n", min=0, help="Last lines to begin with.")
    ] = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="metrics.jsonl instead.")] = False,
    log: Annotated[bool, typer.Option("--log", help="run.log instead, with all noise.")] = False,
) -> int:
    """Print what a run says; -f until it ends, whose exit code it is then."""
    if metrics and log:
        raise RecipeError("--log: give it or --metrics, not both")
    from raytune_ft.lookout import logs as stage

    name = stage.STEPS if metrics else stage.NOISE if log else stage.LINES
    return stage.show(run, name, follow=follow, last=last)


@verb("stop")
def stop(
    run: Run,
    wait: Annotated[
        float | None, typer.Option("--wait", min=0, metavar="S", help="Seconds; default: no limit.")
    ] = None,
    now: Annotated[
        bool, typer.Option("--now", help="Do not wait for this step's checkpoint.")
    ] = False,
) -> int:
    """Stop a run behind this step's checkpoint, wherever it is driven, and say how to go on."""
    from raytune_ft.lookout import stop as stage

    return stage.stop(run, now=now, wait_s=wait)
