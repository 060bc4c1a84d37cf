"""Tokenizer: text in, token ids out, from the files of a model folder.

Reads tokenizer.json with the `tokenizers` library; no transformers, no torch, no remote code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from raytune_ft.errors import ModelError

# Classes whose start ids are not written in their configuration; XTuner v0.1.9 has the same pair.
START_IDS: Mapping[str, tuple[int, ...]] = {
    "ChatGLMTokenizer": (64790, 64792),
    "QWenTokenizer": (),
}


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


class TextTokenizer:
    """One model's tokenizer; built in a millisecond from its spec, so it pickles as the spec."""

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._backend: Tokenizer = Tokenizer.from_str(spec.tokenizer_json)
        self.bos_ids = spec.bos_ids
        self.eos_id = spec.eos_id
        self.extra_stop_ids = spec.extra_stop_ids
        self.chat_template = spec.chat_template
        self.named_tokens = dict(spec.named_tokens)
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        self.special_tokens = {token.content: id_ for id_, token in added.items() if token.special}
        self.content_hash = _hash(spec)

    @classmethod
    def from_folder(cls, path: str | Path) -> TextTokenizer:
        """Read a model folder; ModelError, one line, if that is impossible."""
        return cls(_read_spec(Path(path)))

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; adds nothing, and special tokens in the text count as such."""
        if not text:
            return []
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, text: str) -> int | None:
        """Return the id of a single token by its text, None if there is no such token."""
        id_: int | None = self._backend.token_to_id(text)
        return id_

    def __reduce__(self) -> tuple[type[TextTokenizer], tuple[TokenizerSpec]]:
        return TextTokenizer, (self.spec,)


def _hash(spec: TokenizerSpec) -> str:
    parts = [spec.tokenizer_json, list(spec.bos_ids), spec.eos_id, spec.chat_template]
    parts.append(sorted(spec.named_tokens))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_spec(folder: Path) -> TokenizerSpec:
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; model.path is the folder of a model")
    config = _read_json(folder / "tokenizer_config.json")
    generation = _read_json(folder / "generation_config.json")
    named = _named_tokens(_read_json(folder / "special_tokens_map.json"), config)
    backend = _read_backend(folder, config)

    stops = generation.get("eos_token_id")
    stop_ids = [stops] if isinstance(stops, int) else list(stops or [])
    eos_id = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    if eos_id is None:
        if not stop_ids:
            raise ModelError(
                f"{folder}: no end-of-text token; set eos_token in tokenizer_config.json "
                "to a token of tokenizer.json"
            )
        eos_id = stop_ids[0]
    return TokenizerSpec(
        tokenizer_json=backend.to_str(),
        bos_ids=_bos_ids(backend, config, named),
        eos_id=eos_id,
        extra_stop_ids=frozenset(stop_ids) - {eos_id},
        named_tokens=tuple(sorted(named.items())),
        chat_template=_chat_template(folder, config),
    )


def _read_json(path: Path) -> dict[str, Any]:
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


def _read_backend(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    file = folder / "tokenizer.json"
    if not file.is_file():
        if (folder / "tokenizer.model").is_file():
            raise ModelError(
                f"{folder}: sentencepiece model only; not readable yet; "
                "put the model's tokenizer.json beside tokenizer.model"
            )
        raise ModelError(f"{folder}: no tokenizer.json; copy it from the model's repository")
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for every damaged file
        raise ModelError(f"{file}: cannot be read ({error}); copy the file again") from None
    # Some files carry the settings of their author's last call; ids must not depend on them.
    backend.no_truncation()
    backend.no_padding()
    for token in config.get("added_tokens_decoder", {}).values():
        if backend.token_to_id(token["content"]) is None:
            keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
            flags = {key: bool(token[key]) for key in keys if key in token}
            backend.add_tokens([AddedToken(token["content"], **flags)])
    return backend


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
    special = START_IDS.get(str(config.get("tokenizer_class")))
    if special is not None:
        return special
    if "bos_token" not in named:
        return ()
    bos_id = backend.token_to_id(named["bos_token"])
    return () if bos_id is None else (bos_id,)


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
