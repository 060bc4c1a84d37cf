"""What stands beside exported weights so that other tools ask them as training did.

The tokenizer, the prompt template as a chat template, the tokens that end an answer, and
`raytune_ft.json`, by which our own chat and server open the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from raytune_ft.data.templating.templates import TOKENIZER, get_template
from raytune_ft.data.tokenizing import hf_files
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.training.run_folder import RunFolder

MARKER = "raytune_ft.json"
"""Beside exported weights: the template and system text that they were trained with."""
GENERATION = "generation_config.json"
TEMPLATE = "chat_template.jinja"


def marker(folder: RunFolder) -> dict[str, Any]:
    """Describe how trained weights want to be asked."""
    info = folder.info()
    return {
        "template": info["template"],
        "system": info["system"],
        "base": info["model_folder"],
        "quantization": info["quantization"],
        "double_quant": info["double_quant"],
        "eos_token": info.get("eos_token"),
        "new_tokens": info.get("new_tokens") or [],
        "run": info["name"],
        "version": info["version"],
    }


def read_marker(folder: Path) -> dict[str, Any] | None:
    """Read the marker beside exported weights, if there is one."""
    path = folder / MARKER
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_marker(folder: Path, content: dict[str, Any]) -> None:
    """Write the marker."""
    _write_json(folder / MARKER, content)


def tokenizer_of(run: RunFolder) -> TextTokenizer:
    """Return the tokenizer that a run was trained with."""
    info = run.info()
    return TextTokenizer.from_folder(
        info["model_folder"], info.get("eos_token"), info.get("new_tokens") or ()
    )


def write_tokenizer(run: RunFolder, target: Path) -> None:
    """Write a run's tokenizer and template as transformers reads them, without code."""
    tokenizer = tokenizer_of(run)
    hf_files.write(tokenizer, target, hf_files.chat_template(run.info()["template"], tokenizer))


def write_template(adapter: Path, target: Path) -> None:
    """Give a merged folder the chat template that stands in an exported adapter's tokenizer."""
    path = adapter / "tokenizer_config.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text, marked = known.get("chat_template"), read_marker(adapter) or {}
    if isinstance(text, str) and marked.get("template") != TOKENIZER:
        (target / TEMPLATE).write_text(text, encoding="utf-8")


def write_chat_files(run: RunFolder, target: Path) -> None:
    """Let a model folder's own tokenizer and `generate` follow the run's template.

    The chat template takes a file of its own, which transformers prefers to the tokenizer's; the
    files of the base stay as they are. Tokens that end an answer are added to those of the base.
    """
    tokenizer, name = tokenizer_of(run), run.info()["template"]
    if name != TOKENIZER and (text := hf_files.chat_template(name, tokenizer)) is not None:
        (target / TEMPLATE).write_text(text, encoding="utf-8")
    path = target / GENERATION
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    ends = {*get_template(name, tokenizer).stop_ids, tokenizer.eos_id}
    stated = known.get("eos_token_id", [])
    before: set[int] = set(stated) if isinstance(stated, list) else {stated}
    if not ends <= before:
        ids = sorted(ends | before)
        _write_json(path, known | {"eos_token_id": ids[0] if len(ids) == 1 else ids})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, ensure_ascii=False, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
