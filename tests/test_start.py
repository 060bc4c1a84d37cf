"""What a start waits for: the driver of a run imports nothing that its workers alone need."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("bitsandbytes", "datasets", "deepspeed", "peft", "transformers", "triton")


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("raytune_ft.running", HEAVY),
        # Ray starts behind these, while what follows is imported
        ("raytune_ft.train", (*HEAVY, "ray", "torch")),
    ],
)
def test_the_driver_imports_none_of_the_workers_libraries(
    module: str, absent: tuple[str, ...]
) -> None:
    code = f"import sys, {module}; print([n for n in {absent!r} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
