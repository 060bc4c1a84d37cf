"""Our side of the QLoRA benchmark: one variant in a process of its own, one line of JSON out.

ours        the recipe as shipped, automatic settings: engine, step and dropout of a training run
mb1         the same, one pack per pass and no layer recomputed: passes replayed from CUDA graphs
mb1+nograph without graphs; profile+mb1: where the time of a replayed pass goes
plain       the recipe's own numbers without the fast path
bare        plain torch, nothing around passes and optimizer, laid out as `ours`
ray         automatic settings, the whole training loop in a Ray Train worker
profile     where the device's time goes in a micro-step of `ours`, part by part
ours+fp8    `ours` with frozen weights multiplied in float8; mb1+fp8, profile+fp8 likewise. It is
            not the same mathematics: benchmarks.fp8_gap tells what it costs
ours+8gb    `ours` as a card of 8 GiB plans it, torch's allocator capped at what that leaves
ours+6gb    without DeepSpeed for 6.25 GiB: the least layout
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import qlora_rows

CHANGES: dict[str, dict[str, Any]] = {
    "ours": {},
    "mb1": {"train.layout": "recipe", "model.gradient_checkpointing": False},
    "plain": {"train.layout": "recipe", "model.fast_path": False},
    "bare": {"train.deepspeed": "none"},
    "ray": {},
    "profile": {},
}
CHANGES |= {
    f"{name}+fp8": {**CHANGES[name], "model.compute": "fp8"} for name in ("ours", "mb1", "profile")
}
CHANGES |= {"mb1+nograph": CHANGES["mb1"], "profile+mb1": CHANGES["mb1"]}
CHANGES |= {"ours+8gb": {}, "ours+6gb": {"train.deepspeed": "none"}}
LAID_OUT_AS = {"bare": "ours"}
"""Variant -> whose automatic layout it takes: by itself it may choose another that is as fast."""
CARDS = {"ours+8gb": 8.0, "ours+6gb": 6.25}
"""GiB of the cards that variants are planned for, and capped at."""
GAUGES = {"allocated_gb": "memory_gib", "reserved_gb": "memory_reserved_gib",
          "device_gb": "memory_device_gib"}  # fmt: skip
"""Names here -> what a run's ledger calls them; a CPU's has none."""
LR = 2e-4
GIB = 2**30
PARTS = {
    "attention": ("flash", "fmha", "attention", "cudnn_generated", "sdpa"),
    "round to float8": ("quantize_rows", "_eighth"),
    "unpack NF4": ("dequant", "nf4", "kgemm_4bit", "unpack"),
    "dropout times A and back": ("_project",),
    "products added to adapters'": ("_badd_",),
    "other matrix products": ("gemm", "nvjet", "cutlass", "sm90_xmma", "cublas", "matmul"),
    "loss": ("cross_entropy",),
    "norms, rotary, SwiGLU": ("_forward_kernel", "_backward_kernel", "_rope_kernel"),
    "optimizer": ("optimizer", "adam", "multi_tensor"),
    "copies": ("memcpy", "memset", "copy"),
}
"""Part of a step -> what the names of its kernels hold; the first that fits.

Hopper's library products that add to what is there have `_badd_`: those with frozen weights, but
where adapters have none. Head and adapters' small products are among the others.
"""


class Ours:
    """An engine as a worker builds it, on this process's device, and its steps' data."""

    def __init__(self, args: Namespace, changes: dict[str, Any], share: float = 1.0) -> None:
        import torch

        from raytune_ft.training import layouts, micro_graph
        from raytune_ft.training.build import build_engine
        from raytune_ft.training.guarding.room import Room
        from raytune_ft.training.run_folder import RunFolder

        self.torch, self.args, self.said = torch, args, list[str]()
        self.device = device_of(torch)
        self.asked = qlora_rows.recipe_of(args, changes)
        self.put_weights()
        shape, run = args.folder / "shape", RunFolder(tempfile.mkdtemp(prefix="run_"))
        like = LAID_OUT_AS.get(args.one or "")
        planned = qlora_rows.recipe_of(args, CHANGES[like]) if like else self.asked
        self.choice = layouts.settled(
            planned, run, shape, self.device, self.said.append, share=share
        )
        self.room = Room.of(self.asked, run.path, self.said.append, self.choice)
        self.recipe = self.room.fitting()
        begun = time.perf_counter()
        self.engine, self.model = build_engine(
            self.recipe, shape, self.device, resident=self.room.is_resident,
            hosted=self.room.hosted, tell=self.said.append,
        )  # fmt: skip
        self.load_s = time.perf_counter() - begun
        if "nograph" not in (args.one or ""):
            micro_graph.attach(self.engine, self.room, self.said.append)
        self.losses: list[float] = []
        self.tokens = 0

    def put_weights(self) -> None:
        """Let what loads the model make it."""
        put_random_weights(self.args, self.asked, self.device)

    def data(self) -> Iterator[Any]:
        """Yield every optimizer step's data, for ever."""
        from raytune_ft.data.packing import Position
        from raytune_ft.training.batching import steps

        stream = qlora_rows.packs_of(self.recipe)(Position())
        return steps(stream, self.room, rank=0, workers=1)

    def full_steps(self) -> Iterator[Any]:
        """Yield those that have all their packs; the last of an epoch may have fewer."""
        return (data for data in self.data() if data.n_packs == self.args.packs)

    def step(self, data: Any, number: int) -> None:
        """Take a step as a training run does."""
        from raytune_ft.training.saving.checkpoint import TrainState
        from raytune_ft.training.step import take_step

        taken = take_step(
            self.engine, data, LR, TrainState(step=number), self.recipe, 0.0, lambda: 0.0
        )
        self.losses.append(taken.loss)
        self.tokens = data.n_tokens

    def bare_step(self, data: Any, number: int) -> None:
        """Take a step with nothing around it."""
        self.torch.manual_seed(number)
        self.engine.module.train()
        total = self.torch.zeros((), device=self.device)
        for batch in data.micro_batches:
            total += self.engine.forward_backward(batch, data.n_targets)
        self.engine.step(LR)
        self.losses.append(float(total) / data.n_targets)
        self.tokens = data.n_tokens

    def line(self) -> dict[str, Any]:
        """Describe what ran."""
        from raytune_ft.model import fast

        train = self.recipe.train
        return {
            "micro_batch": train.micro_batch_size,
            "passes": train.accumulation,
            "recompute": self.recipe.model.gradient_checkpointing,
            "engine": type(self.engine).__name__,
            "fast_path": fast.report_of(self.engine.module).lines(),
            "graphs": getattr(self.engine.micro, "captured", 0),
            "said": self.said,
            "load_s": round(self.load_s, 1),
        }


