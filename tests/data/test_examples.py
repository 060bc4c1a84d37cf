"""Rows to examples: what is cut, dropped and named, by each rule of the recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, processors

from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.examples import encode_rows, usable_rows
from raytune_ft.data.report import Report, new_report
from raytune_ft.data.tokenizing import fast
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError
from tests.data.conftest import chat, write_jsonl
from tests.data.feeds import open_rows

LIMIT = 64
ROWS: list[list[dict[str, str]]] = [
    chat("red", "blue"),
    chat("stone " * 160, "blue"),
    chat("red", "river " * 160),
    chat("red", ""),
]
"""Short, a question over the limit, an answer over the limit, no answer."""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages} for messages in ROWS])


def used(
    path: Path, tokenizer: TextTokenizer, **data: Any
) -> tuple[list[Example | None], list[Example], Report]:
    """The rows that are used, all of them uncut, and the report."""
    source, encoder, _ = open_rows(path, tokenizer, max_length=LIMIT, **data)
    whole = dataclasses.replace(
        encoder, data=encoder.data.model_copy(update={"over_length": "split"})
    )
    numbers = range(len(source))
    report = new_report(len(source))
    found = usable_rows(source, encoder, numbers, encode_rows(source, encoder, numbers), report)
    uncut = [each for each in encode_rows(source, whole, numbers) if isinstance(each, Example)]
    return found, uncut, report


def test_a_question_over_the_limit_leaves_no_row_of_masked_labels(
    path: Path, tokenizer: TextTokenizer
) -> None:
    found, _, report = used(path, tokenizer, over_length="cut")
    assert [example is not None for example in found] == [True, False, True, False]
    assert all(example.n_targets > 0 for example in found if example is not None)
    assert report["dropped"] == {"without a trained token": 1, "empty": 1}
    assert report["places"]["without a trained token"] == [f"{path}:2"]
    assert report["places"]["cut"] == [f"{path}:3"]


def test_cut_columns_are_a_prefix_of_the_whole_and_of_one_length(
    path: Path, tokenizer: TextTokenizer
) -> None:
    found, uncut, _ = used(path, tokenizer, over_length="cut")
    cut = found[2]
    assert cut is not None
    assert cut.input_ids.shape == cut.labels.shape == (LIMIT,)
    assert cut.input_ids.tolist() == uncut[2].input_ids[:LIMIT].tolist()
    assert cut.labels.tolist() == uncut[2].labels[:LIMIT].tolist()
    assert cut.uncut_length == len(uncut[2].input_ids) > LIMIT


@pytest.mark.parametrize(
    ("over_length", "kept", "dropped"),
    [
        ("drop", [0], {"over max_length": 2, "empty": 1}),
        ("split", [0, 1, 2], {"empty": 1}),
        ("cut", [0, 2], {"without a trained token": 1, "empty": 1}),
    ],
)
def test_each_rule_for_long_rows_is_followed_and_counted(
    path: Path,
    tokenizer: TextTokenizer,
    over_length: str,
    kept: list[int],
    dropped: dict[str, int],
) -> None:
    found, _, report = used(path, tokenizer, over_length=over_length)
    assert [n for n, example in enumerate(found) if example is not None] == kept
    assert report["dropped"] == dropped
    assert report["used"] == len(kept)
    assert report["tokens"] == sum(len(e.input_ids) for e in found if e is not None)
    assert report["targets"] == sum(e.n_targets for e in found if e is not None)


def test_a_long_row_can_be_an_error_that_says_what_to_do(
    path: Path, tokenizer: TextTokenizer
) -> None:
    with pytest.raises(DataError) as caught:
        used(path, tokenizer, over_length="error")
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and "\n" not in message
    assert message.endswith("raise it, or set data.over_length to cut, split or drop")


def test_an_end_token_that_is_the_padding_token_too_is_learned(
    path: Path, tokenizer: TextTokenizer
) -> None:
    """Labels come from places; masking every id that pads would teach the model never to stop."""
    assert tokenizer.named_tokens["pad_token"] == tokenizer.named_tokens["eos_token"]
    found, _, _ = used(path, tokenizer)
    example = found[0]
    assert example is not None
    assert example.labels[example.labels != IGNORE_INDEX][-1] == tokenizer.eos_id


@pytest.mark.parametrize("switch", ["0", "1"])
def test_a_tokenizer_that_adds_its_start_puts_no_second_one(
    tokenizer: TextTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    monkeypatch.setenv(fast.SWITCH, switch)
    backend = Tokenizer.from_str(tokenizer.spec.tokenizer_json)
    backend.add_special_tokens(["<s>"])
    start = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", start)]
    )
    assert backend.encode("a").ids[0] == start
    source = "{{ bos_token }}" + (tokenizer.chat_template or "")
    named = {**tokenizer.named_tokens, "bos_token": "<s>"}
    own = TextTokenizer(
        dataclasses.replace(
            tokenizer.spec, tokenizer_json=backend.to_str(), bos_ids=(start,),
            named_tokens=tuple(sorted(named.items())), chat_template=source,
        )
    )  # fmt: skip
    rows = [{"messages": chat("red", "blue", "a", "b")}, {"messages": chat("x", "y")}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    for template, starts in (("tokenizer", [1, 1]), ("default", [2, 1])):
        opened, encoder, _ = open_rows(file, own, max_length=LIMIT)
        encoder = dataclasses.replace(encoder, template=template)
        for number, expected in enumerate(starts):
            (example,) = encode_rows(opened, encoder, [number])
            assert isinstance(example, Example)
            assert np.count_nonzero(example.input_ids == start) == expected
            assert example.input_ids[0] == start
