"""Metrics of answers against definitions written down again, and for scripts without spaces."""

from __future__ import annotations

import importlib.util
from collections import Counter
from typing import Any

import pytest

from raytune_ft.errors import RecipeError
from raytune_ft.training.evaluating import answer_metrics
from raytune_ft.training.evaluating.answer_metrics import WORD, check_installed, score

WANTED = ["The red river is deep.", "seven green stones", "红色的河很深", ""]
ANSWERS = ["the  red river\nis deep.", "green stones and seven", "红河很深", "x"]


def chrf_by_hand(answers: list[str], wanted: list[str]) -> float:
    """chrF2 of Popović 2015: F, recall twice as heavy, of means over orders 1 to 6."""
    precisions, recalls = [], []
    for n in range(1, 7):
        same = written = asked = 0
        for answer, text in zip(answers, wanted, strict=True):
            a, w = ("".join(words.split()) for words in (answer, text))
            grams = [Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (a, w)]
            same += sum((grams[0] & grams[1]).values())
            # sacrebleu counts nothing written where the reference has no such n-gram
            written += sum(grams[0].values()) if grams[1] else 0
            asked += sum(grams[1].values())
        precisions.append(same / max(1, written))
        recalls.append(same / max(1, asked))
    precision, recall = sum(precisions) / 6, sum(recalls) / 6
    return 100 * 5 * precision * recall / (4 * precision + recall)


def rouge_by_hand(answers: list[str], wanted: list[str]) -> float:
    """F1 of the longest common subsequence of words, Lin 2004."""
    found = []
    for answer, text in zip(answers, wanted, strict=True):
        a, w = WORD.findall(answer.lower()), WORD.findall(text.lower())
        table = [[0] * (len(w) + 1) for _ in range(len(a) + 1)]
        for i, left in enumerate(a):
            for j, right in enumerate(w):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if left == right else max(table[i][j + 1], table[i + 1][j])
                )
        common = table[-1][-1]
        found.append(2 * common / (len(a) + len(w)) if common else 0.0)
    return 100 * sum(found) / len(found)


def test_each_metric_is_its_definition() -> None:
    found = score(["exact_match", "chrf", "rouge"], ANSWERS, WANTED)
    assert found["val_exact_match"] == 25.0, "neither case nor white space counts"
    assert found["val_chrf"] == pytest.approx(chrf_by_hand(ANSWERS, WANTED), abs=1e-9)
    assert found["val_rouge"] == pytest.approx(rouge_by_hand(ANSWERS, WANTED), abs=1e-9)


@pytest.mark.parametrize(
    "text", ["红色的河很深", "川はとても深い", "강은 매우 깊다", "Глубокая река"]
)
def test_the_right_answer_is_right_in_every_script(text: str) -> None:
    """rouge-score's own tokenizer would give 0."""
    found = score(["exact_match", "chrf", "rouge"], [text], [text])
    assert all(value == pytest.approx(100.0) for value in found.values())
    half = score(["rouge"], [text[: len(text) // 2]], [text])["val_rouge"]
    assert 0.0 <= half < 100.0
    assert len(WORD.findall("红色 river 河")) == 4


def test_a_missing_library_is_one_line_that_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in ("sacrebleu", "rouge_score") else real(name, *rest)

    monkeypatch.setattr(answer_metrics, "find_spec", without)
    with pytest.raises(RecipeError, match=r"'chrf' needs sacrebleu; pip install 'raytune_ft\[eval"):
        check_installed(["exact_match", "chrf"])
    check_installed(["exact_match"])
    monkeypatch.undo()
    check_installed(["exact_match", "chrf", "rouge"])
