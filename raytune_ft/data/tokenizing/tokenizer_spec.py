"""Tokenizer files: a model folder in, everything that decides ids out, as plain values.

Reads tokenizer.json, sentencepiece's tokenizer.model and Qwen's rank file; no remote code. What
takes seconds to build is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from raytune_ft.config.cache import cache_dir
from raytune_ft.data.tokenizing import sentencepiece_file, tiktoken_file
from raytune_ft.data.tokenizing.new_tokens import NewToken, add_tokens
from raytune_ft.errors import ModelError

# Classes of 2023 whose code came with the checkpoint. They read their own file alone, so a
# tokenizer.json beside it is some later tool's conversion; every other class prefers the JSON.
SENTENCEPIECE_CLASSES = {
    "InternLMTokenizer", "BaiChuanTokenizer", "BaichuanTokenizer", "YiTokenizer",
    "ChatGLMTokenizer",
}  # fmt: skip
CHATGLM = "ChatGLMTokenizer"
QWEN = "QWenTokenizer"
# Appended to the file by the models' code: text never becomes the first five, roles it may.
CHATGLM_MARKS = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")
CHATGLM_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
CHATGLM_START = ("[gMASK]", "sop")
LLAMA_DEFAULTS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
"""What the class takes where the configuration names nothing."""
START_TOKENS = "start_tokens"
"""Key by which our own exported tokenizer_config.json says what opens a turn."""
BUILD = b"2"
"""Part of the cache key: change it whenever a pipeline is built otherwise."""


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything that decides ids, as plain values; this is what travels to data tasks."""

    tokenizer_json: str
    bos_ids: tuple[int, ...]
    eos_id: int
    extra_stop_ids: frozenset[int]
    """Ids that end an answer by generation_config.json, beside `eos_id`."""
    named_tokens: tuple[tuple[str, str], ...]
    """(`bos_token`, text) and so on, the variables of chat templates."""
    chat_template: str | None
    silent_ids: frozenset[int] = frozenset()
    """Ids that text never becomes and that stand for no text, beside the special tokens."""
    adds_bos: bool = True
    """Whether the model's own tokenizer puts `bos_ids` before a text; Baichuan's does not."""
    new_tokens: tuple[NewToken, ...] = ()
    """Tokens that a recipe added, the last ids of the vocabulary."""


