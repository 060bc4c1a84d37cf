"""The command line itself: how a verb is registered and how its mistakes reach the user."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import typer

from raytune_ft.cli.spelling import instead_of
from raytune_ft.entry import exit_code, run_main, tell

PROGRAM = "raytune-ft"
WRONG_USAGE = 2
UsageProblem: Any = typer.BadParameter.__bases__[0]
"""Click's UsageError, wherever this version of typer keeps it."""

MAY_STAND_ALONE = ("--method",)
ALONE = "?"
"""Value of an option that was given without one."""

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Teach a language model your own data on Ray, then talk to it.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> NoReturn:
    """Run the console script."""
    run_main(lambda: dispatch(sys.argv[1:]))


def run_verb(verb: str) -> NoReturn:
    """Run `python -m raytune_ft.VERB` as the verb of the console script."""
    run_main(lambda: dispatch([verb, *sys.argv[1:]]))


def dispatch(arguments: list[str]) -> int:
    """Run a command line; return its exit code. Wrong usage is 2, with the nearest word."""
    try:
        words = _with_value(arguments) or ["--help"]
        result = app(words, prog_name=PROGRAM, standalone_mode=False)
    except UsageProblem as problem:
        message = " ".join(problem.format_message().split())
        context = getattr(problem, "ctx", None)
        path = context.command_path if context is not None else PROGRAM
        tell(instead_of(arguments, message) or f"{message.rstrip('.')}; see: {path} --help")
        return WRONG_USAGE
    return result if isinstance(result, int) else 0


def _with_value(arguments: list[str]) -> list[str]:
    """Give an option that may stand alone the value `ALONE` where it does; typer has no such."""
    words = []
    for place, word in enumerate(arguments):
        following = arguments[place + 1 : place + 2]
        alone = not following or following[0].startswith("-")
        words.append(f"{word}={ALONE}" if word in MAY_STAND_ALONE and alone else word)
    return words


def verb(
    name: str, group: typer.Typer = app
) -> Callable[[Callable[..., int | None]], Callable[..., int]]:
    """Register a verb, of the program or of a group of verbs; its errors become its exit code."""

    def register(work: Callable[..., int | None]) -> Callable[..., int]:
        @functools.wraps(work)
        def guarded(**options: Any) -> int:
            return exit_code(lambda: work(**options))

        group.command(name)(guarded)
        return guarded

    return register


Pattern = Annotated[str | None, typer.Argument(help="Only names that contain this.")]
PatternOption = Annotated[
    str | None, typer.Option("--pattern", "-p", help="Only names that contain this.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Name = Annotated[str, typer.Argument(help="A shipped name; raytune-ft list shows them.")]
Config = Annotated[
    str | None,
    typer.Option("--config", "-c", help="A file, a file under configs/, or a shipped name."),
]
Recipe = Annotated[
    str, typer.Argument(metavar="CONFIG", help="A file, a file under configs/, or a shipped name.")
]
Words = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME] [KEY=VALUE]...", help="A recipe, and fields to set in it."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Recipe fields to set.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan, stop.")]
Run = Annotated[str, typer.Argument(help="A run folder, such as runs/quickstart.")]
Out = Annotated[str | None, typer.Option("--out", help="Folder to write; default: in the run.")]


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", "-v", help="Print the version.")
    ] = False,
) -> None:
    if version:
        print_version()
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@verb("version")
def print_version() -> None:
    """Print the version."""
    from raytune_ft import __version__

    print(f"{PROGRAM} {__version__}")
