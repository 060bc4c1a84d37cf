"""How long does the quickstart take on this machine, stage by stage?

Runs the shipped recipe into a temporary folder and prints one JSON line: machine, seconds of the
whole command, of optimizer steps, tokens per second, first and last loss.
Run: python -m benchmarks.quickstart
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.watching.reporting import summarize


def main() -> None:
    """Run once and print the line."""
    with tempfile.TemporaryDirectory() as storage:
        command = [
            sys.executable, "-m", "raytune_ft.train", "--config", "quickstart.yaml",
            f"run.storage={storage}", "run.name=bench",
        ]  # fmt: skip
        started = time.perf_counter()
        subprocess.run(command, check=True)
        wall_s = time.perf_counter() - started
        summary = summarize(RunFolder(Path(storage) / "bench"))
    print(json.dumps({
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "wall_s": round(wall_s, 1),
        "steps": summary.steps,
        "steps_s": round(summary.seconds, 1),
        "tokens_per_s": round(summary.tokens_per_s, 1),
        "first_loss": round(summary.first_loss, 4),
        "last_loss": round(summary.last_loss, 4),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
