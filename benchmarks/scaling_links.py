"""Does the model of docs/scaling.md say how long ranks talk? Real engines on links of known speed.

Two and four gloo ranks, each in a network namespace of its own, take optimizer steps of the real
engine with every preset, all weights of a small model in float32. What a step takes longer on a
shaped link than on one without a limit is what the model's seconds are held against. Steps without
a limit are measured again beside every shaped one, and the fastest of each counts, since machines
have other work; bytes that leave a host are counted by its interface. Prints a line of JSON for
each cell and a table at the end. Linux, as root.

Run: python -m benchmarks.scaling_links [--ranks 2,4] [--links MBIT,MBIT,...] [--steps 4]
     [--zeros none,zero1,zero2,stage2,zero3] [--hidden 256] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.lines import Lines
from benchmarks.namespaces import DEVICE, Hosts, hosts, missing
from benchmarks.scaling_links_rank import MICRO_STEPS
from raytune_ft.config.estimates.links import Link, ring_seconds
from raytune_ft.config.estimates.traffic import Trained, payloads, sent_by_model

ROOT = Path(__file__).resolve().parent.parent
LINKS = [1000.0, 200.0, 50.0]
"""Mbit/s."""
ZEROS = {"none": 0, "zero1": 1, "zero2": 2, "stage2": 2, "zero3": 3}
"""Preset, or a file of stage 2, which sums gradients at every micro-step -> stage."""
PAYLOAD, FRAME = 1448, 1514
"""Bytes of a segment that TCP carries, and that the link does: Ethernet, IP and TCP have headers
and a time stamp."""
WAIT_S = 300.0


def main() -> int:
    """Measure every cell; 2 where this machine cannot."""
    args = arguments()
    if found := missing():
        print(found, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # namespaces go away on the way out
    lines = Lines(args)
    with tempfile.TemporaryDirectory(prefix="scaling_links_") as place:
        folder = Path(place)
        write_model(folder, args.hidden)
        for world in args.ranks:
            with hosts(world) as made, ranks(made, world, folder) as pipes:
                for zero in args.zeros:
                    measure(args, lines, made, pipes, zero, folder)
    show([line for line in lines.lines if "measured_s" in line])
    return 0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=lambda text: [int(n) for n in text.split(",")],
                        default=[2, 4])  # fmt: skip
    parser.add_argument("--links", type=lambda text: [float(n) for n in text.split(",")],
                        default=LINKS)  # fmt: skip
    parser.add_argument("--zeros", type=lambda text: text.split(","), default=list(ZEROS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--budget", type=float, default=1e9)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def write_model(folder: Path, hidden: int) -> None:
    """Write a small random model, and the file of stage 2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    zero = {"zero_optimization": {"stage": 2}}
    (folder / "stage2.json").write_text(json.dumps(zero), encoding="utf-8")


@contextmanager
def ranks(made: Hosts, world: int, folder: Path) -> Iterator[list[Any]]:
    """Start a rank on every host; yield the pipes that take orders."""
    env = {**os.environ, "GLOO_SOCKET_IFNAME": DEVICE, "DS_ACCELERATOR": "cpu",
           "OMP_NUM_THREADS": "1"}  # fmt: skip
    with ExitStack() as stack:
        pipes = []
        for rank in range(world):
            ours, theirs = socket.socketpair()
            command = made.command(
                rank, sys.executable, "-m", "benchmarks.scaling_links_rank", str(rank), str(world),
                str(folder), str(theirs.fileno()),
            )  # fmt: skip
            process = subprocess.Popen(
                command, cwd=ROOT, env=env, pass_fds=[theirs.fileno()],
                stdout=subprocess.DEVNULL, stderr=(folder / f"rank_{rank}.log").open("w"),
            )  # fmt: skip
            theirs.close()
            stack.callback(process.wait)
            stack.callback(process.kill)
            pipes.append(Connection(ours.detach()))
        answers(pipes, folder)
        yield pipes


def answers(pipes: list[Any], folder: Path) -> list[Any]:
    """Return what every rank answers; RuntimeError with what the first one that fails wrote."""
    found: dict[int, Any] = {}
    ends = time.monotonic() + WAIT_S
    while len(found) < len(pipes):
        left = [pipe for number, pipe in enumerate(pipes) if number not in found]
        ready = wait(left, max(0.0, ends - time.monotonic()))
        if not ready:
            raise RuntimeError(f"ranks {sorted(set(range(len(pipes))) - set(found))} hang")
        for pipe in ready:
            number = pipes.index(pipe)
            try:
                found[number] = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                said = (folder / f"rank_{number}.log").read_text(encoding="utf-8")
                raise RuntimeError(f"rank {number} ended: {said[-1500:]}") from None
    return [found[number] for number in range(len(pipes))]


