"""Merging a 7B: seconds and peak memory on the CPU, and that the result is the formula's.

Question: does `merge` stay under 4 GB of memory at InternLM-7B's shape, with LoRA or DoRA on all
linear layers? Makes a base with random weights (13.5 to 14.6 GB), an adapter of rank 64, merges it
in a process of its own, computes some rows of every layer again in float64, and removes all three.
Run: python -m benchmarks.merge [--shape 7b|1b|135m] [--dora] [--base original|dequantized]
     [--layers N] [--folder DIR]
Prints one JSON line; the disk needs twice the base's size.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import made_model

RANK = 64
CHECKED = 8
"""Rows of each checked tensor that are computed again."""
NO_LINEAR = ("embed_tokens", "lm_head", "norm")

WORK = """
import re, sys, time
from pathlib import Path
from raytune_ft.config.schema import ModelSection
from raytune_ft.model.merge import merge_to
base, adapter, out, kind, quantization = sys.argv[1:]
begun = time.perf_counter()
section = ModelSection(path=base, quantization=quantization)
report = merge_to(Path(base), Path(adapter), Path(out), "2GB", kind, section)
seconds = time.perf_counter() - begun
# not getrusage's, which begins with what the process that started this one had
status = Path("/proc/self/status").read_text()
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
print(report.n_shards, report.n_merged, report.size_bytes, report.in_memory, seconds, peak)
"""


def main() -> None:
    """Make, merge, check, remove; print one line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=made_model.SHAPES, default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--base", choices=("original", "dequantized"), default="original")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="merge_", dir=args.folder) as scratch:
        place = Path(scratch)
        shape = made_model.shape_of(args.shape, args.layers)
        size = made_model.write(place / "base", shape)
        free = shutil.disk_usage(place).free
        if free < size + (2 << 30):
            sys.exit(f"{place}: {free >> 30} GiB free, {size >> 30} GiB are needed; use --folder")
        write_adapter(place / "base", place / "adapter", dora=args.dora)
        found = merge(place, args.base)
        found["wrong_rows"] = check(place, dora=args.dora) if args.base == "original" else None
        about = {"shape": args.shape, "layers": shape["num_hidden_layers"], "dora": args.dora}
        print(json.dumps({**about, "base": args.base, **found, "machine": platform.machine()}))


def write_adapter(base: Path, folder: Path, *, dora: bool) -> None:
    """Write a random adapter of rank 64 on all linear layers, as PEFT does."""
    import torch
    from safetensors.torch import save_file

    from raytune_ft.model.original import Original

    folder.mkdir()
    generator, tensors = torch.Generator().manual_seed(3), {}
    targets = set()
    for name, shape in Original.of(base).shapes().items():
        if len(shape) != 2 or any(word in name for word in NO_LINEAR):
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        targets.add(stem.rpartition(".")[2])
        tensors[f"{stem}.lora_A.weight"] = torch.randn(RANK, shape[1], generator=generator) * 0.02
        tensors[f"{stem}.lora_B.weight"] = torch.randn(shape[0], RANK, generator=generator) * 0.02
        if dora:
            tensors[f"{stem}.lora_magnitude_vector"] = torch.rand(shape[0], generator=generator) + 1
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 16,
        "target_modules": sorted(targets), "use_dora": dora, "base_model_name_or_path": "base",
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def merge(place: Path, base: str) -> dict[str, Any]:
    """Merge in a process of its own; its peak is what the system says of it."""
    quantization = "nf4" if base == "dequantized" else "none"
    words = [str(place / name) for name in ("base", "adapter", "out")] + [base, quantization]
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", WORK, *words], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        sys.exit(done.stderr)
    shards, merged, size, in_memory, seconds, peak = done.stdout.split()
    return {
        "seconds": round(float(seconds), 1),
        "process_seconds": round(time.perf_counter() - begun, 1),
        "peak_rss_gb": round(int(peak) / 1e9, 2),
        "written_gb": round(int(size) / 1e9, 2),
        "shards": int(shards),
        "merged": int(merged),
        "in_memory": in_memory == "True",
    }


def places(folder: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    from safetensors import safe_open

    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as content:
            found |= dict.fromkeys(content.keys(), file.name)
    return found


def check(place: Path, *, dora: bool) -> int:
    """Compute the first rows of each layer again, in float64; return how many are not those."""
    from safetensors import safe_open

    wrong = 0
    index, before = places(place / "out"), places(place / "base")
    with safe_open(place / "adapter/adapter_model.safetensors", "pt") as adapter:
        for key in adapter.keys():  # noqa: SIM118  not a mapping
            if not key.endswith("lora_A.weight"):
                continue
            stem = key.removesuffix(".lora_A.weight")
            name = f"{stem.removeprefix('base_model.model.')}.weight"
            rows = slice(0, CHECKED)
            old, new = (
                safe_open(place / kind / files[name], "pt").get_slice(name)[rows]
                for kind, files in (("base", before), ("out", index))
            )
            left = adapter.get_slice(f"{stem}.lora_B.weight")[rows].double()
            expected = old.double() + 16 / RANK * left @ adapter.get_tensor(key).double()
            if dora:
                lengths = adapter.get_slice(f"{stem}.lora_magnitude_vector")[rows].double()
                expected *= (lengths / expected.norm(dim=1))[:, None]
            wrong += int((new != expected.to(new.dtype)).any(1).sum())
    return wrong


if __name__ == "__main__":
    main()
