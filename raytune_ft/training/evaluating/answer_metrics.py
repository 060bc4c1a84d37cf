"""Answer metrics: answers and what the rows answer in, percentages out.

chrF is sacrebleu's (Popović 2015), ROUGE-L the F1 of rouge-score's (Lin 2004); both are in the
extra `eval`. Exact match looks at neither case nor the amount of white space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec

from raytune_ft.errors import RecipeError

PACKAGES = {"chrf": "sacrebleu", "rouge": "rouge_score"}
WORD = re.compile(
    "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]|"
    "[^\\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]+"
)
"""A word, or one character of a script that puts no space between words; rouge-score's own
tokenizer knows a to z alone, and gives 0 for every Chinese answer."""


def check_installed(metrics: Sequence[str]) -> None:
    """Refuse metrics whose library is missing; RecipeError says how to install it."""
    for metric in metrics:
        package = PACKAGES.get(metric)
        if package is not None and find_spec(package) is None:
            raise RecipeError(
                f"eval.metrics: '{metric}' needs {package}; pip install 'raytune_ft[eval]', or "
                "take it out of the list"
            )


def score(
    metrics: Sequence[str], answers: Sequence[str], wanted: Sequence[str]
) -> dict[str, float]:
    """Return `val_METRIC` of each, in percent.

    Args:
        metrics: of `exact_match`, `chrf`, `rouge`.
        answers: at least one.
        wanted: the text of the row for each answer.
    """
    measure = {"exact_match": exact_match, "chrf": chrf, "rouge": rouge}
    return {f"val_{name}": measure[name](answers, wanted) for name in metrics}


def exact_match(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the share of answers that are the same text."""
    same = [_plain(a) == _plain(w) for a, w in zip(answers, wanted, strict=True)]
    return 100.0 * sum(same) / len(same)


def chrf(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Return sacrebleu's chrF2 of all answers together."""
    from sacrebleu.metrics.chrf import CHRF

    return float(CHRF().corpus_score(list(answers), [list(wanted)]).score)


def rouge(answers: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the mean F1 of ROUGE-L."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    found = [scorer.score(w, a)["rougeL"].fmeasure for a, w in zip(answers, wanted, strict=True)]
    return 100.0 * float(sum(found)) / len(found)


class _Words:
    """What rouge-score asks to cut a text into words."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())
