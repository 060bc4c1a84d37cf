"""What a start waits for: the driver of a run imports nothing that its workers alone need."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("bitsandbytes", "datasets", "deepspeed", "peft", "transformers", "triton")


def test_the_driver_imports_none_of_the_workers_libraries() -> None:
    code = f"import sys, raytune_ft.train; print([n for n in {HEAVY!r} if n in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