def ask(pipes: list[Any], folder: Path, what: str, value: Any) -> list[Any]:
    """Tell all ranks to do something, and return their answers."""
    for pipe in pipes:
        pipe.send((what, value))
    return answers(pipes, folder)


def measure(
    args: argparse.Namespace, lines: Lines, made: Hosts, pipes: list[Any], zero: str, folder: Path
) -> None:
    """Measure one preset on every link."""
    made.shape(None)
    named = str(folder / "stage2.json") if zero == "stage2" else zero
    counted = ask(pipes, folder, "build", named)[0]
    trained = counted or args.trained
    args.trained = trained  # stage 3 has cut them up
    for mbit in args.links:
        free = slowest(ask(pipes, folder, "steps", args.steps))
        made.shape(mbit)
        told = ask(pipes, folder, "steps", args.steps)
        made.shape(None)
        free = min(free, slowest(ask(pipes, folder, "steps", args.steps)))
        _, calls, small, _ = told[0]
        link = Link(mbit * 1e6 / 8 * PAYLOAD / FRAME, 0.0)
        wanted = predicted(zero, trained, calls, small, len(pipes), link)
        out = sum(one[-1] for one in told) / len(told)
        measured = slowest(told) - free
        lines.emit(
            ranks=len(pipes), zero=zero, mbit=mbit, trained=trained, calls=calls,
            small_calls=small, without_limit_s=round(free, 4), predicted_s=round(wanted, 4),
            measured_s=round(measured, 4), ratio=round(measured / wanted, 3),
            sent_by_model=round(sent_by_model(payloads_of(zero, trained), len(pipes))),
            sent_on_the_wire=round(out),
        )  # fmt: skip


def slowest(told: list[Any]) -> float:
    """Return the seconds of the fastest step, each as long as its slowest rank takes."""
    return min(map(max, zip(*(one[0] for one in told), strict=True)))


def predicted(
    zero: str, trained: int, calls: dict[str, float], small: float, world: int, link: Link
) -> float:
    """Return the seconds that a step's collectives take in rings, by the model."""
    calls = {{"reduce_scatter": "all_reduce"}.get(kind, kind): n for kind, n in calls.items()}
    numbers = small * ring_seconds("all_reduce", 0.0, world, link)
    return numbers + sum(
        calls[kind] * ring_seconds(kind, size / calls[kind], world, link)
        for kind, size in payloads_of(zero, trained).items()
    )


def payloads_of(zero: str, trained: int) -> dict[str, int]:
    """Return the payloads of a step, by what gloo does with them.

    Of a reduce-scatter it makes an all-reduce of everything, of which each rank keeps its part.
    """
    work = Trained(trained, MICRO_STEPS, width=4, sharded=trained, fetches=1)
    wanted = payloads(ZEROS[zero], work, every_micro_step=zero == "stage2")
    if "reduce_scatter" in wanted:
        wanted["all_reduce"] = wanted.pop("reduce_scatter")
    return wanted


def show(cells: list[dict[str, Any]]) -> None:
    """Print a row for each preset and number of ranks, a column for each link."""
    links = list(dict.fromkeys(cell["mbit"] for cell in cells))
    heads = [f"{mbit:g} Mbit/s" for mbit in links]
    print(f"\n| `train.deepspeed` | ranks | MB sent | {' | '.join(heads)} |")
    print("| --- " * (3 + len(links)) + "|")
    for zero, world in dict.fromkeys((cell["zero"], cell["ranks"]) for cell in cells):
        own = {c["mbit"]: c for c in cells if (c["zero"], c["ranks"]) == (zero, world)}
        shown = (
            f"{own[link]['predicted_s']:.3f} / {own[link]['measured_s']:.3f} = "
            f"{own[link]['ratio']:.2f}"
            for link in links
        )
        wire, model = (sum(c[key] for c in own.values()) / len(own) / 1e6
                       for key in ("sent_on_the_wire", "sent_by_model"))  # fmt: skip
        bytes_ = f"{model:.2f} / {wire:.2f} = {wire / model:.2f}"
        print(f"| {zero} | {world} | {bytes_} | {' | '.join(shown)} |")


if __name__ == "__main__":
    sys.exit(main())
