"""Every planted bug still fits the code and names tests that are there; all numbers are planted.

`make mutants` shows that the tests find them.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mutants.patches import ROOT, Mutant, all_mutants, read_mutant
from tests.mutants.run import main, read_results

NUMBERS = {*range(1, 34), *range(35, 46)}
MUTANTS = all_mutants()


def test_every_known_bug_is_planted() -> None:
    assert {int(mutant.number[1:3]) for mutant in MUTANTS} == NUMBERS
    assert len({mutant.number for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.number)
def test_a_patch_fits_the_code(mutant: Mutant, tmp_path: Path) -> None:
    text = mutant.path.read_text(encoding="utf-8")
    files = [line[6:] for line in text.splitlines() if line.startswith("--- a/")]
    assert files
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    done = subprocess.run(
        ["git", "apply", str(mutant.path)], cwd=tmp_path, capture_output=True, text=True,
        check=False, env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for file in files:
        planted = (tmp_path / file).read_text(encoding="utf-8")
        ast.parse(planted)
        assert planted != (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.number)
def test_a_patch_names_tests_that_are_there(mutant: Mutant) -> None:
    assert mutant.tests
    for test in mutant.tests:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        known = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name.partition("[")[0] in known, test


def test_a_patch_without_its_first_lines_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "C99_x.patch"
    path.write_text("--- a/x\n")
    with pytest.raises(ValueError, match="begin it with 'bug: "):
        read_mutant(path)


def test_an_unknown_number_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["C99"]) == 2
    assert "no mutant C99; there are: C01" in capsys.readouterr().err


def test_results_tell_failures_from_what_broke(tmp_path: Path) -> None:
    path = tmp_path / "results.xml"
    path.write_text(
        '<testsuites><testsuite><testcase classname="tests.a" name="x"/>'
        '<testcase classname="tests.a" name="y"><failure/></testcase>'
        '<testcase classname="tests.a" name="z"><error/></testcase></testsuite></testsuites>'
    )
    found = read_results(path)
    assert (found.passed, found.failed, found.broken) == (1, "tests/a.py::y", "tests/a.py::z")
