"""How fast does the endpoint answer under load, beside its own engine and `transformers serve`?

Open-loop load at 1, 8, 32 and 128 requests under way on average: the rate of arrivals is that
number over the time that the engine, driven directly and with as many at once, takes for an
answer (Little's law), and the same for every side. So a slower side has more under way.
Run: python -m benchmarks.serve [--model NAME|FOLDER | --made 7b] [--at 1 8 32 128] [--tiny]
     [--vllm-site DIR]: the sides with vLLM run where it is installed or its packages are named
Prints a line of JSON per side and level, then a table with ratios. `prefill` is one pass over a
prompt of the same length in an idle process. `... at once` and, with --generate-batch,
transformers' own engine get all requests of a level at once: what a side can do at most.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.made_model import SHAPES, shape_of
from benchmarks.serve_load import Load, load_of, run, summary
from benchmarks.serve_sides import SIDES, default_sides, warmed

Row = dict[str, Any]


def main() -> None:
    """Run all sides over all levels, in order and back where asked to, and print."""
    args = arguments()
    if args.threads:  # where others compute too, threads that wait for each other take all time
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
        import torch

        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        model = args.model
        if args.tiny:
            model = made(folder / "tiny", shape_of("135m", layers=2, shrink=8))
        elif args.made:
            model = made(folder / args.made, shape_of(args.made, args.layers))
        told(machine(model, args))
        rates, rows = pilot(model, args, folder)
        order = list(args.sides)
        for passed in range(args.passes):
            for side in order if passed % 2 == 0 else reversed(order):
                rows += measured(side, model, rates, args, folder)
        if args.generate_batch:
            rows += batch_of(model, args)
    print(table(rows, args))


def made(folder: Path, shape: Row) -> str:
    """Write a model with random weights, each of whose words has a text."""
    from benchmarks.made_model import write

    write(folder, shape)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    # no merge leads to them, so that prompts stay what they are
    words |= {f"\u0120w{n}": n for n in range(len(words), shape["vocab_size"])}
    file.write_text(json.dumps(tokenizer), encoding="utf-8")
    return str(folder)


def machine(model: str, args: argparse.Namespace) -> Row:
    """Say where this runs."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    load = os.getloadavg()[0]
    return {
        "device": device, "cores": os.cpu_count(), "torch": torch.__version__, "model": model,
        "words": args.words, "tokens": args.tokens, "load_before": round(load, 1),
    }  # fmt: skip


def pilot(model: str, args: argparse.Namespace, folder: Path) -> tuple[dict[int, float], list[Row]]:
    """Return the rate of arrivals for each level, and rows of what was measured for it."""
    rates: dict[int, float] = {}
    rows: list[Row] = [{"side": "prefill", "at": 0, "ttft_p50_ms": prefill_ms(model, args)}]
    told(rows[0])
    with SIDES["engine"](model, folder) as side:
        asyncio.run(warmed(side.ask))
        for level in args.at:
            for seed in (1000, 2000):  # on a GPU the first one captures
                load = load_of(level, 1e9, args.words, args.tokens, seed=level + seed)
                began = time.perf_counter()
                seen = asyncio.run(run(side.ask, load))
                rates[level] = level / (time.perf_counter() - began)
            rows.append({"side": "pilot", "at": level, **summary(seen)})
            told(rows[-1])
    return rates, rows