def device_of(torch: Any) -> Any:
    """Return the GPU, or the CPU in a rehearsal."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def put_random_weights(args: Namespace, recipe: Any, device: Any) -> None:
    """Let what loads the model make it instead; benchmarks.start is about 14 GB from a disk."""
    import torch

    from benchmarks.random_model import random_model
    from raytune_ft.model import loading

    shape = json.loads((args.folder / "shape" / "config.json").read_text())

    def made(*_: Any, **__: Any) -> Any:
        torch.manual_seed(0)
        model = random_model(shape, recipe.model, device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        return model

    loading.load_model = made


def timed(
    args: Namespace, step: Callable[[Any, int], None], data: Iterator[Any], torch: Any
) -> dict[str, Any]:
    """Take steps, the first ones untimed; return seconds of each, and where memory went.

    Ends after `args.steps`, or, behind two, when `args.cap` seconds are over.
    """
    seconds, number, on_gpu = list[float](), 0, torch.cuda.is_available()
    begun = time.perf_counter()
    for batch in data:
        number += 1
        wait(torch)
        started = time.perf_counter()
        step(batch, number)
        wait(torch)
        took = time.perf_counter() - started
        if number <= args.warm:
            begun = time.perf_counter()
            continue
        seconds.append(took)
        over = time.perf_counter() - begun > args.cap
        if len(seconds) >= args.steps or (over and len(seconds) >= 2):
            break
    return {"step_s": [round(s, 4) for s in seconds], **(memory(torch) if on_gpu else {})}


def wait(torch: Any) -> None:
    """Wait until the device has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def share_of(variant: str) -> float:
    """Return the part of the device that a variant plans for."""
    import torch

    if variant not in CARDS or not torch.cuda.is_available():
        return 1.0
    return CARDS[variant] * GIB / torch.cuda.get_device_properties(0).total_memory


def cap(variant: str) -> None:
    """Let torch's allocator refuse what a variant's card has not, beside what CUDA holds there.

    Behind the making of random weights, which takes a whole bfloat16 model for a moment.
    """
    import torch

    if variant not in CARDS or not torch.cuda.is_available():
        return
    from raytune_ft.config.estimates.peak import GPU_CONTEXT

    gc.collect()
    torch.cuda.empty_cache()
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(share_of(variant) - GPU_CONTEXT / whole)
    torch.cuda.reset_peak_memory_stats()


def memory(torch: Any) -> dict[str, Any]:
    """Return GB by torch's allocator and by the device."""
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_gb": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "device_gb": round((total - free) / GIB, 2),
    }


def measure(args: Namespace) -> dict[str, Any]:
    """Run one variant; return its line."""
    if args.one == "ray":
        return measured_through_ray(args)
    ours = Ours(args, CHANGES[args.one], share=share_of(args.one))
    cap(args.one)
    if args.one.startswith("profile"):
        return {**ours.line(), **profile(ours)}
    step = ours.bare_step if args.one == "bare" else ours.step
    found = timed(args, step, ours.full_steps(), ours.torch)
    speed = {"tokens": ours.tokens, "tok_s": round(ours.tokens / median(found["step_s"]))}
    return {**speed, **found, "losses": [round(x, 4) for x in ours.losses], **ours.line()}


