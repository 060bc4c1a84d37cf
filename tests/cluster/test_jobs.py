"""`ray job submit`, logs, stop and the same job again on three nodes: the docs' own commands."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import LocalCluster
from raytune_ft.training.run_folder import RunFolder, read_jsonl
from tests.cluster import local_runs
from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow]

MARK = "<!-- transcript -->\n```\n"
SHARED = "/shared/runs"
"""What the docs call the folder of runs."""
BEGUN = re.compile(r"^step (\d+)/", re.MULTILINE)


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_runs.cluster() as started:
        yield started


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is submitted: a checkout with a recipe of two hundred steps in it."""
    folder = tmp_path_factory.mktemp("jobs")
    local_runs.make_inputs(folder / "inputs")
    clone = local_runs.make_checkout(folder / "clone")
    local_runs.write_recipe(clone / "mine.yaml", folder / "inputs", epochs=20)
    return clone


def transcript() -> list[tuple[str, list[str]]]:
    """Return the docs' commands, each with the lines that they show of its output."""
    text = (ROOT / "docs/clusters.md").read_text(encoding="utf-8")
    block = text.partition(MARK)[2].partition("```")[0]
    found: list[tuple[str, list[str]]] = []
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        else:
            found[-1][1].append(line)
    return found


def shape(line: str) -> str:
    """Return a line without its numbers and without the log's own beginning."""
    return " ".join(re.sub(r"\d[\d.,]*", "0", line).split())


def missing(shown: list[str], said: str) -> list[str]:
    """Return the shown lines that do not stand in what was said, in their order."""
    lines = iter([shape(line) for line in said.splitlines()])
    return [line for line in shown if not any(shape(line) in said_line for said_line in lines)]


class Shell:
    """Runs the docs' commands in a checkout, with what they leave to the reader filled in."""

    def __init__(self, cluster: LocalCluster, checkout: Path, runs: Path) -> None:
        self.environment = {**os.environ, **cluster.environment, **local_runs.PATHS}
        self.checkout, self.runs = checkout, runs

    def start(self, command: str) -> subprocess.Popen[str]:
        words = shlex.split(command.replace(SHARED, str(self.runs)))
        assert words[:2] == ["ray", "job"]
        return subprocess.Popen(
            [*words[:3], "--log-style", "record", "--log-color", "false", *words[3:]],
            env=self.environment, cwd=self.checkout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def run(self, command: str) -> str:
        """Return what a command says, with the docs' names for folders."""
        said, _ = self.start(command).communicate(timeout=local_runs.ENDS_IN_S)
        return self.told(said)

    def told(self, said: str) -> str:
        return said.replace(str(self.runs), SHARED)


class Following:
    """Reads along with a command's output while it runs."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.said = process, ""
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def until(self, pattern: re.Pattern[str]) -> None:
        """Return when the pattern was said."""
        end = time.monotonic() + local_runs.ENDS_IN_S
        while not pattern.search(self.said):
            assert self.thread.is_alive() and time.monotonic() < end, self.said
            time.sleep(0.05)

    def whole(self) -> str:
        """Wait for the end and return all that was said."""
        self.thread.join(local_runs.ENDS_IN_S)
        assert self.process.wait(local_runs.ENDS_IN_S) is not None
        return self.said


def test_the_docs_commands_stop_a_job_and_go_on_with_it(
    cluster: LocalCluster, checkout: Path, tmp_path: Path
) -> None:
    shell = Shell(cluster, checkout, tmp_path / "runs")
    commands = dict(transcript())
    submit, follow, stop, logs, status, again = commands
    said = {submit: shell.run(submit)}
    following = Following(shell.start(follow))
    following.until(re.compile(r"^step [2-9]/", re.MULTILINE))
    said[stop] = shell.run(stop)
    said[follow] = shell.told(following.whole())
    said[logs], said[status] = shell.run(logs), shell.run(status)
    folder = RunFolder(tmp_path / "runs/mine")
    assert folder.info()["status"] == "stopped"
    stopped_at = max(event["step"] for event in read_jsonl(folder.metrics))
    said[again] = shell.run(again)
    for command, shown in commands.items():
        assert not missing(shown, said[command]), said[command]
    assert folder.info()["status"] == "done"
    steps = [event["step"] for event in read_jsonl(folder.metrics) if "loss" in event]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) > stopped_at
    first = BEGUN.search(said[again])
    assert first is not None and 1 < int(first[1]) <= stopped_at + 1, "it went on"


def test_what_does_not_belong_to_a_job_did_not_travel(
    cluster: LocalCluster, checkout: Path
) -> None:
    packages = list(cluster.folder.glob("*/session_*/runtime_resources/working_dir_files/_ray_*/"))
    assert packages
    for package in packages:
        there = {path.name for path in package.iterdir()}
        assert {"raytune_ft", "configs", "mine.yaml"} <= there
        assert not there & set(local_runs.STAYS)


def test_a_job_of_the_installed_package_needs_only_a_name(
    cluster: LocalCluster, checkout: Path, tmp_path: Path
) -> None:
    inputs = checkout.parent / "inputs"
    shell = Shell(cluster, tmp_path, tmp_path / "runs")
    said = shell.run(
        "ray job submit -- python -m raytune_ft.train --config quickstart "
        f"model.path={inputs}/model data.sources='[{{path: {inputs}/rows.jsonl}}]' data.fill={{}} "
        f"train.max_steps=2 train.deepspeed=none run.name=named run.storage={SHARED} run.workers=1"
    )
    assert "succeeded" in said, said
    assert RunFolder(tmp_path / "runs/named").info()["status"] == "done"
