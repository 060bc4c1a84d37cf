"""What a worker does before it is told its job: it imports what is needed, and little else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import ModelSection
from raytune_ft.model import nf4_store
from raytune_ft.model.lean_imports import lean
from raytune_ft.model.loading import load_model
from raytune_ft.training.ahead import read_ahead

CPU = torch.device("cpu")
READY = """
import sys
from raytune_ft.config.schema import Recipe
from raytune_ft.training.ahead import come_ready
come_ready(Recipe.model_validate({
    "model": {"path": "no/such/model", "quantization": "nf4"},
    "data": {"sources": [{"path": "rows.jsonl"}]}, "train": {"deepspeed": "zero2"},
}))
print(sorted(name for name in sys.argv[1].split() if name in sys.modules))
import mlflow
"""


@pytest.mark.slow
def test_a_worker_has_its_libraries_but_no_compiler() -> None:
    wanted = ["bitsandbytes", "deepspeed", "deepspeed.runtime.engine", "peft"]
    spared = ["mlflow", "torch._inductor.compile_fx"]
    said = subprocess.run(
        [sys.executable, "-c", READY, " ".join([*wanted, *spared])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.splitlines()[-1] == str(wanted)


def test_a_function_that_is_decorated_meanwhile_is_compiled_when_it_is_called() -> None:
    made: list[str] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        made.append("graph")
        return graph.forward

    before = torch.compile
    with lean():

        @torch.compile(backend=backend, dynamic=False)
        def twice(x: torch.Tensor) -> torch.Tensor:
            return x * 2

        plain = torch.compile(twice.__wrapped__, backend="eager")  # type: ignore[attr-defined]
        network = torch.compile(torch.nn.Linear(1, 1), backend="eager")
    assert torch.compile is before
    assert isinstance(twice, FunctionType) and twice.__name__ == "twice"
    assert isinstance(network, torch._dynamo.OptimizedModule)
    assert made == []
    x = torch.arange(3.0)
    for function in (twice, twice, plain):
        assert function(x).tolist() == [0.0, 2.0, 4.0]
    assert made == ["graph"]


def test_modules_are_put_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mlflow", raising=False)
    before = torch.compile
    with pytest.raises(ImportError), lean():
        import mlflow  # noqa: F401
    assert "mlflow" not in sys.modules and torch.compile is before
    monkeypatch.setitem(sys.modules, "mlflow", sys)
    with lean():
        assert sys.modules["mlflow"] is sys
    assert sys.modules["mlflow"] is sys


def test_kept_weights_are_asked_for_whole(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path))
    monkeypatch.setattr(nf4_store, "WORTH_BYTES", 0)
    section = ModelSection(path=str(tiny_model), quantization="nf4")
    asked: list[Path] = []

    def advise(descriptor: int, start: int, size: int, advice: int) -> None:
        assert (start, size, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        asked.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "posix_fadvise", advise)
    read_ahead(tiny_model, section, CPU)
    read_ahead(tmp_path / "none", section, CPU)
    assert asked == []
    load_model(tiny_model, section, CPU)
    read_ahead(tiny_model, section, CPU)
    assert asked == sorted((tmp_path / "nf4").glob("*/*.safetensors")) != []
