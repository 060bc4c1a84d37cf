"""How fast do rows become packs, beside `datasets` and TRL?

Makes 20,000 rows of guanaco's lengths, as plain text and as chats, trains a vocabulary on them, and
runs every side in processes of its own, one after the other: ours through Ray, ours in one
process, `datasets` with TRL's packing, TRL's own preparation, and the bare tokenizer. Compares ids
and labels on every row, and prints a table. Start-up is apart from the rate behind it.
Run: python -m benchmarks.data [--rows 20000] [--rounds 1] [--json FILE]; needs PyPI once, for TRL.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data_rows

TRL = "trl==1.16.0"
PEERS = Path(__file__).resolve().parent / ".peers"
"""Git-ignored; TRL lies here and not among the project's packages."""
Result = dict[str, Any]


def main() -> None:
    """Run every case and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=1, help="the best one counts on every side")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    _install_peer()
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data_rows.write(folder, asked.rows)
        found = _measure(folder, asked.rounds)
    found["took_s"] = round(time.perf_counter() - begun)
    found |= {"rows": asked.rows, "rounds": asked.rounds}
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(_page(found))


def _install_peer() -> None:
    if not (PEERS / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*command, str(PEERS), TRL], check=True)


def _measure(folder: Path, rounds: int) -> Result:
    """Return the results of all cases by name."""
    found: Result = {"mean": _run(folder, "lengths", "chat")["mean"]}
    for rows in ("plain", "chat"):
        for _ in range(rounds):
            for case in ("stream", "mapped", "in_process", "bare"):
                _keep(found, f"{rows} {case}", _run(folder, case, rows))
            for case in ("stream", "in_process"):
                _keep(found, f"{rows} {case} fast", _run(folder, case, rows, fast=True))
        _keep(found, f"{rows} trl", _run(folder, "trl", rows))
        _run(folder, "ids", rows)
        _run(folder, "ids", rows, fast=True)
        found[f"{rows} same"] = _compare(folder, rows)
    found["small"] = _run(folder, "stream", "small")["first_s"]
    found["packing"] = _run(folder, "packing", "chat")
    return found


def _keep(found: Result, name: str, result: Result) -> None:
    if name not in found or result["rate"] > found[name]["rate"]:
        found[name] = result


def _run(folder: Path, case: str, rows: str, *, fast: bool = False) -> Result:
    """Run a case in a process of its own; its last line of output is the result."""
    environment = {
        **os.environ,
        "RAYTUNE_FAST_TOKENIZER": str(int(fast)),
        "PYTHONPATH": os.pathsep.join([str(PEERS.parents[1]), str(PEERS)]),
        "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1",
    }  # fmt: skip
    print(f"{time.strftime('%H:%M:%S')} {rows} {case}{' fast' * fast}", file=sys.stderr)
    command = [sys.executable, "-m", "benchmarks.data_cases", str(folder), case, rows]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{case} on {rows} rows failed:\n{done.stderr[-3000:]}")
    result: Result = json.loads(done.stdout.strip().rpartition("\n")[2])
    return result


def _compare(folder: Path, rows: str) -> Result:
    """Count the rows whose ids, and labels, are the same on all sides."""
    exact = np.load(folder / f"ids-{rows}-tokenizers.npy")
    same: Result = {"rows": len(exact)}
    for other in ("gigatoken", "theirs"):
        file = folder / f"ids-{rows}-{other}.npy"
        if file.is_file():
            same[other] = (exact == np.load(file)).sum(axis=0).tolist()
    return same


def _page(found: Result) -> str:
    """Write the table."""
    lines = [
        f"{datetime.date.today():%d %B %Y}, {platform.machine()}, {os.cpu_count()} cores, "
        f"`python -m benchmarks.data`, {found['took_s']} s. {found['rows']:,} rows "
        f"({data_rows.source_of_rows()}; chats of {found['mean']:.0f} tokens in the mean), "
        f"rounds: {found['rounds']}; ray {version('ray')}, tokenizers {version('tokenizers')}, "
        f"datasets {version('datasets')}, {TRL.replace('==', ' ')}.",
        "",
        "| rows | side | rows/s | to the first pack, s | to datasets + TRL | goal |",
        "|---|---|---|---|---|---|",
    ]
    for rows in ("plain", "chat"):
        lines += _rate_lines(found, rows)
    small, packing = found["small"], found["packing"]
    lines += [
        f"| 1,000 chats | ours, through Ray | | {small:.1f} | | <= 3 s: {_met(small <= 3)} |",
        "",
        "| packing by lengths | rows/s | goal |",
        "|---|---|---|",
        f"| ours, windows of 1,024 | {packing['ours']:,.0f} | "
        f">= 500,000: {_met(packing['ours'] >= 500_000)} |",
        f"| TRL `bfd` | {packing['bfd']:,.0f} | |",
        f"| TRL `wrapped`, cuts rows | {packing['wrapped']:,.0f} | |",
        "",
    ]
    return "\n".join([*lines, *(_same_line(found[f"{rows} same"], rows) for rows in _ROWS)])


_ROWS = ("plain", "chat")
_SIDES = {
    "stream": ("ours, through Ray", 1.0),
    "stream fast": ("ours with gigatoken, through Ray", 5.0),
    "in_process": ("ours, one process", None),
    "in_process fast": ("ours with gigatoken, one process", None),
    "mapped": ("`datasets.map`, batched, + TRL `bfd`", None),
    "trl": ("TRL's own preparation", None),
    "bare": ("`tokenizers` alone, 2 threads", None),
}
"""Case -> what it is, and its goal as a multiple of `mapped`."""


def _rate_lines(found: Result, rows: str) -> list[str]:
    base = found[f"{rows} mapped"]["rate"]
    lines = []
    for case, (name, goal) in _SIDES.items():
        result = found[f"{rows} {case}"]
        ratio = result["rate"] / base
        first = f"{result['first_s']:.1f}" if "first_s" in result else ""
        met = "" if goal is None else f">= {goal:g}x: {_met(ratio >= goal)}"
        used = "" if result["engine"] == "gigatoken" or "fast" not in case else " (not installed)"
        lines.append(
            f"| {rows} | {name}{used} | {result['rate']:,.0f} | {first} | {ratio:.2f} | {met} |"
        )
    return lines


def _met(met: bool) -> str:
    return "met" if met else "missed"


def _same_line(same: Result, rows: str) -> str:
    parts = [
        f"{side} {same[key][0]:,} and {same[key][1]:,}"
        for key, side in (("gigatoken", "gigatoken"), ("theirs", "`datasets` + transformers"))
        if key in same
    ]
    return f"Of {same['rows']:,} {rows} rows, equal ids and labels: {'; '.join(parts)}."


if __name__ == "__main__":
    main()
