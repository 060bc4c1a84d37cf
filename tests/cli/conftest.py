"""The command line, run in this process or in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from raytune_ft.cli import dispatch
from raytune_ft.entry import exit_code
from tests.conftest import ROOT


@dataclass(frozen=True)
class Said:
    """What a command line gave back."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run `raytune-ft WORDS` in this process, by the same way as the console script."""

    def run(*words: str) -> Said:
        capsys.readouterr()
        code = exit_code(lambda: dispatch(list(words)))
        out, err = capsys.readouterr()
        return Said(code, out, err)

    return run


def in_process_of_its_own(*words: str, cwd: Path, module: str = "raytune_ft") -> Said:
    """Run `python -m MODULE WORDS`."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words],
        cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    return Said(done.returncode, done.stdout, done.stderr)
