"""A cluster of `deploy/local.py` for tests: a checkout to submit, drivers, what they leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from deploy.local import LocalCluster, local_cluster
from tests.conftest import ROOT, make_tiny_model, write_chats

BIN = Path(sys.executable).parent
PATHS = {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
TRAVELS = ("raytune_ft", "configs", "serve", "deploy", ".gitignore", ".rayignore", "pyproject.toml")
STAYS = (".git", ".venv", "runs", "tests", "docs", "dist")
"""Folders of a checkout that do not travel."""
ENDS_IN_S = 600.0


@contextmanager
def cluster(**options: Any) -> Iterator[LocalCluster]:
    """Run three nodes whose processes find this environment's programs by name."""
    environment = {**PATHS, **options.pop("environment", {})}
    with local_cluster(3, environment=environment, **options) as started:
        yield started


def make_checkout(folder: Path) -> Path:
    """Copy what a checkout has that a job needs, with a mark where nothing is to travel."""
    for name in TRAVELS:
        source = ROOT / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, folder / name, ignore=ignored)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(source, folder / name)
    for name in STAYS:
        (folder / name).mkdir()
        (folder / name / "stays").touch()
    return folder


def make_inputs(folder: Path) -> None:
    """Write a tiny model and rows."""
    folder.mkdir(exist_ok=True)
    (folder / "model").mkdir()
    make_tiny_model(folder / "model")
    write_chats(folder / "rows.jsonl", 40)


def write_recipe(path: Path, inputs: Path, **run: Any) -> Path:
    """Write a recipe of two workers and about five steps an epoch."""
    content: dict[str, Any] = {
        "model": {"path": str(inputs / "model")},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.1},
        "data": {"sources": [{"path": str(inputs / "rows.jsonl")}], "max_length": 96, "window": 16},
        "train": {"epochs": run.pop("epochs", 2), "accumulation": 1, "lr": 5e-3, "log_every": 1,
                  "deepspeed": "none", "seed": run.pop("seed", 7)},
        "chat_eval": {"every": None, "prompts": ["what is red?"], "max_new_tokens": 4},
        "checkpoint": {"every": 20, "keep": 2},
        "run": {"workers": 2, "trackers": [], **run},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    return path


def start(
    recipe: Path, cluster: LocalCluster, *overrides: str, extra: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a driver that joins the cluster; all it says is in one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "raytune_ft.train", "--config", str(recipe), *overrides],
        env={**os.environ, **cluster.environment, **(extra or {})},
        cwd=recipe.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def asked(cluster: LocalCluster, program: str) -> str:
    """Run a Python program as a driver of the cluster, which it has joined; return its output."""
    begin = "import ray\nray.init(logging_level='ERROR', log_to_driver=False)\n"
    done = subprocess.run(
        [sys.executable, "-c", begin + program], env={**os.environ, **cluster.environment},
        capture_output=True, text=True, timeout=ENDS_IN_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout
