"""How fast is a QLoRA step of a 7B model here, beside what else there is?

The shipped recipe internlm_7b_qlora_oasst1_e3 on chat rows: random weights of its shape, the same
rows, ids and optimizer step (16 packs of 2048) for every side, each variant in a process of its
own. First comes the gate: the fast path's losses and gradients beside the plain path's. Then those
that are close, in the order Z ... B A, hf, A B ... Z, so that a drift of the clocks cancels: A is
`ours`, B the strongest peer, so these have their second pass first where the budget ends. What runs
once comes last: other peers, behind by far more than a drift, and profiles. Clocks, power and
temperature are written each second. A line of JSON for each run, then a table with ratios.

Ours: ours, mb1, mb1+nograph, plain, bare, ray, profile, profile+mb1, ours+fp8, mb1+fp8,
profile+fp8, ours+8gb, ours+6gb (benchmarks.qlora_ours).
Peers: options joined by `+` (benchmarks.peers), such as hf, hf+liger+nogc+b4, hf+ds, trl+liger,
trl+flex+liger+nogc+b4, unsloth+nogc+b4. Unsloth runs where its own packages are named by
--unsloth-site.
Run: python -m benchmarks.qlora_gpu [--rows FILE|FOLDER|HUB NAME] [--variants V ...] [--steps N]
     [--budget SECONDS] [--unsloth-site DIR] [--out FILE];  ... --table FILE
     rehearsal without a GPU: --shrink 64 --layers 2 --length 64 --packs 4 --steps 2
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import qlora_gate, qlora_ours, qlora_rows
from benchmarks.lines import Lines

ROOT = Path(__file__).resolve().parent.parent
OURS = tuple(qlora_ours.CHANGES)
TWICE = (
    "ours", "unsloth+nogc+b4", "hf+liger+nogc+b4", "mb1", "ray", "bare", "ours+fp8", "mb1+fp8",
)  # fmt: skip
"""What is near enough for a drift to matter; those whose second pass matters most come first."""
DEFAULT = ("ours", "mb1", "unsloth+nogc+b4", "hf+liger+nogc+b4", "hf")
"""What eight minutes have room for."""
PEERS = ("hf", "trl", "unsloth")
"""What a peer's name begins with, before its first `+`."""
AGAINST = "hf"
APART = 1.03
"""Two passes that differ by more are not compared."""
CLOCKS = "timestamp,clocks.sm,power.draw,temperature.gpu"


def main() -> None:
    """Prepare, check, run, print the table."""
    args = arguments()
    if args.table is not None:
        print_table([json.loads(line) for line in args.table.read_text().splitlines()])
    elif args.one is not None:
        print(json.dumps(one(args)), flush=True)
    else:
        bench(args)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="timdettmers/openassistant-guanaco")
    parser.add_argument("--variants", nargs="+", default=list(DEFAULT))
    parser.add_argument("--steps", type=int, default=5, help="timed optimizer steps")
    parser.add_argument("--warm", type=int, default=2, help="steps before them")
    parser.add_argument("--cap", type=float, default=20.0, help="seconds of timed steps, from 2 on")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds of all together")
    parser.add_argument("--gate-steps", type=int, default=10)
    parser.add_argument("--gate-packs", type=int, default=2)
    parser.add_argument("--no-gate", action="store_true")
    parser.add_argument("--unsloth-site", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--packs", type=int, default=16)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="for what is made; a temporary one")
    parser.add_argument("--table", type=Path, help="print the table of an --out file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.folder is None:
        args.folder = Path(tempfile.mkdtemp(prefix="qlora_gpu_"))
    args.rows = Path(args.rows).resolve() if Path(args.rows).exists() else args.rows
    return args


def one(args: argparse.Namespace) -> dict[str, Any]:
    """Run one piece in this process."""
    if args.one == "rows":
        return {"rows": qlora_rows.prepare(args)}
    if args.one == "weights":
        return {"weights": write_weights(args)}
    if args.one == "gate":
        return {"gate": qlora_gate.check(args)}
    return {"variant": args.one, **qlora_ours.measure(args)}


def write_weights(args: argparse.Namespace) -> dict[str, Any]:
    """Make the random weights that ours has, and write them for the peers."""
    import torch

    from raytune_ft.model import loading

    begun = time.perf_counter()
    device = qlora_ours.device_of(torch)
    recipe = qlora_rows.recipe_of(args, {})
    qlora_ours.put_random_weights(args, recipe, device)
    folder = qlora_rows.write_quantised(args, loading.load_model())  # type: ignore[call-arg]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return {"gb": round(size / 1e9, 2), "seconds": round(time.perf_counter() - begun, 1)}


class Bench(Lines):
    """Runs pieces as processes, keeps their lines, and knows when the time is over."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.took: dict[str, float] = {}

    def run(self, name: str, **more: Any) -> dict[str, Any]:
        """Run a piece or a variant to its end and keep its line, or what it said instead."""
        need = self.took.get(name, 20.0)
        if self.left_s < need:
            return self.emit(variant=name, skipped=f"{self.left_s:.0f} s left", **more)
        started = time.monotonic()
        process = subprocess.Popen(
            self.command(name), env=self.environment(name), cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        try:
            said, words = process.communicate(timeout=self.left_s)
            found = _last_json(said)
            failed = {"failed": process.returncode, "words": words.strip()[-600:]}
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
            process.communicate()
            found, failed = None, {"failed": "no time left"}
        self.took[name] = time.monotonic() - started
        took = round(self.took[name], 1)
        return self.emit(**({"variant": name, **failed} if found is None else found),
                         process_s=took, **more)  # fmt: skip

    def command(self, name: str) -> list[str]:
        """Return the command of a piece or variant."""
        args = self.args
        sizes = ["--folder", args.folder, "--length", args.length, "--packs", args.packs,
                 "--warm", args.warm, "--steps", args.steps, "--cap", args.cap]  # fmt: skip
        if _is_peer(name):
            words = [sys.executable, "-m", "benchmarks.peers", name, *sizes]
        else:
            words = [sys.executable, "-m", "benchmarks.qlora_gpu", "--one", name, *sizes,
                     "--rows", args.rows, "--shrink", args.shrink, "--gate-steps", args.gate_steps,
                     "--gate-packs", args.gate_packs]  # fmt: skip
            words += ["--layers", args.layers] if args.layers else []
        return [str(word) for word in words]

    def environment(self, name: str) -> dict[str, str]:
        """Return a process's environment; Unsloth has packages of its own, and no others."""
        mine = os.environ.get("PYTHONPATH", "")
        if name.startswith("unsloth"):
            mine = str(self.args.unsloth_site)
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), mine])),
            "PYTORCH_ALLOC_CONF": "expandable_segments:True",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }


