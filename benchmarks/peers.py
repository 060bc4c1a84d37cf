"""The peers of the QLoRA benchmark, as people run them, from their public interfaces.

One variant in a process of its own, one line of JSON out. A variant is options joined by `+`:

    hf | trl | unsloth   a plain loop on transformers + peft + bitsandbytes; SFTTrainer; Unsloth
    liger                Liger kernels                      ds      DeepSpeed ZeRO-2 (hf)
    nogc                 no gradient checkpointing, else all layers (unsloth: its own way)
    b4                   micro-batch 4, accumulation to match
    nodrop               LoRA dropout 0, else the recipe's 0.1
    flex                 flex attention, else sdpa (trl)    nobias  a base without biases (unsloth)

Nothing of raytune_ft is imported: Unsloth needs a Python path with other versions. Run by
benchmarks.qlora_gpu, which says what --folder holds.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

R, ALPHA, DROPOUT, LR = 64, 16, 0.1, 2e-4
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 2**30
OFFLINE = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "WANDB_DISABLED": "true", "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_COMPILE_LOCATION": "/tmp/unsloth_compiled_cache",
}  # fmt: skip


def main() -> None:
    """Run one variant and print its line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("variant")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--packs", type=int, default=16)
    parser.add_argument("--warm", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--cap", type=float, default=25.0)
    args = parser.parse_args()
    os.environ.update(OFFLINE)
    args.options = set(args.variant.split("+"))
    args.micro = min(4, args.packs) if "b4" in args.options else 1
    args.passes = args.packs // args.micro
    ways = {"hf": plain_loop, "trl": sft_trainer, "unsloth": unsloth}
    run = next(way for name, way in ways.items() if name in args.options)
    print(json.dumps({"variant": args.variant, **run(args)}), flush=True)


def documents(args: Namespace) -> tuple[Any, Any, Any]:
    """Return ids and labels of all documents end to end, int32 (n,), and their sizes."""
    from safetensors.numpy import load_file

    found = load_file(args.folder / "documents.safetensors")
    return found["input_ids"], found["labels"], found["sizes"]


def full_rows(args: Namespace, device: Any) -> list[dict[str, Any]]:
    """Return micro-batches (micro, length) of full rows: documents end to end, cut at the length.

    No padding and no isolation, so attention needs no mask: the fastest that a peer can be fed.
    """
    import torch

    ids, labels, _ = documents(args)
    rows = len(ids) // args.length
    shape = (rows, args.length)
    tensors = {
        "input_ids": torch.from_numpy(ids[: rows * args.length].astype("int64")).view(shape),
        "labels": torch.from_numpy(labels[: rows * args.length].astype("int64")).view(shape),
    }
    return [
        {name: t[i : i + args.micro].to(device) for name, t in tensors.items()}
        for i in range(0, rows - args.micro + 1, args.micro)
    ]


def plain_loop(args: Namespace) -> dict[str, Any]:
    """Run transformers + peft + bitsandbytes, with Liger or DeepSpeed where asked."""
    import torch
    from transformers import AutoModelForCausalLM

    if "liger" in args.options:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        args.folder / "model4", dtype=torch.bfloat16, device_map={"": device},
        attn_implementation="sdpa",
    )  # fmt: skip
    load_s = time.perf_counter() - begun
    model.requires_grad_(False)
    model.config.use_cache = False
    if "nogc" not in args.options:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model = with_adapter(model, args)
    model.train()
    params = [p for p in model.parameters() if p.requires_grad]
    step = _deepspeed_step if "ds" in args.options else _torch_step
    return {"load_s": round(load_s, 1), "lora_dtype": str(params[0].dtype),
            **run_steps(args, step(model, params, args, device), device)}  # fmt: skip


def with_adapter(model: Any, args: Namespace) -> Any:
    """Attach the recipe's adapter by PEFT; under DeepSpeed in its bfloat16."""
    import torch
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(model, lora_config(args))
    if "ds" in args.options:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
    return model


def lora_config(args: Namespace) -> Any:
    """Return the recipe's adapter in PEFT's words."""
    from peft import LoraConfig

    dropout = 0.0 if "nodrop" in args.options else DROPOUT
    return LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=dropout, target_modules=LINEARS,
                      bias="none", task_type="CAUSAL_LM")  # fmt: skip


def paged_adamw(params: list[Any]) -> Any:
    """Return the recipe's optimizer."""
    import bitsandbytes as bnb

    return bnb.optim.PagedAdamW32bit(params, lr=LR, weight_decay=0)


Step = Callable[[list[dict[str, Any]]], Any]


def _torch_step(model: Any, params: list[Any], args: Namespace, device: Any) -> Step:
    import torch

    optimizer = paged_adamw(params)

    def step(batches: list[dict[str, Any]]) -> Any:
        total = torch.zeros((), device=device)
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(**batch).loss
            (loss / args.passes).backward()
            total += loss.detach() / args.passes
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return step


def _deepspeed_step(model: Any, params: list[Any], args: Namespace, device: Any) -> Step:
    import torch

    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"}.items():  # fmt: skip
        os.environ[key] = value
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, optimizer=paged_adamw(params), config={
        "train_micro_batch_size_per_gpu": args.micro, "gradient_accumulation_steps": args.passes,
        "gradient_clipping": 1.0, "bf16": {"enabled": True}, "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "overlap_comm": True},
    })  # fmt: skip

    def step(batches: list[dict[str, Any]]) -> Any:
        total = torch.zeros((), device=device)
        for batch in batches:
            loss = engine(**batch).loss
            engine.backward(loss)
            engine.step()
            total += loss.detach() / args.passes
        return total

    return step


