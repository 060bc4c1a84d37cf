"""GPUs as the driver's tool lists them."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.config.estimates import gpus

TWO = """\
0, GPU-1f0c, NVIDIA H200, 143771, 143158
1, GPU-2b7a, NVIDIA L4, 23034, [N/A]
"""


@pytest.mark.parametrize(
    ("chosen", "names"),
    [(None, ["NVIDIA H200", "NVIDIA L4"]), ("1", ["NVIDIA L4"]), ("GPU-1f", ["NVIDIA H200"]),
     ("1,0", ["NVIDIA H200", "NVIDIA L4"]), ("", []), ("7", [])],
)  # fmt: skip
def test_gpus_that_a_process_may_use(chosen: str | None, names: list[str]) -> None:
    found = gpus.read_gpus(TWO, chosen)
    assert [gpu.name for gpu in found] == names
    assert all(gpu.memory > 2**34 for gpu in found)
    free = {"NVIDIA H200": 143158 * 2**20, "NVIDIA L4": None}
    assert all(gpu.free == free[gpu.name] for gpu in found)


def test_what_is_no_list_of_gpus_gives_none() -> None:
    assert gpus.read_gpus("No devices were found\n", None) == []
    assert gpus.read_gpus("0, GPU-1, NVIDIA GB10, [N/A], [N/A]\n", None) == []


def test_a_driver_that_hangs_or_fails_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.visible() == []
    tool.write_text("#!/bin/sh\necho '0, GPU-1, NVIDIA H100 80GB HBM3, 81559, 81000'\n")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.visible() == [gpus.Gpu("NVIDIA H100 80GB HBM3", 81559 * 2**20, 81000 * 2**20)]
