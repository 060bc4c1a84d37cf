"""docs/export.md: its commands are run, and what it prints is what they print."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.cli.conftest import Command, call  # noqa: F401  a fixture
from tests.conftest import ROOT
from tests.exporting.conftest import Made

PAGE = (ROOT / "docs/export.md").read_text(encoding="utf-8")
NUMBER = re.compile(r" *\d+\.\d+")


def blocks() -> list[tuple[str, list[str]]]:
    """Return (command, lines that follow it) of the page, in order."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        if not block.startswith("$ "):
            continue
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, rest = part.partition("\n")
            found.append((command, rest.splitlines()))
    return found


def plain(lines: list[str]) -> list[str]:
    """Numbers with decimals differ from machine to machine."""
    return [NUMBER.sub(" N", line) for line in lines]


def test_the_page_s_commands_print_what_it_shows(
    on_nf4: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Command,  # noqa: F811
) -> None:
    shutil.copytree(on_nf4.run.path, tmp_path / "runs/demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    info = tmp_path / "runs/demo/run.json"
    info.write_text(info.read_text().replace('"name": "run"', '"name": "demo"'))
    Path("epoch_1.pth").write_bytes(b"\x80\x02")
    shown = blocks()
    assert len(shown) >= 6
    for command, lines in shown:
        program, *words = command.split()
        if program == "cat":
            assert Path(words[0]).read_text().splitlines() == lines
            continue
        assert program == "raytune-ft"
        said = call(*words)
        assert plain((said.err + said.out).splitlines()) == plain(lines), command
        assert said.code == (2 if lines[0].startswith("error: ") else 0)
