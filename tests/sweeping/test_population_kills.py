"""A population through Ray, its driver killed again and again, ends as one that is left alone.

`pytest -m cluster -s tests/sweeping/test_population_kills.py` prints the figures.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.cluster.test_sweep_kills import check_ledger, events, finish

KILLS = int(os.environ.get("SWEEP_KILLS", "8"))
TRIALS = 5
SPACE = """
tune:
  space:
    train.lr: {low: 1.0e-4, high: 3.0e-2, log: 1}
    lora.dropout: [0.0, 0.1, 0.2]
  scheduler: pbt
  trials: 5
  concurrent: 2
"""


def exploits(sweep: Path) -> list[tuple[Any, ...]]:
    return [
        (e["trial"], e["step"], e["from"], e["values"])
        for e in events(sweep)
        if e["event"] == "exploited"
    ]


@pytest.mark.ray
@pytest.mark.cluster
@pytest.mark.timeout(4800)
def test_kills_change_nothing(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    for name in ("calm", "killed"):
        recipe = runs.write_recipe(tmp_path, tiny_model, chats, name)
        with recipe.open("a") as file:
            file.write(SPACE)
    begun = time.monotonic()
    finish(tmp_path / "calm.yaml", tmp_path, "calm", 0, 0)
    print(f"undisturbed: {time.monotonic() - begun:.0f} s")
    seed = int(os.environ.get("SWEEP_KILLS_SEED", time.time_ns() % 10**6))
    begun = time.monotonic()
    figures = finish(tmp_path / "killed.yaml", tmp_path, "killed", seed, KILLS)
    calm, killed = tmp_path / "runs/calm", tmp_path / "runs/killed"
    assert check_ledger(killed) == check_ledger(calm)
    assert sorted(check_ledger(killed)) == list(range(TRIALS))
    assert exploits(killed) == exploits(calm)
    assert len(exploits(calm)) > 2
    for number in range(TRIALS):
        name = f"trials/trial_000{number}/adapter/adapter_model.safetensors"
        assert runs.sha256(killed / name) == runs.sha256(calm / name)
    counts = Counter(event["event"] for event in events(killed))
    print(
        f"seed {seed}: {figures['kills']} kills of {figures['processes']} processes in "
        f"{time.monotonic() - begun:.0f} s: {counts}, the same exploits and bytes"
    )
