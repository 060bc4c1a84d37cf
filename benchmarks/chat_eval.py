"""What does asking the sample prompts cost a run?

Random weights of a real shape take real optimizer steps of full packs, as `python -m
raytune_ft.train` does, with and without answers to two prompts in between, in the order A B B A.
No answer ends early: each has `--tokens` tokens, the longest that the recipe allows. So the share
is the largest that this model can come to. The plain way of decoding, one kernel launch after the
other, writes `--plain-tokens` for comparison.
Run: python -m benchmarks.chat_eval [--model CARD] [--shrink N] [--layers N] [--method nf4|none]
     [--length N] [--steps N] [--every N] [--tokens N] [--plain-tokens N] [--drawn]
Prints a line as each part is done, and last one line of JSON: seconds of a step and of asking,
tokens per second of both ways, memory before and behind, and the share of a run's time at
`--every` steps, the answers before and after a run of that many included.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.memory_plan import full_packs, recipe_of
from benchmarks.random_model import random_model
from raytune_ft.model import loading
from raytune_ft.model.answers import Drawing, answer_all
from raytune_ft.model.decoding import Graphs, Way
from raytune_ft.training.build import build_engine
from raytune_ft.training.callbacks import FIRST_TOKENS
from raytune_ft.training.evaluating.answering import Voice

PROMPT_TOKENS = (31, 57)
STARTED = time.perf_counter()


def main() -> None:
    """Build, train with and without answers, print."""
    args = arguments()
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("raytune_ft.model.decoding").setLevel(logging.DEBUG)  # why it is plain
    cell = f"{args.method},{args.length},1,{'on' if torch.cuda.is_available() else 'off'}"
    recipe, shape = recipe_of(cell, args)
    train = recipe.train.model_copy(update={"accumulation": args.accumulation})
    recipe = recipe.model_copy(update={"train": train})
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    loading.load_model = lambda *_, **__: random_model(shape, recipe.model, device)  # type: ignore
    engine, model = build_engine(recipe, Path(), device)
    # no id is a stop id: every answer is as long as it may be
    voice: Any = Voice(model, None, SimpleNamespace(stop_ids=frozenset()), engine)  # type: ignore
    bench = Bench(engine, voice, recipe, shape["vocab_size"], args)
    say("model made", device)
    first_step = bench.steps(1)
    say(f"first step {first_step[0]:.2f} s", device)
    speeds: dict[str, float] = {}
    for way, tokens in (("plain", args.plain_tokens), ("auto", args.tokens)):
        speeds[way], made = bench.speed(way, tokens)  # type: ignore[arg-type]
        of_all = f"{speeds[way]:.1f} tokens/s of all prompts, {tokens} each"
        say(f"decoding, {way}: {of_all}, {made} graphs", device)
    without, asked, walls = [], [], {"without": 0.0, "with": 0.0}
    memory = [bench.memory()]
    for asks in (False, True, True, False):
        began = now(device)
        without += bench.steps(args.steps)
        if asks:
            asked.append(timed(device, lambda: bench.ask(args.tokens)))
            memory.append(bench.memory())
            say(f"asked in {asked[-1]:.2f} s", device)
        say(f"step {without[-1]:.2f} s", device)
        walls["with" if asks else "without"] += now(device) - began
    first = timed(device, lambda: bench.ask(FIRST_TOKENS))
    found = figures(args, device, without, asked, first, walls, memory)
    print(json.dumps(found | bench.share_of(speeds, found)), flush=True)


def figures(
    args: argparse.Namespace,
    device: torch.device,
    steps: list[float],
    asked: list[float],
    first: float,
    walls: dict[str, float],
    memory: list[float],
) -> dict[str, Any]:
    """Put together what was measured, and the shares that follow from it."""
    step, ask = median(steps), median(asked)
    period = args.every * step
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "model": args.model, "method": args.method, "length": args.length,
        "prompts": len(PROMPT_TOKENS), "tokens": args.tokens, "drawn_too": args.drawn,
        "step_s": round(step, 4), "steps_measured": len(steps), "ask_s": round(ask, 3),
        "ms_per_token_of_all": round(1e3 * ask / args.tokens, 2),
        "wall_with_s": round(walls["with"], 2), "wall_without_s": round(walls["without"], 2),
        "every": args.every,
        "share_percent": round(100 * ask / (period + ask), 3),
        "share_with_before_and_after_percent": round(
            100 * (first + 2 * ask) / (2 * period + first + 2 * ask), 3
        ),
        "memory_gib": [round(value, 3) for value in memory],
    }  # fmt: skip


class Bench:
    """An engine that steps and is asked."""

    def __init__(
        self, engine: Any, voice: Voice, recipe: Any, vocabulary: int, args: argparse.Namespace
    ) -> None:
        self.engine, self.voice, self.args = engine, voice, args
        self.batch, self.n_targets = full_packs(recipe, vocabulary)
        generator = torch.Generator().manual_seed(1)
        self.prompts = [
            torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in PROMPT_TOKENS
        ]

    def steps(self, count: int) -> list[float]:
        """Take optimizer steps; return the seconds of each."""
        return [timed(self.engine.device, self._step) for _ in range(count)]

    def speed(self, way: Way, tokens: int) -> tuple[float, int]:
        """Return tokens of all prompts per second, decoded one way, and how many graphs it made."""
        graphs = Graphs(way)
        started = now(self.engine.device)
        found = answer_all(
            self.voice.model, self.prompts, stop_ids=(), max_new_tokens=tokens, graphs=graphs
        )
        spent = now(self.engine.device) - started
        graphs.close()
        return sum(len(answer.ids) for answer in found) / spent, graphs.captured

    def share_of(self, speeds: dict[str, float], found: dict[str, Any]) -> dict[str, Any]:
        """Return both ways' speeds, and the share that the plain one would have come to."""
        ask = found["ask_s"] * speeds["auto"] / speeds["plain"]
        period = self.args.every * found["step_s"]
        return {
            "tokens_per_s": round(speeds["auto"], 1),
            "tokens_per_s_plain": round(speeds["plain"], 1),
            "share_percent_plain": round(100 * ask / (period + ask), 3),
        }

    def ask(self, tokens: int) -> None:
        """Answer all prompts greedily and, if so asked, by drawing."""
        seeds: list[int | None] = [None] * len(self.prompts)
        prompts = self.prompts
        if self.args.drawn:
            seeds, prompts = [*seeds, *range(len(prompts))], prompts * 2
        found = self.voice.answer(prompts, tokens, Drawing(0.8, 0.95), seeds)
        if {len(answer.ids) for answer in found} != {tokens}:
            raise SystemExit("an answer ended early; the share would be too small")

    def memory(self) -> float:
        """Return what is allocated, in GiB; 0 on a CPU, where nobody counts it."""
        gc.collect()
        return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0

    def _step(self) -> None:
        self.engine.module.train()
        for _ in range(self.args.accumulation):
            self.engine.forward_backward(self.batch, self.n_targets * self.args.accumulation)
        self.engine.step(1e-4)


def say(what: str, device: torch.device) -> None:
    """Print what is done and when, so that a run cut off has shown something."""
    held = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    print(f"{time.perf_counter() - STARTED:7.1f} s  {what}  (peak {held:.1f} GiB)", flush=True)


def timed(device: torch.device, work: Any) -> float:
    """Return the seconds that work takes, the device's included."""
    started = now(device)
    work()
    return now(device) - started


def now(device: torch.device) -> float:
    """Return the time once the device has done its work, in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def arguments() -> argparse.Namespace:
    """Read the command line; defaults are the shipped recipes' own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="internlm_7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths")
    parser.add_argument("--method", default="nf4", choices=["nf4", "none"])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--accumulation", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3, help="in each of the four parts")
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--tokens", type=int, default=600)
    parser.add_argument("--plain-tokens", type=int, default=24)
    parser.add_argument("--drawn", action="store_true", help="each prompt a second time")
    return parser.parse_args()


if __name__ == "__main__":
    main()
