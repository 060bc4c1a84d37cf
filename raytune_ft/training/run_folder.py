"""The run folder: every file of a run, who writes it and when (docs/architecture.md).

Only rank 0 writes (`recording`). Lines of the JSONL files beyond the step that a run is taken up
from are cut off, so each step stands there once.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from raytune_ft import __version__, host
from raytune_ft.errors import CheckpointError
from raytune_ft.training.guarding import liveness

Event = dict[str, Any]

PACKAGES = (
    "torch", "transformers", "peft", "bitsandbytes", "deepspeed", "ray", "datasets", "accelerate",
)  # fmt: skip

MANIFEST = "manifest.json"
"""Of a checkpoint, which is there when this is."""
STEP_PREFIX = "step_"
"""What a checkpoint's name begins with."""
STARTING = ".starting"
"""Says which process begins a run, until run.json does."""


class RunFolder:
    """Paths and small files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).resolve()

    @classmethod
    def existing(cls, path: str | Path) -> RunFolder:
        """Open a run folder that was made before; CheckpointError if it is none."""
        folder = cls(path)
        if not folder.run_json.is_file():
            raise CheckpointError(
                f"{path}: not a run folder (it has no run.json); runs stand under run.storage, "
                "by default ./runs"
            )
        return folder

    @property
    def run_json(self) -> Path:
        return self.path / "run.json"

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def mmlu(self) -> Path:
        return self.path / "mmlu.jsonl"

    @property
    def evaluations(self) -> Path:
        """Answers to held-out rows, a line each."""
        return self.path / "evaluations.jsonl"

    @property
    def resumes(self) -> Path:
        """A line for each time that the run was taken up from a checkpoint."""
        return self.path / "resumes.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    @property
    def lines(self) -> Path:
        """What the run said for people, line by line, of all its drivers."""
        return self.path / "lines.log"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def model(self) -> Path:
        """The weights of a full-parameter run."""
        return self.path / "model"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    def info(self) -> Event:
        """Read run.json."""
        content: Event = read_json(self.run_json)
        return content

    def status(self) -> str:
        """Return `running`, `done`, `failed` and the like; `interrupted` if its driver is gone."""
        info = self.info()
        said: str = info.get("status", "unknown")
        if said != "running":
            return said
        driver = info.get("driver") or {}
        gone = liveness.is_gone(driver) or liveness.is_silent(driver, self.alive())
        return "interrupted" if gone else said

    def alive(self) -> Any:
        """Read the driver's last sign of life; None where there is none."""
        try:
            return read_json(self.path / liveness.ALIVE)
        except CheckpointError:
            return None

    def update(self, **fields: Any) -> None:
        """Change fields of run.json, whole or not at all."""
        known = self.info() if self.run_json.is_file() else {}
        write_json(self.run_json, {**known, **fields})

    def create(self, name: str, recipe_yaml: str, **fields: Any) -> None:
        """Make the folder with recipe.yaml, run.json and environment.json; this process drives."""
        self.path.mkdir(parents=True, exist_ok=True)
        for left in self.path.glob(".*.[0-9]*"):  # of a driver that was killed as it wrote
            left.unlink(missing_ok=True)
        _replace(self.recipe, recipe_yaml)
        write_json(self.path / "environment.json", environment())
        created = datetime.now(timezone.utc).isoformat(timespec="seconds")
        driver = liveness.this_process()
        self.update(
            name=name, status="running", driver=driver, created=created, version=__version__,
            ended=None, **fields,
        )  # fmt: skip
        (self.path / STARTING).unlink(missing_ok=True)

    def cut_after(self, step: int) -> int:
        """Drop lines of later steps than `step` from the JSONL files; step 0 is the beginning.

        Returns:
            The number of steps that stood there and will be taken again.
        """
        last = max((e["step"] for e in read_jsonl(self.metrics)), default=0)
        for path in (self.metrics, self.samples, self.mmlu, self.evaluations):
            if path.is_file():
                told = read_jsonl(path) if step else iter(())
                kept = [e for e in told if e["step"] <= step and e.get("when") != "after"]
                _replace(path, "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in kept))
        return max(0, last - step)


def environment() -> Event:
    """Describe the machine and the versions a run's numbers depend on."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": host.cores(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "packages": {"raytune_ft": __version__, **{p: _version(p) for p in PACKAGES}},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def append_jsonl(path: Path, fields: Event) -> None:
    """Add one line in one write, so that a reader never sees half of one."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(fields, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> Iterator[Event]:
    """Yield the lines of a JSONL file; a last line that a crash cut short is left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:  # not splitlines: a text may hold other line ends than ours
            try:
                yield json.loads(line)
            except ValueError:
                return


def read_json(path: Path) -> Any:
    """Read one of our JSON files; CheckpointError names it when it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}); the run folder is damaged"
        ) from None


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file by rename, so that it is never half there."""
    _replace(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
