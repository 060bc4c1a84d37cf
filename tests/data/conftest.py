"""Parts of the data tests: a tokenizer without a model, and rows on disk."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from raytune_ft.config.schema import DataSection, Source
from raytune_ft.data.encode import Example
from raytune_ft.data.packing import Pack, Pieces, WindowTokens
from raytune_ft.data.rows.formats import to_conversation
from raytune_ft.data.segments import Conversation
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from tests.conftest import WORDS, make_tokenizer

# Timings on a shared machine say nothing about correctness.
settings.register_profile("data", deadline=None, max_examples=50)
settings.load_profile("data")

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer(tokenizer_folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(tokenizer_folder)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_row(
    row: Mapping[str, Any],
    name: str | None = None,
    *,
    where: str = "row",
    own_system: str | None = None,
    columns: Mapping[str, str] | None = None,
    loss: str = "assistant",
    **data: Any,
) -> Conversation | None:
    """Read one row as a recipe with these settings would; `own_system` is its source's."""
    source = Source.model_validate(
        {
            "path": "rows.jsonl",
            "map": name,
            "system": own_system,
            "columns": dict(columns or {}),
            "loss": loss,
        }
    )
    section = DataSection.model_validate({"sources": [source], **data})
    return to_conversation(row, source, section, where)


def chat(*texts: str, system: str = "") -> list[dict[str, str]]:
    """Make a conversation: question, answer, question, ..."""
    first = [{"role": "system", "content": system}] if system else []
    roles = ("user", "assistant")
    return [*first, *({"role": roles[i % 2], "content": t} for i, t in enumerate(texts))]


def join_examples(
    examples: Sequence[Example], row_ids: Sequence[int], *, isolated: bool = True
) -> Pack:
    """Lay whole examples end to end in one pack."""
    tokens = WindowTokens.of(examples)
    sizes = tokens.lengths
    whole = np.stack([np.arange(len(sizes)), np.zeros_like(sizes), sizes], axis=1)
    laid = Pieces(whole, np.array([0, len(sizes)]))
    (pack,) = tokens.packs(laid, np.array(row_ids, dtype=np.int64), isolated=isolated)
    return pack


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Rows of every fate."""
    long_question, long_answer = "stone " * 160, "river " * 160
    rows: list[dict[str, Any]] = [
        {"messages": chat("Q", "A")},
        {"messages": chat("Q", " ")},
        {"messages": chat(long_question, "A")},
        {"messages": chat("Q", long_answer)},
        {"messages": chat("Q")},
        {"texts": "x"},
    ]
    return write_jsonl(tmp_path / "mixed.jsonl", rows * 7)


@pytest.fixture(scope="session")
def varied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty conversations of all lengths; no two rows share a question, a few are very long."""
    random = np.random.default_rng(4)

    def words(most: int) -> str:
        return " ".join(random.choice(WORDS, int(random.integers(1, most))).tolist())

    def turns(number: int) -> list[dict[str, str]]:
        most = 250 if number % 5 == 0 else 8
        texts = [words(most) for _ in range(2 * int(random.integers(1, 4)))]
        return chat(f"{number}: {texts[0]}", *texts[1:])

    path = tmp_path_factory.mktemp("varied") / "varied.jsonl"
    return write_jsonl(path, [{"messages": turns(number)} for number in range(40)])
