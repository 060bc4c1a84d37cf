"""Real training runs for tests: the command line on a tiny model, in a process of its own."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

RECIPE = """
model: {{path: {model}, quantization: {quantization}}}
lora: {{r: 4, alpha: 8, dropout: 0.1}}
data:
  sources: [{{path: {data}}}]
  max_length: 96
  window: 16
train:
  {{epochs: 3, micro_batch_size: 1, accumulation: 2, lr: 5.0e-3, log_every: 1, deepspeed: zero2}}
chat_eval: {{every: null, prompts: ["what is red?"], max_new_tokens: 4}}
checkpoint: {{every: 2, keep: 2}}
run: {{name: {name}, storage: {storage}}}
"""


def write_recipe(
    folder: Path, model: Path, data: Path, name: str, *, quantization: str = "none"
) -> Path:
    """Write a recipe for a run of about twenty steps."""
    path = folder / f"{name}.yaml"
    path.write_text(
        RECIPE.format(
            model=model, data=data, name=name, storage=folder / "runs", quantization=quantization
        )
    )
    return path


def start(recipe: Path, *overrides: str) -> subprocess.Popen[str]:
    """Start `python -m raytune_ft.train`; its stderr is a pipe."""
    command = [sys.executable, "-m", "raytune_ft.train", "--config", str(recipe), *overrides]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))


def train(recipe: Path, *overrides: str) -> str:
    """Run to the end; return what it printed for people."""
    process = start(recipe, *overrides)
    _, printed = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def adapter_of(run: Path) -> dict[str, Tensor]:
    """Read a finished run's adapter."""
    return load_file(run / "adapter/adapter_model.safetensors")


def sha256(path: Path) -> str:
    """Hash a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
