"""The curl and Python lines of README and docs/serving.md do what they say, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_ft.serving.arguments import ServeArgs
from raytune_ft.serving.keys import read_keys
from tests.conftest import ROOT
from tests.serving.conftest import Live

PAGES = ["README.md", "docs/serving.md"]
HERE, NAME = "http://127.0.0.1:8000", "mine"


def blocks(page: str, kind: str) -> list[str]:
    """Return the fenced blocks of a page whose fence names this kind."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def curls() -> list[str]:
    """Return each curl command that asks the endpoint, continued lines joined."""
    found = []
    for page in PAGES:
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("curl ") and HERE in line:
                    found.append(line.partition(" #")[0])
    return found


def pythons() -> list[str]:
    return [b for page in PAGES for b in blocks(page, "python") if "OpenAI(" in b]


def here(text: str, live: Live) -> str:
    return text.replace(HERE, live.url).replace(f'"{NAME}"', f'"{live.model}"')


def ran(*command: str, **environment: str) -> str:
    """Run a command that must succeed; return what it prints."""
    done = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_there_are_lines_to_run() -> None:
    assert len(curls()) >= 3
    assert len(pythons()) >= 1


@pytest.mark.ray
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl; apt-get install curl runs it")
def test_curl_lines(live: Live) -> None:
    for command in curls():
        answer = json.loads(ran("bash", "-c", here(command, live)))
        assert "error" not in answer, (command, answer)
        assert answer.get("choices") or answer.get("data")


@pytest.mark.ray
def test_python_lines(live: Live) -> None:
    for code in pythons():
        ran(sys.executable, "-c", here(code, live))


@pytest.mark.ray
def test_the_client_example(live: Live) -> None:
    example = str(ROOT / "serve" / "client_example.py")
    assert ran(sys.executable, example, "red?", RAYTUNE_URL=f"{live.url}/v1").endswith("\n")


def test_the_line_that_makes_a_key_fits_the_file(tmp_path: Path) -> None:
    (line,) = (
        line
        for block in blocks("docs/serving.md", "")
        for line in block.splitlines()
        if line.startswith("python -c ")
    )
    code = line.removeprefix('python -c "').removesuffix('"')
    key, digest = ran(sys.executable, "-c", code).split()
    (example,) = (b for b in blocks("docs/serving.md", "yaml") if b.startswith("keys:"))
    path = tmp_path / "keys.yaml"
    path.write_text(example.replace("0f1e...", digest))
    (ada,) = read_keys(str(path))
    assert (ada.name, ada.sha256, ada.concurrent) == ("ada", digest, 4)
    assert len(key) >= 40


def test_every_argument_is_documented() -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    shipped = (ROOT / "serve" / "chat.yaml").read_text(encoding="utf-8")
    assert [name for name in ServeArgs.model_fields if f"`{name}`" not in page] == []
    told_elsewhere = {"bits", "slots", "kv_gib", "threads", "cpus", "gpus"}
    missing = {name for name in ServeArgs.model_fields if f"{name}:" not in shipped}
    assert missing == told_elsewhere
