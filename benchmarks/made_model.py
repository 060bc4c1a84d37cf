"""A model folder of a real shape with random weights, written as fast as a disk takes it.

In: a shape's name, layers and a divisor of its widths. Out: config.json, bfloat16 safetensors in
shards, and a small tokenizer with a chat template, trained on the words of the made rows.
Run: python -m benchmarks.made_model FOLDER [--shape 7b|1b|135m] [--layers N] [--shrink N]
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

WORDS = [
    "river", "stone", "cloud", "night", "green", "song", "glass", "seven", "window", "pack",
    "which", "about", "never", "house", "light", "paper", "under", "three", "often", "small",
]  # fmt: skip
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SHAPES: dict[str, dict[str, Any]] = {
    # InternLM-7B: attention with biases, 103,168 words
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 103168,
           "attention_bias": True},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
           "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 32000},
}  # fmt: skip
LEAST_WORDS = 1024
SHARD_BYTES = 10**9
WRITERS = 8
STD = 0.02


def shape_of(name: str, layers: int | None = None, shrink: int = 1) -> dict[str, Any]:
    """Return the fields of config.json; `shrink` divides the widths for a rehearsal."""
    shape = dict(SHAPES[name])
    shape["num_hidden_layers"] = min(layers or 99, shape["num_hidden_layers"])
    if shrink > 1:
        for key in ("hidden_size", "intermediate_size"):
            shape[key] = max(64, shape[key] // shrink)
        shape["vocab_size"] = max(LEAST_WORDS, shape["vocab_size"] // shrink)
        shape["num_attention_heads"], shape["num_key_value_heads"] = 4, 2
    return shape


def main() -> None:
    """Write one folder and print what it took as a line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--shrink", type=int, default=1)
    args = parser.parse_args()
    begun = time.perf_counter()
    size = write(args.folder, shape_of(args.shape, args.layers, args.shrink))
    took = time.perf_counter() - begun
    print(json.dumps({"made": args.shape, "gb": round(size / 1e9, 2), "seconds": round(took, 1)}))


def write(folder: Path, shape: dict[str, Any]) -> int:
    """Write the folder; return the bytes of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    config = LlamaConfig(
        **shape, max_position_embeddings=4096, rms_norm_eps=1e-6, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    with torch.device("meta"):
        sizes = {n: tuple(t.shape) for n, t in LlamaForCausalLM(config).state_dict().items()}
    shards = list(_shards(sizes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    with ThreadPoolExecutor(WRITERS) as pool:
        jobs = [(folder / name, shard, seed) for seed, (name, shard) in enumerate(
            zip(names, shards, strict=True))]  # fmt: skip
        written = list(pool.map(lambda job: _write_shard(*job), jobs))
    places = {t: name for name, shard in zip(names, shards, strict=True) for t in shard}
    index = {"metadata": {"total_size": sum(written)}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(written)


def _shards(sizes: dict[str, tuple[int, ...]]) -> Iterator[dict[str, tuple[int, ...]]]:
    shard: dict[str, tuple[int, ...]] = {}
    held = 0
    for name, size in sizes.items():
        n = 2
        for width in size:
            n *= width
        if shard and held + n > SHARD_BYTES:
            yield shard
            shard, held = {}, 0
        shard[name] = size
        held += n
    yield shard


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], seed: int) -> int:
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    tensors = {}
    for name, size in shard.items():
        tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
        if len(size) > 1:
            tensor.normal_(std=STD, generator=generator)
        else:
            tensor.fill_(0.0 if name.endswith("bias") else 1.0)
        tensors[name] = tensor.cpu()
    save_file(tensors, path, metadata={"format": "pt"})
    return sum(t.numel() * t.element_size() for t in tensors.values())


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS, pieces: int = 600) -> int:
    """Write a byte-level BPE tokenizer of at most so many pieces, and ChatML; return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] * 5, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    size: int = tokenizer.get_vocab_size()
    return size


def write_chats(path: Path, rows: int, words: int, *, distinct: int | None = None) -> None:
    """Write one-turn chats of about so many words; with `distinct`, the first ones repeat."""
    rng = random.Random(7)
    made = [_chat(rng, words) for _ in range(min(rows, distinct or rows))]
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            file.write(json.dumps({"messages": made[number % len(made)]}) + "\n")


def _chat(rng: random.Random, words: int) -> list[dict[str, str]]:
    question, answer = rng.choices(WORDS, k=words // 8), rng.choices(WORDS, k=words)
    return [
        {"role": "user", "content": " ".join(question)},
        {"role": "assistant", "content": " ".join(answer)},
    ]


def write_moss(path: Path, rows: int, words: int) -> None:
    """Write rows of the MOSS data sets' format: fields that carry their own markers."""
    rng = random.Random(8)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            turns = {f"turn_{i}": _moss_turn(rng, words // 2) for i in (1, 2)}
            meta = "You are an AI assistant whose name is MOSS.\n"
            row = {"meta_instruction": meta, "num_turns": 2, "chat": turns}
            file.write(json.dumps(row) + "\n")


def _moss_turn(rng: random.Random, words: int) -> dict[str, str]:
    def text(n: int) -> str:
        return " ".join(rng.choices(WORDS, k=max(1, n)))

    return {
        "Human": f"<|Human|>: {text(words // 8)}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {text(words // 16)}<eot>\n",
        "Commands": "<|Commands|>: None<eoc>\n",
        "Tool Responses": "<|Results|>: None<eor>\n",
        "MOSS": f"<|MOSS|>: {text(words)}<eom>\n",
    }


if __name__ == "__main__":
    main()
