"""What all sides of the QLoRA benchmark train on: the same rows, the same ids, the same weights.

In: chat rows, and a card's shape. Out, in a folder: `shape/` with config.json and a byte-level BPE
tokenizer trained on the rows' text; `documents.safetensors`, the rows as ids and labels, of which
peers make rows of their own; and `model4/`, the random weights as transformers writes 4-bit models,
for peers that read one from a disk (`model4-nobias/`: the same without biases of attention).
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = "qlora/oasst1_e3"
CARD = "internlm_7b"
WORDS = 32000
SPECIAL = ["<pad>", "<s>", "</s>"]
SHRUNK = ("hidden_size", "intermediate_size", "vocab_size")
SHARD_BYTES = 2 * 10**9


def shape_of(args: Namespace) -> dict[str, Any]:
    """Return the card's shape, for a rehearsal with fewer layers and narrower ones."""
    from raytune_ft.config import catalog

    shape = dict(catalog.card(CARD).config)
    shape["num_hidden_layers"] = args.layers or shape["num_hidden_layers"]
    shape["max_position_embeddings"] = max(args.length, shape["max_position_embeddings"])
    if args.shrink > 1:
        for key in SHRUNK:
            shape[key] = max(64, shape[key] // args.shrink // 64 * 64)
        shape["num_attention_heads"] = shape["num_key_value_heads"] = 4
        shape["head_dim"] = shape["hidden_size"] // 4
    return shape


def recipe_of(args: Namespace, changes: dict[str, Any]) -> Any:
    """Return the shipped recipe on these rows, with changes such as `train.layout`."""
    from raytune_ft.config import catalog
    from raytune_ft.config.schema import Recipe

    body = catalog.body_for(CARD, RECIPE)
    body["model"]["path"] = str(args.folder / "shape")
    body["data"]["sources"][0] |= {"path": str(args.rows)}
    body["data"]["max_length"] = args.length
    body["chat_eval"] = {"every": None, "prompts": []}
    body["checkpoint"] = {"every": 10**6}
    body["train"]["accumulation"] = args.packs
    body["run"] = {"trackers": []}
    for name, value in changes.items():
        section, _, key = name.partition(".")
        body.setdefault(section, {})[key] = value
    return Recipe.model_validate(body)


def feed_of(recipe: Any) -> Any:
    """Return the windows of a recipe's rows."""
    from raytune_ft.data import sources
    from raytune_ft.data.examples import Encoder
    from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
    from raytune_ft.data.windows import make_feed

    tokenizer = TextTokenizer.from_folder(recipe.model.path)
    rows = sources.open_sources(recipe.data, recipe.train.seed)
    return make_feed(rows, Encoder.of(recipe, tokenizer), recipe.train.seed)


def packs_of(recipe: Any) -> Any:
    """Return `packs(position)`, the stream that a training worker takes, made in this process."""
    from raytune_ft.data.places import iter_packs

    feed = feed_of(recipe)
    return lambda position: iter_packs(feed, position)


def prepare(args: Namespace) -> dict[str, Any]:
    """Write the tokenizer, the shape and the documents; return what a line about them says."""
    from safetensors.numpy import save_file

    from raytune_ft.data.packing import Position

    shape = shape_of(args)
    words = write_tokenizer(args.folder / "shape", args.rows, min(WORDS, shape["vocab_size"]))
    text = json.dumps({**shape, "architectures": ["LlamaForCausalLM"], "bos_token_id": 1,
                       "eos_token_id": 2, "pad_token_id": 0})  # fmt: skip
    (args.folder / "shape" / "config.json").write_text(text)
    ids, labels, sizes, packs = [], [], [], 0
    for placed in packs_of(recipe_of(args, {}))(Position()):
        pack = placed.pack
        packs += 1
        ids.append(pack.input_ids)
        labels.append(pack.labels)
        sizes.extend(np.diff(pack.cu_seqlens).tolist())
        if placed.behind.epoch:
            break
    joined = {
        "input_ids": np.concatenate(ids).astype(np.int32),
        "labels": np.concatenate(labels).astype(np.int32),
        "sizes": np.asarray(sizes, np.int32),
    }
    save_file(joined, args.folder / "documents.safetensors")
    tokens, labelled = len(joined["input_ids"]), int((joined["labels"] >= 0).sum())
    return {"rows": len(sizes), "tokens": tokens, "labelled": labelled, "packs": packs,
            "density": round(tokens / packs / args.length, 4), "words": words}  # fmt: skip


def write_tokenizer(folder: Path, rows: Path, words: int) -> int:
    """Train a byte-level BPE on rows' texts, write it as transformers does; return its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words, special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(_texts(rows), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
              "eos_token": "</s>", "pad_token": "<pad>"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def _texts(rows: Path) -> Iterator[str]:
    files = sorted(rows.glob("*.jsonl")) if rows.is_dir() else [rows]
    for file in files:
        yield from file.read_text(encoding="utf-8").splitlines()


def write_quantised(args: Namespace, model: Any) -> Path:
    """Write a model with NF4 layers as transformers' 4-bit folder; return the folder."""
    import torch
    from transformers import BitsAndBytesConfig

    from raytune_ft.model.tensors import ShardWriter

    folder = args.folder / "model4"
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, SHARD_BYTES)
    for name, tensor in model.state_dict().items():
        writer.add(name, tensor.cpu())
    writer.close()
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    shape = json.loads((args.folder / "shape" / "config.json").read_text())
    bare = folder.with_name("model4-nobias")
    bare.mkdir(exist_ok=True)
    for place, biased in ((folder, True), (bare, False)):
        config = {**shape, "quantization_config": quantised.to_dict(), "dtype": "bfloat16",
                  "attention_bias": biased}  # fmt: skip
        (place / "config.json").write_text(json.dumps(config))
        for file in (args.folder / "shape").glob("tokenizer*"):
            (place / file.name).write_bytes(file.read_bytes())
    for file in folder.glob("model*"):
        if not (bare / file.name).exists():
            (bare / file.name).symlink_to(file.resolve())
    return folder
