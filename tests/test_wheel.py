"""The built wheel alone, in an empty environment outside the checkout, can list and train."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT, make_tiny_model, write_chats

pytestmark = [pytest.mark.slow, pytest.mark.ray]

RECIPE = """
model: {{path: {model}, quantization: nf4}}
lora: {{r: 4, alpha: 8, dropout: 0.0}}
data:
  sources: [{{path: {data}}}]
  max_length: 128
train: {{epochs: 1, accumulation: 2, lr: 1.0e-3, max_steps: 2}}
run: {{name: first, storage: {storage}}}
"""


def test_installed_wheel_lists_and_trains(tmp_path: Path) -> None:
    """This environment's packages are lent to the new one by a .pth file; ours is not."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT],
        check=True, capture_output=True,
    )  # fmt: skip
    wheel = next(tmp_path.glob("*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "raytune_ft/configs/quickstart.yaml" in names
    assert "raytune_ft/configs/data/identity.jsonl" in names
    assert "raytune_ft/serve/page/index.html" in names

    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    subprocess.run(
        [home / "bin/pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True
    )
    lend_packages(home)
    work = tmp_path / "work"
    work.mkdir()
    make_tiny_model(work)
    data = write_chats(work / "chats.jsonl", 12)
    recipe = work / "mine.yaml"
    recipe.write_text(RECIPE.format(model=work, data=data, storage=work / "runs"))

    def call(*command: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HOME": str(tmp_path / "home"), "PYTHONPATH": ""}
        program = [str(home / "bin" / command[0]), *command[1:]]
        return subprocess.run(
            program, cwd=work, env=environment, capture_output=True, text=True, check=False
        )

    where = call("python", "-c", "import raytune_ft; print(raytune_ft.__file__)")
    assert str(home) in where.stdout, "the wheel's package is used, not the checkout's"
    listed = call("raytune-ft", "list")
    assert "internlm_chat_7b_qlora_oasst1_e3" in listed.stdout.split(), listed.stderr
    trained = call("python", "-m", "raytune_ft.train", "--config", "mine.yaml")
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert (work / "runs/first/adapter/adapter_model.safetensors").is_file()
    assert (work / "runs/first/report.html").is_file()


def lend_packages(home: Path) -> None:
    """Put this environment's site-packages behind the new one's, without our editable hook."""
    site = next((home / "lib").glob("python*/site-packages"))
    import torch

    lent = Path(torch.__file__).parent.parent
    # a plain path line adds the folder and, unlike site.addsitedir, runs none of its .pth files
    (site / "lent.pth").write_text(f"{lent}\n")
