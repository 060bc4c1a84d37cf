"""Tiny tokenizers in the families' real file forms, with the original's special tokens.

In: a folder. Out: the files that the family's checkpoint has, and the number of ids.

sentencepiece models are trained here; then their pieces are put into the original's order (a
BPE model merges by score, so the order is free). What is known of the originals and what was
left out of memory is in the table of the families' facts: dummy prefix, ids, reserved tokens.
"""

from __future__ import annotations

import base64
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

SENTENCES = (
    "red blue stone river cloud seven night green song glass",
    "def answer(question):\n    return question + 1",
    "what is the red stone by the river? the seventh song of the night.",
    "你好吗 今天的天气怎么样 河边的石头是红色的",
)
EXTRA_PIECES = 60
"""Normal pieces beyond single characters."""
QWEN_MERGES = ("th", "the", " the", "in", "re", "red", " red", "st", "on", "ston", " s", " q")
QWEN_EXTRAS = 205


def internlm(folder: Path) -> int:
    reserved = [f"<TOKENS_UNUSED_{i}>" for i in range(2, 6)]
    size = write_model(folder, ("<eoh>", "<eoa>", *reserved), prefix=False)
    write_config(folder, "InternLMTokenizer", "internlm", pad_token="</s>")
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    return size


def llama(folder: Path, **changes: Any) -> int:
    size = write_model(folder, prefix=True)
    write_config(folder, "LlamaTokenizer", None, add_bos_token=True, add_eos_token=False, **changes)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "special_tokens_map.json", names)
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    return size


def zephyr(folder: Path) -> int:
    return llama(folder, pad_token="</s>")


def baichuan(folder: Path) -> int:
    places = {"<reserved_102>": 195, "<reserved_103>": 196}
    size = write_model(folder, tuple(places), prefix=True, places=places)
    write_config(folder, "BaichuanTokenizer", "baichuan", add_bos_token=False, pad_token="<unk>")
    return size


def baichuan2(folder: Path) -> int:
    places = {"<reserved_106>": 195, "<reserved_107>": 196}
    size = write_model(folder, tuple(places), prefix=False, places=places)
    write_config(folder, "BaichuanTokenizer", "baichuan", add_bos_token=False, pad_token="<unk>")
    return size


def chatglm2(folder: Path) -> int:
    return _chatglm(folder, "THUDM/chatglm2-6b") + 5


def chatglm3(folder: Path) -> int:
    return _chatglm(folder, "THUDM/chatglm3-6b") + 9


def _chatglm(folder: Path, name: str) -> int:
    size = write_model(folder, prefix=True)
    config = {
        "name_or_path": name, "remove_space": False, "do_lower_case": False,
        "tokenizer_class": "ChatGLMTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)
    return size


def yi_first(folder: Path) -> int:
    size = _yi_model(folder)
    write_config(folder, "YiTokenizer", "yi", **YI_NAMES)
    return size


def yi_later(folder: Path) -> int:
    size = _yi_model(folder)
    write_config(folder, "LlamaTokenizer", None, add_bos_token=False, **YI_NAMES)
    return size


YI_NAMES = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<unk>"}


def _yi_model(folder: Path) -> int:
    places = {"<|im_start|>": 6, "<|im_end|>": 7}
    names = {"bos_piece": "<|startoftext|>", "eos_piece": "<|endoftext|>"}
    return write_model(folder, tuple(places), prefix=False, places=places, names=names)


def qwen(folder: Path) -> int:
    """Write `base64 rank` lines: all bytes, then merges of what stands before them."""
    tokens = [bytes([i]) for i in range(256)] + [merge.encode() for merge in QWEN_MERGES]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (folder / "qwen.tiktoken").write_text("\n".join(lines) + "\n", encoding="ascii")
    config = {
        "model_max_length": 8192, "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", config)
    size = len(tokens) + 3 + QWEN_EXTRAS
    end = size - QWEN_EXTRAS - 3
    generation = {"chat_format": "chatml", "eos_token_id": end, "pad_token_id": end}
    write_json(folder / "generation_config.json", generation)
    return size


def starcoder(folder: Path) -> int:
    """Write a byte-level BPE that splits digits, as tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>", "<fim_pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    config = {"add_prefix_space": False, "tokenizer_class": "GPT2TokenizerFast"} | names
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", names | {"additional_special_tokens": special})
    write_json(folder / "generation_config.json", {"bos_token_id": 0, "eos_token_id": 0})
    size: int = tokenizer.get_vocab_size()
    return size


def write_config(folder: Path, kind: str, module: str | None, **fields: Any) -> None:
    """Write a tokenizer_config.json; `module`: the file of code that came with the model."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config: dict[str, Any] = names | {"tokenizer_class": kind} | fields
    if module:
        config["auto_map"] = {"AutoTokenizer": [f"tokenization_{module}.{kind}", None]}
    write_json(folder / "tokenizer_config.json", config)


def write_model(
    folder: Path,
    user_defined: tuple[str, ...] = (),
    *,
    prefix: bool,
    places: dict[str, int] | None = None,
    names: dict[str, str] | None = None,
) -> int:
    """Write a tokenizer.model; user-defined pieces stand last but for those with a place."""
    from sentencepiece import sentencepiece_model_pb2 as pb

    model = pb.ModelProto.FromString(
        trained(user_defined, prefix, tuple(sorted((names or {}).items())))
    )
    kinds = pb.ModelProto.SentencePiece
    order = {kinds.UNKNOWN: 0, kinds.CONTROL: 1, kinds.BYTE: 2, kinds.NORMAL: 3}
    pieces = sorted(model.pieces, key=lambda piece: order.get(piece.type, 4))
    for text, place in sorted((places or {}).items(), key=lambda item: item[1]):
        piece = next(p for p in pieces if p.piece == text)
        pieces.remove(piece)
        pieces.insert(place, piece)
    pieces = [pb.ModelProto.SentencePiece.FromString(p.SerializeToString()) for p in pieces]
    del model.pieces[:]
    model.pieces.extend(pieces)
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    return len(pieces)


@lru_cache
def trained(
    user_defined: tuple[str, ...], prefix: bool, names: tuple[tuple[str, str], ...]
) -> bytes:
    """Train a BPE with byte fallback that keeps every space, as all these families do."""
    import sentencepiece

    target = io.BytesIO()
    letters = len({char for line in SENTENCES for char in line if not char.isspace()}) + 1
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=target,
        model_type="bpe",
        byte_fallback=True,
        vocab_size=3 + 256 + letters + len(user_defined) + EXTRA_PIECES,
        character_coverage=1.0,
        user_defined_symbols=list(user_defined),
        add_dummy_prefix=prefix,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
        **dict(names),
    )
    return target.getvalue()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