def profile(ours: Ours) -> dict[str, Any]:
    """Return milliseconds per 2048 tokens of each part of the passes, by the device's kernels."""
    torch = ours.torch
    data = ours.full_steps()
    for number in range(1, 3):
        ours.step(next(data), number)
    wait(torch)
    step = next(data)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        kinds = [torch.profiler.ProfilerActivity.CUDA]
    started = time.perf_counter()
    with torch.profiler.profile(activities=kinds) as seen:
        ours.step(step, 3)
        wait(torch)
    wall = time.perf_counter() - started
    per, parts, kernels = step.n_tokens / 2048, dict[str, float](), dict[str, float]()
    for key, micros in spent(seen, torch):
        name = key.lower()
        part = next((p for p, signs in PARTS.items() if any(s in name for s in signs)), "the rest")
        parts[part] = parts.get(part, 0.0) + micros / 1e3 / per
        kernels[key[:80]] = kernels.get(key[:80], 0.0) + micros / 1e3 / per
    largest = sorted(kernels.items(), key=lambda item: -item[1])[:25]
    return {
        "ms_per_2048": {name: round(value, 2) for name, value in sorted(parts.items())},
        "device_ms": round(sum(parts.values()), 1),
        "wall_ms": round(wall * 1e3 / per, 1),
        "largest": [[name, round(value, 3)] for name, value in largest],
    }


def spent(seen: Any, torch: Any) -> Iterator[tuple[str, float]]:
    """Yield (name, microseconds) of the device's kernels, of the host's operations without one.

    A profile of a GPU has the host's launches and waits as well, which are no work of the device.
    """
    host = torch.autograd.DeviceType.CPU
    for event in seen.key_averages():
        if not torch.cuda.is_available():
            yield event.key, event.self_cpu_time_total
        elif event.device_type != host:
            yield event.key, event.self_device_time_total


def measured_through_ray(args: Namespace) -> dict[str, Any]:
    """Run the training loop in a Ray Train worker; return what its own ledger says."""
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from raytune_ft.cluster import ray_session

    storage = Path(tempfile.mkdtemp(prefix="ray_"))
    with ray_session():
        on_gpu = ray.cluster_resources().get("GPU", 0) >= 1
        trainer = TorchTrainer(
            _in_ray,
            train_loop_config={"args": vars(args), "storage": str(storage)},
            scaling_config=ScalingConfig(
                num_workers=1, use_gpu=on_gpu, resources_per_worker={"CPU": 0.5, "GPU": int(on_gpu)}
            ),
            run_config=RunConfig(name="bench", storage_path=str(storage / "ray")),
        )
        trainer.fit()
    lines = [json.loads(line) for line in (storage / "metrics.jsonl").read_text().splitlines()]
    full = [line for line in lines[args.warm :] if line["seconds"]]
    seconds = [line["seconds"] for line in full]
    return {
        "tokens": full[-1]["tokens"],
        "tok_s": round(median(line["tokens"] / line["seconds"] for line in full)),
        "step_s": [round(s, 4) for s in seconds],
        **{name: round(full[-1][key], 2) for name, key in GAUGES.items() if full[-1][key]},
        "data_wait": round(max(line["data_wait"] for line in full), 5),
        "losses": [round(line["loss"], 4) for line in lines],
        **_layout_of(args, json.loads((storage / "run.json").read_text())),
    }


def _layout_of(args: Namespace, info: dict[str, Any]) -> dict[str, Any]:
    """Return how a run's steps were laid out: by its choice, or by the recipe on a CPU."""
    found = (info.get("layout") or {}).get("layout")
    if found is None:
        train = qlora_rows.recipe_of(args, CHANGES["ray"]).train
        return {"micro_batch": train.micro_batch_size, "passes": train.accumulation}
    return {"micro_batch": found["micro_batch_size"], "passes": found["accumulation"],
            "recompute": found["recomputed"], "layout": found}  # fmt: skip


def _in_ray(config: dict[str, Any]) -> None:
    """Train as `fitting.train_loop_per_worker` does, on random weights and rows made here."""
    import ray
    import torch

    from raytune_ft.training import worker
    from raytune_ft.training.run_folder import write_json

    args = Namespace(**config["args"])
    recipe = qlora_rows.recipe_of(
        args, {**CHANGES["ray"], "train.max_steps": args.warm + args.steps}
    )
    put_random_weights(args, recipe, device_of(torch))
    storage = Path(config["storage"])
    write_json(storage / "run.json", {"name": "bench", "status": "running"})
    job = worker.Job(
        recipe=recipe.model_dump(mode="json"),
        run_path=str(storage),
        model_folder=str(args.folder / "shape"),
        expected_steps=args.warm + args.steps,
    )
    worker.run(job, qlora_rows.packs_of(recipe), None, lambda _event: None)
    ray.train.report({"done": True})