def read_spec(
    folder: Path, eos_token: str | None = None, new_tokens: Sequence[str] = ()
) -> TokenizerSpec:
    """Read a model folder.

    Args:
        folder: holds a tokenizer.json, a tokenizer.model or a *.tiktoken file.
        eos_token: ends an answer, whatever the folder says.
        new_tokens: texts that become tokens of their own.

    Raises:
        ModelError: the folder or a file of it cannot be used; one line.
        RecipeError: a new token is none.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; model.path is the folder of a model")
    config = read_json(folder / "tokenizer_config.json")
    generation = read_json(folder / "generation_config.json")
    backend, defaults = _read_backend(folder, config)
    special_map = read_json(folder / "special_tokens_map.json")
    _add_tokens(backend, folder, config, special_map)
    added = add_tokens(backend, new_tokens, str(folder))
    named = _named_tokens(defaults, special_map, config)
    if eos_token is not None:
        named["eos_token"] = eos_token
        if backend.token_to_id(eos_token) is None:
            raise ModelError(
                f"{folder}: has no token '{eos_token}'; set model.eos_token to one that it has"
            )
    stop_ids = _stop_ids(generation)
    eos_id = _eos_id(folder, backend, named, stop_ids)
    return TokenizerSpec(
        tokenizer_json=backend.to_str(),
        bos_ids=_bos_ids(backend, config, named),
        eos_id=eos_id,
        extra_stop_ids=frozenset(stop_ids) - {eos_id},
        named_tokens=tuple(sorted(named.items())),
        chat_template=_chat_template(folder, config),
        silent_ids=_silent_ids(backend, config),
        adds_bos=config.get("add_bos_token") is not False,
        new_tokens=added,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file, an empty one if the file is absent."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: holds no JSON object; copy the file again")
    return content


def _read_backend(folder: Path, config: Mapping[str, Any]) -> tuple[Tokenizer, dict[str, str]]:
    """Return the pipeline, and the named tokens that its own file implies."""
    kind = config.get("tokenizer_class")
    as_json, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    ranks = next(iter(sorted(folder.glob("*.tiktoken"))), None)
    if ranks is not None and (kind == QWEN or not as_json.is_file()):
        return _from_ranks(ranks, folder)
    if pieces.is_file() and (kind in SENTENCEPIECE_CLASSES or not as_json.is_file()):
        return _from_pieces(pieces, folder, config)
    if not as_json.is_file():
        raise ModelError(
            f"{folder}: no tokenizer.json, tokenizer.model or *.tiktoken; "
            "copy it from the model's repository"
        )
    try:
        backend = Tokenizer.from_file(str(as_json))
    except Exception as error:  # the library raises bare Exception for every damaged file
        raise ModelError(f"{as_json}: cannot be read ({error}); copy the file again") from None
    # Some files carry the settings of their author's last call; ids must not depend on them.
    backend.no_truncation()
    backend.no_padding()
    defaults = LLAMA_DEFAULTS if str(kind).startswith(("Llama", "CodeLlama")) else {}
    return backend, {
        k: text for k, text in defaults.items() if backend.token_to_id(text) is not None
    }


def _from_pieces(
    file: Path, folder: Path, config: Mapping[str, Any]
) -> tuple[Tokenizer, dict[str, str]]:
    content = _read_bytes(file)
    model = sentencepiece_file.read_model(content, file)
    named = sentencepiece_file.named_tokens(model)
    if config.get("tokenizer_class") != CHATGLM:
        return _cached(content, b"pieces", lambda: sentencepiece_file.build(model)), named

    def build() -> Tokenizer:
        tokenizer = sentencepiece_file.build(model, CHATGLM_MARKS)
        tokenizer.add_special_tokens([AddedToken(r, normalized=False) for r in roles])
        return tokenizer

    roles = () if _is_second_chatglm(folder, config) else CHATGLM_ROLES
    named = {key: text for key, text in named.items() if key != "bos_token"}
    return _cached(content, b"chatglm%d" % len(roles), build), named


def _is_second_chatglm(folder: Path, config: Mapping[str, Any]) -> bool:
    """Tell ChatGLM2 from 3: same class and same file, so their makers' names are what is left.

    In doubt it is 3, whose role tokens a 2 has rows for, but never trained.
    """
    model = read_json(folder / "config.json")
    for name in (config.get("name_or_path"), model.get("_name_or_path"), folder.resolve()):
        for release in ("chatglm2", "chatglm3"):
            if release in str(name).lower():
                return release == "chatglm2"
    return False


def _from_ranks(file: Path, folder: Path) -> tuple[Tokenizer, dict[str, str]]:
    content = _read_bytes(file)
    generation = read_json(folder / "generation_config.json")
    end = "<|im_end|>" if generation.get("chat_format") == "chatml" else "<|endoftext|>"
    backend = _cached(
        content, b"qwen", lambda: tiktoken_file.build(tiktoken_file.read_ranks(content, file))
    )
    return backend, {"eos_token": end, "pad_token": "<|endoftext|>"}


def _read_bytes(file: Path) -> bytes:
    content = file.read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise ModelError(f"{file}: a pointer of Git LFS, not the file; run 'git lfs pull' there")
    return content


def _cached(content: bytes, kind: bytes, build: Callable[[], Tokenizer]) -> Tokenizer:
    """Return the cached pipeline of a file's content, else build and cache it.

    A cache that cannot be read or written costs seconds, nothing else.
    """
    key = hashlib.sha256(b"\0".join((BUILD, kind, content))).hexdigest()
    kept = cache_dir() / "tokenizers" / f"{key}.json"
    with suppress(Exception):  # the library raises bare Exception for every damaged file
        return Tokenizer.from_file(str(kept))
    backend = build()
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
            part = Path(scratch) / kept.name
            part.write_text(backend.to_str(), encoding="utf-8")
            part.replace(kept)  # at once: another process never sees half a file
    return backend


def _add_tokens(
    backend: Tokenizer,
    folder: Path,
    config: Mapping[str, Any],
    special_map: Mapping[str, Any],
) -> None:
    """Add the tokens that stand in the configuration alone, at the ids given there."""
    special = {*_named_tokens(special_map, config).values()}
    special.update(map(str, special_map.get("additional_special_tokens", [])))
    listed: dict[int, AddedToken] = {}
    for text, id_ in read_json(folder / "added_tokens.json").items():
        listed[int(id_)] = AddedToken(text, normalized=False, special=text in special)
    for key, token in config.get("added_tokens_decoder", {}).items():
        keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
        flags = {flag: bool(token[flag]) for flag in keys if flag in token}
        listed[int(key)] = AddedToken(token["content"], **flags)
    for id_, token in sorted(listed.items()):
        if backend.token_to_id(token.content) is not None:
            continue
        backend.add_tokens([token])
        found = backend.token_to_id(token.content)
        if found != id_:
            raise ModelError(
                f"{folder}: token '{token.content}' should have id {id_}, but the next free one "
                f"is {found}; the tokenizer's files belong to different models"
            )


def _stop_ids(generation: Mapping[str, Any]) -> list[int]:
    stops = generation.get("eos_token_id")
    return [stops] if isinstance(stops, int) else list(stops or [])


def _eos_id(
    folder: Path, backend: Tokenizer, named: Mapping[str, str], stop_ids: Sequence[int]
) -> int:
    eos_id: int | None = None
    if "eos_token" in named:
        eos_id = backend.token_to_id(named["eos_token"])
    if eos_id is None and stop_ids:
        return stop_ids[0]
    if eos_id is None:
        raise ModelError(
            f"{folder}: no end-of-text token; set eos_token in tokenizer_config.json "
            "to a token of the tokenizer"
        )
    return eos_id


def _named_tokens(*layers: Mapping[str, Any]) -> dict[str, str]:
    """Merge `bos_token` and the like; later layers win, an explicit null removes."""
    named: dict[str, str] = {}
    for layer in layers:
        for key, value in layer.items():
            if not key.endswith("_token"):
                continue
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text:
                named[key] = text
            elif value is None:
                named.pop(key, None)
    return named


def _bos_ids(
    backend: Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> tuple[int, ...]:
    """Return what opens a turn; two classes do not say so in their configuration."""
    kind = config.get("tokenizer_class")
    if kind == QWEN:
        return ()
    texts: Sequence[str] = CHATGLM_START if kind == CHATGLM else (named.get("bos_token", ""),)
    texts = config.get(START_TOKENS, texts)
    ids = [backend.token_to_id(text) for text in texts]
    return tuple(id_ for id_ in ids if id_ is not None)


def _silent_ids(backend: Tokenizer, config: Mapping[str, Any]) -> frozenset[int]:
    if config.get("tokenizer_class") != CHATGLM:
        return frozenset()
    ids = (backend.token_to_id(text) for text in CHATGLM_MARKS)
    return frozenset(id_ for id_ in ids if id_ is not None)


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Prefer the file over the configuration, as transformers does."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry["name"]: entry["template"] for entry in template}
        template = named.get("default")
    return template if isinstance(template, str) and template else None
