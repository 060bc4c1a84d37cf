"""Questions: held-out rows in; the prompt of each row's last trained turn and its answer out.

The prompt is the row's own ids up to that turn, so it is what training saw and what chat sends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from raytune_ft.data.encode import IGNORE_INDEX, Example
from raytune_ft.data.examples import Encoder, encode_rows
from raytune_ft.data.sources import RowSource
from raytune_ft.errors import DataError

ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Question:
    """A held-out row as something to ask."""

    row: int
    """Its number among the held-out rows."""
    prompt: list[int]
    """Ids of all that stands before the answer."""
    answer: str
    """What the row answers."""


def held_out_questions(source: RowSource, encoder: Encoder, n_questions: int) -> list[Question]:
    """Take the first held-out rows, in their order, that can be asked.

    Rows that training would leave out, because they are unusable or have no answer, are passed
    over as there.

    Args:
        source: held-out rows.
        encoder: the recipe's.
        n_questions: at most so many.

    Raises:
        DataError: a row is text without a question; names it. Or there is no row.
    """
    # whole rows: the end of an answer is needed, wherever training would cut or divide it
    uncut = replace(encoder, data=encoder.data.model_copy(update={"over_length": "split"}))
    questions: list[Question] = []
    for start in range(0, len(source), ROWS_AT_ONCE):
        numbers = np.arange(start, min(start + ROWS_AT_ONCE, len(source)))
        found = encode_rows(source, uncut, numbers)
        for number, example in zip(numbers.tolist(), found, strict=True):
            if isinstance(example, Example) and example.n_targets:
                asked = _question(number, example, encoder, source.where(number))
                # of a longer one training sees the question alone, and leaves it out
                if len(asked.prompt) < encoder.data.max_length:
                    questions.append(asked)
            if len(questions) == n_questions:
                return questions
    if not questions:
        raise DataError("data.validation: no row has an answer to compare with; drop eval.metrics")
    return questions


def _question(number: int, example: Example, encoder: Encoder, where: str) -> Question:
    trained = example.labels != IGNORE_INDEX
    last = int(np.flatnonzero(trained)[-1])
    before = np.flatnonzero(~trained[:last])
    start = int(before[-1]) + 1
    # a label at index 1 means that only the start id stands before: text, not an answer
    if start <= 1:
        raise DataError(
            f"{where}: text to learn as a whole, without a question that eval.metrics could ask; "
            "name held-out conversations in data.validation, or drop eval.metrics"
        )
    ids = example.input_ids[start : last + 1].tolist()
    stops = encoder.bound_template.stop_ids | {encoder.tokenizer.eos_id}
    end = next((place for place, id_ in enumerate(ids) if id_ in stops), len(ids))
    answer = encoder.tokenizer.decode(ids[:end]).strip()
    return Question(number, example.input_ids[:start].tolist(), answer)