def _last_json(text: str) -> dict[str, Any] | None:
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found: dict[str, Any] = json.loads(line)
            except ValueError:
                continue
            return found
    return None


def bench(args: argparse.Namespace) -> None:
    """Run everything, a line each, and print the table."""
    args.folder.mkdir(parents=True, exist_ok=True)
    runs = Bench(args)
    runs.emit(machine=machine(), variants=args.variants)
    clocks = _log_clocks(args)
    try:
        runs.run("rows")
        order = list(ordered(args))
        if any(name not in OURS for name, _ in order):
            runs.run("weights")
        if not args.no_gate:
            runs.run("gate")
        for name, number in order:
            runs.run(name, number=number)
    finally:
        if clocks is not None:
            clocks.terminate()
            clocks.wait()
    print_table(runs.lines)


def ordered(args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Yield (variant, pass): there and back around what ratios are to, then what runs once."""
    able = [v for v in args.variants if args.unsloth_site or not v.startswith("unsloth")]
    twice = [v for v in TWICE if v in able]
    yield from ((v, 1) for v in reversed(twice))
    yield from ((v, 1) for v in able if v == AGAINST)
    yield from ((v, 2) for v in twice)
    yield from ((v, 1) for v in able if v not in TWICE and v != AGAINST)


def machine() -> dict[str, Any]:
    """Name what this runs on."""
    import platform
    from importlib import metadata

    names = ("torch", "transformers", "peft", "bitsandbytes", "deepspeed", "ray", "trl",
             "liger-kernel")  # fmt: skip
    known = {d.metadata["Name"].lower() for d in metadata.distributions() if d.metadata["Name"]}
    versions = {name: metadata.version(name) for name in names if name in known}
    return {"python": platform.python_version(), "cores": os.cpu_count(), "gpu": _gpu(), **versions}


def _gpu() -> str:
    try:
        words = [
            "nvidia-smi",
            "--query-gpu=name,memory.total,driver_version",
            "--format=csv,noheader",
        ]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "none"


def _log_clocks(args: argparse.Namespace) -> subprocess.Popen[bytes] | None:
    file = args.out.with_suffix(".clocks.csv") if args.out else args.folder / "clocks.csv"
    words = ["nvidia-smi", f"--query-gpu={CLOCKS}", "--format=csv,noheader,nounits", "-l", "1"]
    try:
        with file.open("wb") as out:
            return subprocess.Popen(words, stdout=out, stderr=subprocess.DEVNULL)
    except OSError:
        return None


def print_table(lines: list[dict[str, Any]]) -> None:
    """Print as Markdown what ran: speed of both passes, ratio, memory, spread."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if "tok_s" in line:
            runs.setdefault(line["variant"], []).append(line)
        elif "gate" in line:
            print("gate:", json.dumps(line["gate"]))
        elif "failed" in line or "skipped" in line:
            print(f"{line['variant']}: {line.get('failed', line.get('skipped'))}")
    speeds = {name: sum(run["tok_s"] for run in both) / len(both) for name, both in runs.items()}
    base = speeds.get(AGAINST)
    best = max((speed for name, speed in speeds.items() if _is_peer(name)), default=None)
    columns = ["variant", "tok/s", "passes", f"x {AGAINST}", "x best peer", "allocated GiB",
               "device GiB", "step s", "settings"]  # fmt: skip
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" for _ in columns), "|")
    for name, both in sorted(runs.items(), key=lambda item: -speeds[item[0]]):
        values = [run["tok_s"] for run in both]
        note = ", differ" if max(values) > APART * min(values) else ""
        ratios = [f"{speeds[name] / one:.2f}" if one else "" for one in (base, best)]
        seconds = sorted(s for run in both for s in run["step_s"])
        last = both[-1]
        cells = [name, f"{speeds[name]:,.0f}", " / ".join(f"{v:,}" for v in values) + note, *ratios,
                 _rounded(last.get("allocated_gb")), _rounded(last.get("device_gb")),
                 f"{seconds[0]:.2f} to {seconds[-1]:.2f}", _settings(last)]  # fmt: skip
        print("|", " | ".join(cells), "|")


def _is_peer(name: str) -> bool:
    return name.partition("+")[0] in PEERS


def _rounded(gib: float | None) -> str:
    return "" if gib is None else f"{gib:.1f}"


def _settings(line: dict[str, Any]) -> str:
    if "micro_batch" not in line:
        return ""
    again = ", recomputed" if line.get("recompute") else ""
    return f"{line['micro_batch']} x {line['passes']}{again}"


if __name__ == "__main__":
    main()