def prefill_ms(model: str, args: argparse.Namespace) -> float:
    """Return the median milliseconds of one pass over one prompt."""
    import torch

    from raytune_ft.chat.model import open_chat
    from raytune_ft.model import lanes

    chat = open_chat(model)
    times = []
    with torch.no_grad():
        for message in load_of(7, 1.0, args.words, 1, seed=5).messages:
            ids = chat.encode([{"role": "user", "content": message}])
            began = time.perf_counter()
            lanes.prefill(chat.model, lanes.growing(), ids, 0).argmax().item()
            times.append(time.perf_counter() - began)
    return round(1e3 * sorted(times[1:])[len(times[1:]) // 2], 1)


def measured(
    name: str,
    model: str,
    rates: dict[int, float],
    args: argparse.Namespace,
    folder: Path,
) -> list[Row]:
    """Put the load of every level on one side."""
    rows: list[Row] = []
    try:
        with SIDES[name](model, folder) as side:
            asyncio.run(warmed(side.ask))
            for level in args.at:
                seen = asyncio.run(run(side.ask, load_for(level, rates, args)))
                row: Row = {"side": name, "at": level, "rate": round(rates[level], 3)}
                row |= summary(seen)
                errors = sorted({one.error for one in seen if one.error})
                rows.append(row | ({"errors": errors[:3]} if errors else {}))
                told(rows[-1])
                # where all sides keep up with arrivals they are equally fast: what each can do
                load = load_of(level, 1e9, args.words, args.tokens, seed=level + 3000)
                at_once = summary(asyncio.run(run(side.ask, load)))
                rows.append({"side": f"{name} at once", "at": level, **at_once})
                told(rows[-1])
    except (RuntimeError, ImportError, OSError) as error:
        told({"side": name, "did_not_run": str(error)[:600]})
    return rows


def load_for(level: int, rates: dict[int, float], args: argparse.Namespace) -> Load:
    """Return the requests of one level: several times as many as are to be under way."""
    requests = max(args.least, round(args.times * level))
    return load_of(requests, rates[level], args.words, args.tokens, seed=level)


def batch_of(model: str, args: argparse.Namespace) -> list[Row]:
    """Time transformers' `generate_batch` over as many prompts as each level has under way."""
    import torch
    from transformers import GenerationConfig

    from raytune_ft.chat.model import open_chat

    chat = open_chat(model)
    how = GenerationConfig(max_new_tokens=args.tokens, do_sample=False, eos_token_id=-1)
    rows: list[Row] = []
    for level in args.at:
        load = load_of(level, 1.0, args.words, args.tokens, seed=level)
        prompts = [chat.encode([{"role": "user", "content": text}]) for text in load.messages]
        try:
            chat.model.generate_batch(prompts[:1], how)
            began = time.perf_counter()
            found = chat.model.generate_batch(prompts, how)
        except (RuntimeError, ValueError, torch.OutOfMemoryError) as error:
            told({"side": "generate_batch", "at": level, "did_not_run": str(error)[:300]})
            continue
        tokens = sum(len(one.generated_tokens) for one in found.values())
        speed = round(tokens / (time.perf_counter() - began), 1)
        rows.append({"side": "generate_batch", "at": level, "tokens_per_s": speed})
        told(rows[-1])
    return rows


def told(row: Row) -> None:
    """Print a line of JSON."""
    print(json.dumps(row), flush=True)


def table(rows: list[Row], args: argparse.Namespace) -> str:
    """Return a table in Markdown, and the ratios that the goals are about."""
    lines = [
        "| under way | side | tok/s | TTFT p50 / p99 ms | per token p50 / p99 ms | failed |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for level in args.at:
        for row in rows:
            if row["at"] == level:
                lines.append(
                    f"| {level} | {row['side']} | {row.get('tokens_per_s', '-')} "
                    f"| {row.get('ttft_p50_ms', '-')} / {row.get('ttft_p99_ms', '-')} "
                    f"| {row.get('between_p50_ms', '-')} / {row.get('between_p99_ms', '-')} "
                    f"| {row.get('failed', '-')} |"
                )
    prefill = next((r["ttft_p50_ms"] for r in rows if r["side"] == "prefill"), 0.0)
    lines += ["", f"prefill of one prompt alone: {prefill} ms", ""]
    for level in args.at:
        ours = best(rows, "endpoint at once", level)
        for other in ("engine", "transformers", "endpoint+vllm", "vllm"):
            theirs = best(rows, f"{other} at once", level)
            if ours and theirs:
                lines.append(f"at {level}, at once: endpoint / {other} = {ours / theirs:.2f}")
        at_once, batch = best(rows, "engine at once", level), best(rows, "generate_batch", level)
        if at_once and batch:
            lines.append(f"at {level}: engine at once / generate_batch = {at_once / batch:.2f}")
        first = [r for r in rows if r["side"] == "endpoint" and r["at"] == level]
        if first and prefill and first[0].get("ttft_p50_ms"):
            lines.append(f"at {level}: TTFT / prefill = {first[0]['ttft_p50_ms'] / prefill:.2f}")
    return "\n".join(lines)


def best(rows: list[Row], side: str, level: int) -> float:
    """Return a side's median speed over its passes, 0 if it has none."""
    found = sorted(
        row["tokens_per_s"]
        for row in rows
        if row["side"] == side and row["at"] == level and row.get("tokens_per_s")
    )
    return float(found[len(found) // 2]) if found else 0.0


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--made", choices=SHAPES, help="random weights of a shape instead")
    parser.add_argument("--layers", type=int, help="of that shape, fewer than it has")
    parser.add_argument("--at", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--sides", nargs="+", choices=list(SIDES))
    parser.add_argument("--vllm-site", type=Path, help="folder of vLLM's packages, for its sides")
    parser.add_argument("--words", type=int, default=48, help="of a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer at most")
    parser.add_argument("--times", type=float, default=3.0, help="requests per one under way")
    parser.add_argument("--least", type=int, default=4, help="requests of a level at least")
    parser.add_argument("--passes", type=int, default=1, help="every second one goes backwards")
    parser.add_argument("--threads", type=int, help="of torch, on every side")
    parser.add_argument("--generate-batch", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="a rehearsal on a made model")
    args = parser.parse_args()
    if args.vllm_site:
        os.environ["BENCH_VLLM_SITE"] = str(args.vllm_site.resolve())
    args.sides = args.sides or default_sides()
    return args


if __name__ == "__main__":
    main()
