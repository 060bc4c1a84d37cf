"""How many tokens per second does one chat get, captured and not?

Random weights of a real shape answer prompts through `model.generate.stream_ids`, as a chat and
the embedded server do. No id ends an answer.
Run: python -m benchmarks.one_stream [--model CARD] [--shrink N] [--layers N]
     [--method none|nf4|int8] [--prompt N] [--tokens N] [--plain-tokens N]
Prints a line of JSON for each part: tokens per second behind the first, seconds to the first, and
at the longest between two. `first` captures, `kept` uses what was captured.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from itertools import pairwise
from typing import Any

import torch

from benchmarks.chat_eval import now
from benchmarks.random_model import random_model
from raytune_ft.config import catalog
from raytune_ft.config.schema import ModelSection
from raytune_ft.model.decoding import Graphs
from raytune_ft.model.generate import stream_ids


def main() -> None:
    """Make the model, let it write, print."""
    args = arguments()
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("raytune_ft.model.decoding").setLevel(logging.DEBUG)  # why it is plain
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    section = ModelSection.model_validate(
        {"path": args.model, "quantization": args.method, "dtype": "bfloat16"}
    )
    model = random_model(shape_of(args), section, device).eval()
    name = torch.cuda.get_device_name() if on_gpu else "cpu"
    print(json.dumps({"device": name, "model": args.model, "method": args.method}), flush=True)
    kept = Graphs()
    parts = (
        ("plain", Graphs("plain"), args.plain_tokens),
        ("first", kept, args.tokens),
        ("kept", kept, args.tokens),
        ("kept", kept, args.tokens),
    )
    for what, graphs, tokens in parts:
        found = measured(model, device, graphs, args.prompt, tokens)
        print(json.dumps({"part": what, **found, "graphs": graphs.captured}), flush=True)


def measured(
    model: Any, device: torch.device, graphs: Graphs, n_prompt: int, tokens: int
) -> dict[str, float]:
    """Write one answer; return its speed."""
    prompt = torch.arange(5, 5 + n_prompt).tolist()
    times = [now(device)]
    for _ in stream_ids(model, prompt, stop_ids=(), max_new_tokens=tokens, graphs=graphs):
        times.append(time.perf_counter())
    gaps = [after - before for before, after in pairwise(times)]
    return {
        "tokens": len(gaps),
        "tokens_per_s": round((len(gaps) - 1) / (times[-1] - times[1]), 1),
        "median_ms": round(1e3 * sorted(gaps[1:])[len(gaps) // 2 - 1], 2),
        "first_s": round(gaps[0], 3),
        "longest_gap_s": round(max(gaps[1:]), 3),
    }


def shape_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the config.json of a card, smaller where that was asked for."""
    shape = dict(catalog.card(args.model).config)
    if args.layers is not None:
        shape["num_hidden_layers"] = args.layers
    for key in ("hidden_size", "intermediate_size", "vocab_size"):
        shape[key] //= args.shrink
    return shape


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="internlm_7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, default=1, help="divide the widths")
    parser.add_argument("--method", default="none", choices=["none", "nf4", "int8"])
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--plain-tokens", type=int, default=24)
    return parser.parse_args()


if __name__ == "__main__":
    main()
