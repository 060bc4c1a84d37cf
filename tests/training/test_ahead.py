"""What a worker does before it is told its job: it imports what is needed, and little else."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from itertools import product
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

from raytune_ft.config.schema import ModelSection
from raytune_ft.model import nf4_store
from raytune_ft.model.lean_imports import PLAIN, SHAPES, Postponed, lean, postponed
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


LOAD = """
from pathlib import Path
import torch
from raytune_ft.config.schema import ModelSection
from raytune_ft.model.loading import load_model
section = ModelSection(path=sys.argv[1], quantization="nf4")
model = load_model(Path(section.path), section, torch.device("cpu"))
model.train().gradient_checkpointing_enable({"use_reentrant": False})
model.enable_input_require_grads()
model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum().backward()
spared = ("sympy", "torch._dynamo")
before = [name for name in spared if name in sys.modules]
torch._dynamo.config.cache_size_limit = 3
assert torch._dynamo.config.cache_size_limit == 3
from torch.nn.functional import relu
assert torch.compile(relu, backend="eager")(torch.tensor([-1.0, 1.0])).tolist() == [0.0, 1.0]
model(input_ids=torch.tensor([[1, 2, 3]])).logits.sum()
found = [name for name in spared[1:] if name in sys.modules]
print(f"{found} behind a compiled function, {before} before")
"""


@pytest.mark.slow
def test_a_worker_has_its_libraries_but_no_compiler() -> None:
    wanted = ["bitsandbytes", "deepspeed", "deepspeed.runtime.engine", "peft"]
    spared = ["mlflow", "scipy.optimize", "sympy", "torch._dynamo", "torch.distributed.fsdp"]
    said = subprocess.run(
        [sys.executable, "-c", READY, " ".join([*wanted, *spared])],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.splitlines()[-1] == str(wanted)


@pytest.mark.slow
def test_a_load_and_a_pass_import_no_compiler(tiny_model: Path) -> None:
    said = subprocess.run(
        [sys.executable, "-c", READY.partition("print(")[0] + LOAD, str(tiny_model)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert said.stdout.splitlines()[-1] == "['torch._dynamo'] behind a compiled function, [] before"


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


POSTPONED = "torch.distributed._composable.fsdp"


def test_a_name_of_a_postponed_module_is_the_real_one_when_it_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, POSTPONED, raising=False)
    with lean():
        from torch.distributed._composable.fsdp import fully_shard

        assert isinstance(sys.modules[POSTPONED], Postponed)
        assert not isinstance(fully_shard, FunctionType)
        assert not isinstance(1, fully_shard)  # type: ignore[arg-type]
    assert POSTPONED not in sys.modules
    with pytest.raises(ValueError, match="ModuleList"):
        fully_shard(torch.nn.ModuleList())
    real = sys.modules[POSTPONED]
    assert isinstance(real.fully_shard, FunctionType)
    with lean():
        assert sys.modules[POSTPONED] is real


@pytest.mark.parametrize("name", PLAIN)
def test_what_is_said_of_plain_numbers_is_what_torch_says(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.fx.experimental import symbolic_shapes

    real = getattr(symbolic_shapes, name)
    monkeypatch.delitem(sys.modules, SHAPES)
    with postponed(SHAPES):
        stand_in = getattr(sys.modules[SHAPES], name)
        said, asked = [], [*product((False, True), repeat=2), (3, 3), (3, 4), ((1, 2), (1, 2))]
        for several in asked:
            for args in (several, several[:1]):
                with suppress(TypeError, AssertionError):
                    right = real(*args)
                    said.append((args, right))
                    assert stand_in(*args) == right and type(stand_in(*args)) is type(right)
        assert isinstance(sys.modules[SHAPES], Postponed), "it was imported for plain numbers"
    assert said


def test_what_else_a_postponed_module_has_is_imported_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, POSTPONED, raising=False)
    with lean():
        from torch.distributed._composable.fsdp import FSDPModule

        assert isinstance(FSDPModule, type) and FSDPModule.__module__.startswith("torch.")
        assert not isinstance(sys.modules[POSTPONED], Postponed)


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