def run_steps(args: Namespace, step: Step, device: Any) -> dict[str, Any]:
    """Take steps, the first ones untimed; all their tokens are real."""
    import torch

    batches = full_rows(args, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses, at = list[float](), list[float](), 0
    begun = time.perf_counter()
    for number in range(1, args.warm + args.steps + 1):
        some = [batches[(at + i) % len(batches)] for i in range(args.passes)]
        at += args.passes
        _wait(torch)
        started = time.perf_counter()
        losses.append(float(step(some)))
        _wait(torch)
        took = time.perf_counter() - started
        if number <= args.warm:
            begun = time.perf_counter()
            continue
        seconds.append(took)
        if len(seconds) >= 2 and time.perf_counter() - begun > args.cap:
            break
    tokens = args.packs * args.length
    return {"tokens": tokens, "tok_s": round(tokens / median(seconds)), **_memory(torch),
            "step_s": [round(s, 4) for s in seconds],
            "losses": [round(x, 4) for x in losses]}  # fmt: skip


def _wait(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _memory(torch: Any) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "allocated_gb": round(torch.cuda.max_memory_allocated() / GIB, 2),
        "reserved_gb": round(torch.cuda.max_memory_reserved() / GIB, 2),
        "device_gb": round((total - free) / GIB, 2),
    }


def sft_trainer(args: Namespace) -> dict[str, Any]:
    """Run TRL's SFTTrainer on the documents, packed by itself (bfd), samples isolated."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    folder = args.folder / "model4"
    on_gpu = torch.cuda.is_available()
    begun = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": 0 if on_gpu else "cpu"},
        attn_implementation="flex_attention" if "flex" in args.options else "sdpa",
    )  # fmt: skip
    load_s = time.perf_counter() - begun
    marks: list[tuple[float, int]] = []
    seen = [0]

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            _wait(torch)
            marks.append((time.perf_counter(), seen[0]))

    trainer = trl.SFTTrainer(
        model=model, processing_class=AutoTokenizer.from_pretrained(folder),
        train_dataset=Dataset.from_dict(_rows_for_trl(args)), peft_config=lora_config(args),
        args=_sft_config(args, trl, on_gpu), callbacks=[Clock()],
    )  # fmt: skip
    collate = trainer.data_collator

    def counted(features: list[dict[str, Any]]) -> Any:
        batch = collate(features)
        mask = batch.get("attention_mask")
        seen[0] += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        return batch

    trainer.data_collator = counted
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    result = trainer.train()
    (first, before), (last, behind) = marks[args.warm - 1], marks[-1]
    seconds = [
        b[0] - a[0] for a, b in zip(marks[args.warm - 1 :], marks[args.warm :], strict=False)
    ]
    # batches are fetched a step ahead, so tokens count in the mean of all timed steps
    return {"tokens": (behind - before) // len(seconds),
            "tok_s": round((behind - before) / (last - first)), **_memory(torch),
            "step_s": [round(s, 4) for s in seconds], "load_s": round(load_s, 1),
            "losses": [round(result.training_loss, 4)], "trl": trl.__version__,
            "attention": trainer.model.config._attn_implementation}  # fmt: skip


def _rows_for_trl(args: Namespace) -> dict[str, Any]:
    """Return tokenised rows, as SFTTrainer takes them."""
    ids, labels, sizes = documents(args)
    found: dict[str, Any] = {"input_ids": [], "labels": []}
    at = 0
    for size in sizes.tolist() * 2:
        at %= len(ids)
        found["input_ids"].append(ids[at : at + size].tolist())
        found["labels"].append(labels[at : at + size].tolist())
        at += size
    return found


def _sft_config(args: Namespace, trl: Any, on_gpu: bool) -> Any:
    return trl.SFTConfig(
        output_dir="/tmp/trl_out", max_length=args.length, packing=True, packing_strategy="bfd",
        per_device_train_batch_size=args.micro, gradient_accumulation_steps=args.passes,
        gradient_checkpointing="nogc" not in args.options,
        gradient_checkpointing_kwargs={"use_reentrant": False}, bf16=True, use_cpu=not on_gpu,
        optim="paged_adamw_32bit", learning_rate=LR, max_grad_norm=1.0,
        max_steps=args.warm + args.steps, save_strategy="no", logging_steps=1, report_to="none",
        use_liger_kernel="liger" in args.options, dataloader_num_workers=0, seed=0,
        disable_tqdm=True,
    )  # fmt: skip


def unsloth(args: Namespace) -> dict[str, Any]:
    """Run Unsloth by its documented calls, from the same 4-bit weights."""
    import unsloth as library  # isort: skip  before transformers, trl and peft
    import torch
    from unsloth import FastLanguageModel

    again = False if "nogc" in args.options else True if "gc" in args.options else "unsloth"
    folder = args.folder / ("model4-nobias" if "nobias" in args.options else "model4")
    begun = time.perf_counter()
    model, _ = FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=args.length, dtype=torch.bfloat16, load_in_4bit=True,
        use_gradient_checkpointing=again, local_files_only=True,
    )  # fmt: skip
    load_s = time.perf_counter() - begun
    model = FastLanguageModel.get_peft_model(
        model, r=R, lora_alpha=ALPHA, target_modules=LINEARS, bias="none", random_state=0,
        lora_dropout=0.0 if "nodrop" in args.options else DROPOUT,
        use_gradient_checkpointing=again, max_seq_length=args.length,
    )  # fmt: skip
    model.train()
    FastLanguageModel.for_training(model)
    params = [p for p in model.parameters() if p.requires_grad]
    device = torch.device("cuda", 0)
    found = run_steps(args, _torch_step(model, params, args, device), device)
    return {**found, "load_s": round(load_s, 1), "unsloth": library.__version__,
            "lora_dtype": str(params[0].dtype)}  # fmt: skip


if __name__ == "__main__":
    main()
