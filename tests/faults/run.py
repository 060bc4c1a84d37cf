"""Kill -9 at random instants, many times, several runs at once: one table and a JSON.

    python -m tests.faults.run --plain 300 --ray 100 --worlds 50 --jobs 8 --json faults.json
    python -m tests.faults.run --plain 1 --seed 1234        # that one run again

`--plain`, `--ray` and `--worlds` (another number of ranks after each kill) count kills; runs are
started until there are so many. `FAULT_SEED` is the first run's seed, each further run has the next
number, and every line names the seed of its run. A seed decides what is trained, who is killed and
when; the machine decides what that hits.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # bytes are compared, of float32 on CPU

from tests.conftest import make_tiny_model, write_chats
from tests.faults import plain, ray_runs
from tests.faults.verdict import Verdict, percentile

Trial = Callable[[Path, Path, int], Verdict]
TRIALS: dict[str, Trial] = {
    "plain": plain.run_trial, "worlds": plain.run_world, "ray": ray_runs.run_trial,
}  # fmt: skip


def main(words: list[str] | None = None) -> int:
    """Run trials of both kinds; return 1 if any run differs from the undisturbed one."""
    asked = _arguments(words)
    with tempfile.TemporaryDirectory(prefix="faults-", dir=asked.folder) as place:
        inputs = Path(place) / "inputs"
        inputs.mkdir()
        _in_a_child(lambda: make_inputs(inputs))
        wanted = {"plain": asked.plain, "worlds": asked.worlds, "ray": asked.ray}
        if asked.plain or asked.worlds:
            plain.load()
            plain.prepare(inputs)
        if asked.ray:
            ray_runs.prepare(inputs)
        found: dict[str, list[Verdict]] = {kind: [] for kind in wanted if wanted[kind]}
        for kind, verdicts in found.items():
            for verdict in _trials(kind, inputs, wanted[kind], asked):
                verdicts.append(verdict)
                _write(asked.json, found)
    for kind, verdicts in found.items():
        print(summary(kind, verdicts), flush=True)
    return 1 if any(is_bad(v) for verdicts in found.values() for v in verdicts) else 0


def make_inputs(inputs: Path) -> None:
    """Write the tiny model and the rows; in a child, since it computes."""
    model = inputs / "model"
    model.mkdir()
    make_tiny_model(model)
    write_chats(inputs / "rows.jsonl", plain.ROWS)
    write_chats(inputs / "more.jsonl", ray_runs.ROWS)


def is_bad(verdict: Verdict) -> bool:
    """Tell whether anything of a run differs from the undisturbed one."""
    return bool(verdict.mismatches or verdict.repeated or verdict.missing)


def summary(kind: str, verdicts: list[Verdict]) -> str:
    """Lay out what came of the runs of one kind."""
    kills = [kill for verdict in verdicts for kill in verdict.kills]
    recoveries = [kill.recovery_s for kill in kills if kill.recovery_s is not None]
    lines = [
        f"{kind}: {len(kills)} kills in {len(verdicts)} runs",
        f"  runs that differ from the undisturbed one: {sum(map(is_bad, verdicts))}",
        f"  rows repeated {sum(v.repeated for v in verdicts)}, "
        f"missing {sum(v.missing for v in verdicts)}",
        f"  steps redone: most {max((kill.redone for kill in kills), default=0)}, saved every "
        f"1 to {max((kill.every for kill in kills), default=0)}; over the interval "
        f"{sum(kill.redone > kill.every for kill in kills)} times",
        f"  seconds from a kill to the first new step: median {percentile(recoveries, 0.5):.1f}, "
        f"p95 {percentile(recoveries, 0.95):.1f} (of {len(recoveries)}; the others hit a run that "
        "had no step left)",
        f"  victims: {_counts(kill.victim for kill in kills)}",
        f"  hit while: {_counts(kill.phase for kill in kills)}",
        f"  weights differ by {max((v.drift for v in verdicts), default=0.0):.1e} at most",
        f"  trained: {_counts(verdict.variant for verdict in verdicts)}",
    ]
    return "\n".join(lines)


def _counts(words: Iterator[str]) -> str:
    return ", ".join(f"{word} {count}" for word, count in Counter(words).most_common())


def _write(file: str | None, found: dict[str, list[Verdict]]) -> None:
    if file:
        content = {kind: [v.as_json() for v in verdicts] for kind, verdicts in found.items()}
        Path(file).write_text(json.dumps(content, indent=1))


def _trials(kind: str, inputs: Path, kills: int, asked: argparse.Namespace) -> Iterator[Verdict]:
    """Run trials side by side until so many processes were killed, or the time is over."""
    trial, seed, killed = TRIALS[kind], asked.seed, 0
    ends = time.monotonic() + 60 * asked.minutes
    running: set[Future[Verdict]] = set()
    jobs = asked.ray_jobs if kind == "ray" else asked.jobs
    with ProcessPoolExecutor(jobs, mp_context=get_context("fork")) as pool:
        while running or (killed < kills and time.monotonic() < ends):
            late = time.monotonic() > ends
            while not late and killed + len(running) < kills and len(running) < jobs:
                folder = inputs.parent / f"{kind}_{seed}"
                running.add(pool.submit(_timed, trial, inputs, folder, seed))
                seed += 1
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                verdict = future.result()
                killed += len(verdict.kills)
                print(_line(kind, verdict), flush=True)
                yield verdict


def _timed(trial: Trial, inputs: Path, folder: Path, seed: int) -> Verdict:
    begun = time.monotonic()
    try:
        verdict = trial(inputs, folder, seed)
    except (RuntimeError, AssertionError, OSError) as error:
        verdict = Verdict(seed, "unknown", [], [f"{type(error).__name__}: {error}"])
    verdict.seconds = time.monotonic() - begun
    return verdict


def _line(kind: str, verdict: Verdict) -> str:
    kills = "; ".join(
        f"{kill.victim} after {kill.after_s:.2f} s, {kill.phase}, step {kill.step} -> "
        f"{'end' if kill.resumed is None else kill.resumed}"
        for kill in verdict.kills
    )
    end = "DIFFERS: " + "; ".join(verdict.mismatches) if is_bad(verdict) else "equal"
    return f"{kind} FAULT_SEED={verdict.seed} {verdict.variant}: {kills or 'no kill'}: {end}"


def _in_a_child(work: Callable[[], None]) -> None:
    """Do something that computes: a process that has, may not fork any more."""
    pid = os.fork()
    if not pid:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("the inputs could not be made")


def _arguments(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.run", description=__doc__)
    seed = int(os.environ.get("FAULT_SEED", time.time_ns() % 2**31))
    cores = os.cpu_count() or 1
    parser.add_argument("--plain", type=int, default=300, help="kills without Ray")
    parser.add_argument("--ray", type=int, default=100, help="kills of runs through Ray Train")
    parser.add_argument("--worlds", type=int, default=0, help="kills with other ranks after each")
    parser.add_argument("--seed", type=int, default=seed, help="of the first run")
    parser.add_argument("--jobs", type=int, default=cores, help="plain runs at once")
    parser.add_argument(
        "--ray-jobs", type=int, default=max(1, cores // 3), help="Ray runs at once; 3 cores each"
    )
    parser.add_argument(
        "--minutes", type=float, default=600, help="of each kind; then no further run is started"
    )
    parser.add_argument("--json", help="file for all figures, written behind every run")
    parser.add_argument("--folder", help="where runs stand while this works")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
