"""The way out of every command: exit codes, one line for a user's mistake, silence for a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from raytune_ft.errors import Interrupted, RaytuneError

INTERRUPTED = 130
BROKEN_PIPE = 141


def run_main(work: Callable[[], int | None]) -> NoReturn:
    """Run a command and leave the process with its exit code.

    A RaytuneError becomes `error: ...` on stderr, a line per problem, and its exit code; Ctrl-C
    130; a reader that went away (`| head`) nothing at all. Other exceptions are defects and keep
    their traceback.
    """
    code = exit_code(work)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = BROKEN_PIPE
    if code == BROKEN_PIPE:
        _drop_stdout()
    sys.exit(code)


def exit_code(work: Callable[[], int | None]) -> int:
    """Run a command and return its exit code, having told the user what was wrong."""
    try:
        return work() or 0
    except Interrupted as end:  # what was asked for is no error
        print(end, file=sys.stderr, flush=True)
        return end.exit_code
    except RaytuneError as error:
        tell(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        tell("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        return BROKEN_PIPE
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise
        tell(f"{error.filename}: {error.strerror}")
        return 1


def tell(message: str) -> None:
    """Print an error, each of its lines marked as one."""
    for line in message.splitlines():
        print(f"error: {line}", file=sys.stderr, flush=True)


def _drop_stdout() -> None:
    """Let the interpreter's last flush go nowhere, so that it prints no complaint."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
