"""Rows, a tokenizer and a chat template for the benchmark of the data stream.

In: a folder. Out: in it, plain rows and chats of guanaco's lengths as JSONL, and a model folder
with a byte-level vocabulary that is trained on them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

GUANACO = (
    Path(__file__).resolve().parents[2]
    / "shared/data/openassistant-guanaco/openassistant_best_replies_train.jsonl"
)
VOCABULARY = 32_000
MAX_LENGTH = 2048
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How the vocabularies of GPT-4 and Llama 3 divide text."""
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with the marks that TRL needs to tell answers."""
SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "er", "in")]


def write(folder: Path, n_rows: int) -> None:
    """Write plain.jsonl, chat.jsonl, small.jsonl (1,000 of the chats) and model/."""
    texts = list(_texts(n_rows))
    with (folder / "plain.jsonl").open("w", encoding="utf-8") as plain:
        plain.writelines(json.dumps({"text": "\n\n".join(turns)}) + "\n" for turns in texts)
    chats = [json.dumps({"messages": _messages(turns)}) + "\n" for turns in texts]
    (folder / "chat.jsonl").write_text("".join(chats), encoding="utf-8")
    (folder / "small.jsonl").write_text("".join(chats[:1000]), encoding="utf-8")
    _write_model(folder / "model", ["\n\n".join(turns) for turns in texts[:2000]])


def source_of_rows() -> str:
    """Say where the rows come from."""
    return "guanaco, its words turned round" if GUANACO.is_file() else "made words"


def _messages(turns: list[str]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def _texts(n_rows: int) -> Iterator[list[str]]:
    """Yield question, answer, question, ... of each row; no two rows are alike."""
    known = list(_guanaco()) if GUANACO.is_file() else list(_made())
    for number in range(n_rows):
        turn, place = divmod(number, len(known))
        yield [f"{number}: {_turned(known[place][0], turn)}",
               *(_turned(text, turn) for text in known[place][1:])]  # fmt: skip


def _turned(text: str, by: int) -> str:
    """Put the first words of a text last."""
    words = text.split(" ")
    cut = 7 * by % len(words)
    return " ".join(words[cut:] + words[:cut]).strip() or "."


def _guanaco() -> Iterator[list[str]]:
    for line in GUANACO.read_text(encoding="utf-8").splitlines():
        parts = json.loads(line)["text"].split("### ")
        turns = [part.partition(":")[2].strip() for part in parts if part.strip()]
        turns = [text for text in turns if text]
        yield turns[: len(turns) // 2 * 2] or ["question", "answer"]


def _made() -> Iterator[list[str]]:
    """Make texts whose lengths spread as guanaco's do, of some thousand words."""
    chance = random.Random(7)
    words = ["".join(chance.choices(SYLLABLES, k=chance.randint(1, 4))) for _ in range(8000)]
    for _ in range(950):
        yield [
            " ".join(chance.choices(words, k=max(3, int(chance.lognormvariate(mean, 0.9)))))
            for mean in (3.0, 5.0)
        ]


def _write_model(folder: Path, texts: list[str]) -> None:
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
