"""Run: planted bugs in, one line for each out: which test finds it. Exit code 1 if one survives.

    python -m tests.mutants.run [C03 C16 ...]

Everything happens in a copy in the temporary folder; the checkout is only read. The named tests
first have to pass there without any bug. A mutant is killed by a test that fails; a test that
cannot be collected or prepared proves nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests.mutants.patches import ROOT, Mutant, all_mutants

COPIED = ("raytune_ft", "tests", "configs", "serve", "examples", "benchmarks", "pyproject.toml")
TEST_TIMEOUT_S = 120
RUN_TIMEOUT_S = 300


@dataclass(frozen=True)
class Outcome:
    """What tests did: the first that failed, the first that broke before it could tell."""

    passed: int
    failed: str | None
    broken: str | None


class Copy:
    """A copy of the project in which bugs are planted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(source, folder / name, ignore=ignored)
            elif source.exists():
                shutil.copy(source, folder / name)
        self._env = {
            **os.environ,
            "PYTHONPATH": str(folder),
            # the planted file may have the size and the second of the one before it
            "PYTHONDONTWRITEBYTECODE": "1",
            "RAYTUNE_CACHE": str(folder / ".cache"),
            "GIT_CEILING_DIRECTORIES": str(folder.parent),
        }

    def check_imported(self) -> None:
        """Raise RuntimeError if tests would import another raytune_ft than this one."""
        code = "import raytune_ft; print(raytune_ft.__file__)"
        found = self._run([sys.executable, "-c", code]).stdout.strip()
        if Path(found).resolve().parent != (self.folder / "raytune_ft").resolve():
            raise RuntimeError(f"tests would import {found}, not the copy in {self.folder}")

    def apply(self, patch: Path, *options: str) -> None:
        """Apply a patch; RuntimeError if it does not fit."""
        done = self._run(["git", "apply", *options, str(patch)])
        if done.returncode:
            raise RuntimeError(f"{patch.name} does not apply: {done.stderr.strip()}")

    def test(self, tests: Iterable[str], *options: str) -> Outcome:
        """Run tests; RuntimeError if pytest gives no results."""
        results = self.folder / "results.xml"
        results.unlink(missing_ok=True)
        command = [
            sys.executable, "-m", "pytest", "-q", "--tb=line", "-p", "no:cacheprovider",
            f"--timeout={TEST_TIMEOUT_S}", f"--junitxml={results}", *options, *tests,
        ]  # fmt: skip
        done = self._run(command)
        if not results.is_file():
            raise RuntimeError(f"no results: {(done.stdout + done.stderr).strip()[-500:]}")
        return read_results(results)

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self._env, capture_output=True, text=True, check=False,
            timeout=RUN_TIMEOUT_S,
        )  # fmt: skip


def read_results(path: Path) -> Outcome:
    """Read pytest's XML."""
    cases = list(ElementTree.parse(path).iter("testcase"))
    bad = [case for case in cases if case.find("failure") is not None]
    broken = [case for case in cases if case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Outcome(len(cases) - len(bad) - len(broken) - skipped, _name(bad[:1]), _name(broken[:1]))


def _name(cases: list[ElementTree.Element]) -> str | None:
    if not cases:
        return None
    return f"{cases[0].get('classname', '').replace('.', '/')}.py::{cases[0].get('name')}"


def judge(copy: Copy, mutant: Mutant) -> tuple[bool, str]:
    """Plant a bug, run its tests and take it out again; return whether it is killed, and a line."""
    started = time.perf_counter()
    copy.apply(mutant.path)
    try:
        found = copy.test(mutant.tests, "-x")
    except subprocess.TimeoutExpired:
        return False, f"{mutant.number} SURVIVED: its tests did not end; {mutant.bug}"
    finally:
        copy.apply(mutant.path, "-R")
    seconds = time.perf_counter() - started
    if found.failed is not None:
        return True, f"{mutant.number} killed by {found.failed} in {seconds:.1f} s: {mutant.bug}"
    why = f"{found.broken} broke" if found.broken else f"{found.passed} tests passed"
    return False, f"{mutant.number} SURVIVED ({why} in {seconds:.1f} s): {mutant.bug}"


def main(numbers: Sequence[str]) -> int:
    """Judge the mutants of these numbers, all if there are none; return the exit code."""
    known = all_mutants()
    chosen = [mutant for mutant in known if not numbers or mutant.number in numbers]
    if unknown := set(numbers) - {mutant.number for mutant in chosen}:
        names = " ".join(mutant.number for mutant in known)
        print(f"no mutant {' '.join(sorted(unknown))}; there are: {names}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Copy(Path(folder) / "project")
        copy.check_imported()
        tests = dict.fromkeys(test for mutant in chosen for test in mutant.tests)
        sound = copy.test(tests)
        if sound.failed or sound.broken or not sound.passed:
            print(f"without any bug {sound.failed or sound.broken or 'every test'} does not pass")
            return 1
        print(f"without any bug {sound.passed} tests pass", flush=True)
        killed = 0
        for mutant in chosen:
            try:
                dead, line = judge(copy, mutant)
            except RuntimeError as error:
                dead, line = False, f"{mutant.number} NOT PLANTED: {error}"
            killed += dead
            print(line, flush=True)
    print(f"{killed} of {len(chosen)} killed")
    return 0 if killed == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
