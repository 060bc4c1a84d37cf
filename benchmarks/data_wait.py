"""How long does training wait for data?

Makes chat rows and a random model of a real shape, trains it through Ray by the command that people
use, and prints one JSON line: the share of step time spent waiting, of all steps behind the first.
Run: python -m benchmarks.data_wait TOKENIZER_FOLDER [--shape 135m|1b|7b] [--rows N] [--steps N]
"""

import argparse
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.training.run_folder import RunFolder, read_jsonl

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32},
}  # fmt: skip
WORDS = ["river", "stone", "cloud", "night", "green", "song", "glass", "seven", "window", "pack"]


def main() -> None:
    """Run once and print the line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--micro-batch", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", args.tokenizer, args.shape)
        make_rows(folder / "rows.jsonl", args.rows)
        steps = train(folder, args)
    waited = sum(step["data_seconds"] for step in steps[1:])
    whole = sum(step["seconds"] for step in steps[1:])
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    print(json.dumps({
        "device": device,
        "shape": args.shape,
        "rows": args.rows,
        "steps": len(steps),
        "tokens_per_s": round(sum(step["tokens"] for step in steps[1:]) / whole),
        "first_wait_s": round(steps[0]["data_seconds"], 2),
        "longest_wait_s": round(max(step["data_seconds"] for step in steps[1:]), 4),
        "waiting_percent": round(100 * waited / whole, 3),
    }))  # fmt: skip


def make_model(folder: Path, tokenizer: Path, shape: str) -> None:
    """Write a random model of a shape, with a tokenizer's files."""
    folder.mkdir()
    for file in tokenizer.iterdir():
        if file.name.startswith(("tokenizer", "chat_template", "special_tokens")):
            shutil.copy(file, folder)
    read = TextTokenizer.from_folder(folder)
    config = LlamaConfig(
        vocab_size=read.vocab_size,
        eos_token_id=read.eos_id,
        max_position_embeddings=2048,
        dtype="bfloat16",
        **SHAPES[shape],
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)


def make_rows(path: Path, rows: int) -> None:
    """Write chats of 1 to 4 turns, 20 to 900 words each."""
    rng = random.Random(7)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            messages = []
            for _ in range(rng.randint(1, 4)):
                question = " ".join(rng.choices(WORDS, k=rng.randint(10, 60)))
                answer = " ".join(rng.choices(WORDS, k=rng.randint(10, 400)))
                messages.append({"role": "user", "content": question})
                messages.append({"role": "assistant", "content": answer})
            file.write(json.dumps({"messages": messages}) + "\n")


def train(folder: Path, args: argparse.Namespace) -> list[dict[str, float]]:
    """Train by the command; return the steps that it recorded."""
    recipe = folder / "wait.yaml"
    recipe.write_text(
        f"model: {{path: {folder / 'model'}, quantization: nf4}}\n"
        f"data: {{sources: [{{path: {folder / 'rows.jsonl'}}}], max_length: 2048}}\n"
        f"train: {{epochs: 3, max_steps: {args.steps}, micro_batch_size: {args.micro_batch}, "
        f"accumulation: {max(1, 16 // args.micro_batch)}}}\n"
        f"run: {{name: wait, storage: {folder / 'runs'}, trackers: []}}\n"
    )
    command = [sys.executable, "-m", "raytune_ft.train", "--config", str(recipe)]
    subprocess.run(command, check=True, stdout=sys.stderr)
    return list(read_jsonl(RunFolder(folder / "runs" / "wait").metrics))


if __name__ == "__main__":
    main()
