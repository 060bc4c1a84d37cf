"""MMLU: five-shot questions as they stand in, accuracies by subject, subcategory and category out.

Rows are {input, output, subject}: a whole prompt, one of A to D, a subject of the benchmark. The
model answers with the likeliest of the four letters' tokens behind the prompt, without template.
Subjects: github.com/hendrycks/test, categories.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.config.schema import DataSection, Source
from raytune_ft.data.files import locate
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError, RecipeError
from raytune_ft.model.loss import causal_model
from raytune_ft.training.engine import rank, world_size

LETTERS = "ABCD"
CATEGORIES: Mapping[str, Mapping[str, str]] = {
    "STEM": {
        "physics": "astronomy college_physics conceptual_physics high_school_physics",
        "chemistry": "college_chemistry high_school_chemistry",
        "biology": "college_biology high_school_biology",
        "computer science": "college_computer_science computer_security "
        "high_school_computer_science machine_learning",
        "math": "abstract_algebra college_mathematics elementary_mathematics "
        "high_school_mathematics high_school_statistics",
        "engineering": "electrical_engineering",
    },
    "humanities": {
        "history": "high_school_european_history high_school_us_history "
        "high_school_world_history prehistory",
        "philosophy": "formal_logic logical_fallacies moral_disputes moral_scenarios philosophy "
        "world_religions",
        "law": "international_law jurisprudence professional_law",
    },
    "social sciences": {
        "politics": "high_school_government_and_politics public_relations security_studies "
        "us_foreign_policy",
        "culture": "human_sexuality sociology",
        "economics": "econometrics high_school_macroeconomics high_school_microeconomics",
        "geography": "high_school_geography",
        "psychology": "high_school_psychology professional_psychology",
    },
    "other": {
        "other": "global_facts miscellaneous professional_accounting",
        "business": "business_ethics management marketing",
        "health": "anatomy clinical_knowledge college_medicine human_aging medical_genetics "
        "nutrition professional_medicine virology",
    },
}
"""Category -> subcategory -> its subjects."""
PLACES: Mapping[str, tuple[str, str]] = {
    subject: (category, subcategory)
    for category, parts in CATEGORIES.items()
    for subcategory, subjects in parts.items()
    for subject in subjects.split()
}
"""Subject -> (category, subcategory)."""
_SUBJECTS = sorted(PLACES)
_PROGRESS_EVERY = 50

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Question:
    """One prompt; `answer` is 0 to 3."""

    prompt: str
    answer: int
    subject: str


@dataclass(frozen=True)
class Benchmark:
    """The questions of one file; `name` goes in front of its figures."""

    name: str
    questions: Sequence[Question]


def absolute(paths: Sequence[str]) -> list[str]:
    """Return the files' absolute paths, for other processes; RecipeError for one not here."""
    found = []
    for index, path in enumerate(paths):
        file = locate.local_path(path)
        if file is None or not file.is_file():
            raise RecipeError(
                f"chat_eval.mmlu[{index}]: no file {path}; write rows {{input, output, subject}} "
                "there, or take it out of the list"
            )
        found.append(str(file.resolve()))
    return found


def read_benchmark(path: str) -> Benchmark:
    """Read a file of questions; DataError names the first row that is none."""
    questions = []
    for reader in locate.open_all(Source(path=path), "chat_eval.mmlu"):
        for number, row in enumerate(reader.read(range(len(reader)))):
            if isinstance(row, DataError):
                raise row
            questions.append(_question(row, reader.where(number)))
    return Benchmark(benchmark_name(path), questions)


def benchmark_name(path: str) -> str:
    """Name a file's figures as XTuner does: five_shot_mmlu_val.json gives mmlu_fs_val."""
    stem = Path(path).stem
    return stem.replace("five_shot_mmlu", "mmlu_fs", 1)


def evaluate(
    model: nn.Module,
    tokenizer: TextTokenizer,
    benchmark: Benchmark,
    data: DataSection,
    device: torch.device,
    progress: Progress,
) -> dict[str, Any]:
    """Answer all questions, each rank its share; every rank returns the same figures.

    Returns:
        `questions`, `cut` (prompts that lost tokens), `average`, the mean over subjects, and
        `subjects`, `subcategories`, `categories`: name -> accuracy in percent, of its questions.
    """
    letters = letter_ids(tokenizer)
    model.eval()
    total, ranks = len(benchmark.questions), world_size()
    counts = torch.zeros(len(_SUBJECTS) + 1, 2, dtype=torch.int64, device=device)
    # sharded weights are gathered by all ranks at once, so each runs as often as the others
    for place in range(rank(), -(-total // ranks) * ranks, ranks):
        question = benchmark.questions[place % total]
        ids, cut = prompt_ids(question.prompt, tokenizer, data, context_of(model))
        right = choose(model, ids, letters, device) == question.answer
        if place < total:
            counts[_SUBJECTS.index(question.subject)] += torch.tensor([right, 1], device=device)
            counts[-1, 0] += cut
        if place % _PROGRESS_EVERY == 0:
            progress(place, total)
    if ranks > 1:
        dist.all_reduce(counts)
    *by_subject, (n_cut, _) = counts.tolist()
    right_of = {name: (n, of) for name, (n, of) in zip(_SUBJECTS, by_subject, strict=True) if of}
    return {"questions": total, "cut": n_cut, **figures(right_of)}


def figures(right_of: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Turn subject -> (right answers, questions) into accuracies in percent."""
    pools: list[dict[str, list[int]]] = [{}, {}, {}]
    for subject, (right, of) in right_of.items():
        category, subcategory = PLACES[subject]
        for pool, name in zip(pools, (subject, subcategory, category), strict=True):
            counted = pool.setdefault(name, [0, 0])
            counted[0] += right
            counted[1] += of
    subjects, subcategories, categories = (
        {name: 100 * right / of for name, (right, of) in pool.items()} for pool in pools
    )
    return {
        "average": sum(subjects.values()) / len(subjects),
        "categories": categories,
        "subcategories": subcategories,
        "subjects": subjects,
    }


def choose(
    model: nn.Module, ids: Sequence[int], letters: Sequence[int], device: torch.device
) -> int:
    """Return which of `letters`, four token ids, is likeliest behind `ids`: 0 to 3."""
    with torch.no_grad():
        inputs = torch.tensor([list(ids)], device=device)
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[0, -1]
    return int(logits[list(letters)].float().argmax())


def letter_ids(tokenizer: TextTokenizer) -> list[int]:
    """Return the first id of each letter, or the last where all begin with the same space."""
    ids = [tokenizer.encode(letter) for letter in LETTERS]
    firsts = [id_[0] for id_ in ids]
    return firsts if len(set(firsts)) == len(LETTERS) else [id_[-1] for id_ in ids]


def prompt_ids(
    prompt: str, tokenizer: TextTokenizer, data: DataSection, context: int | None
) -> tuple[list[int], bool]:
    """Tokenise a prompt behind the start ids; say whether it had to be cut.

    The question stands at the end, so what is beyond the model's `context` goes from the left:
    the first examples. XTuner v0.1.9 cuts the question off, at `max_length`; so does
    `data.compat`.
    """
    start = list(tokenizer.bos_ids)
    if data.compat is not None:
        whole = [*start, *tokenizer.encode(prompt)]
        return whole[: data.max_length], len(whole) > data.max_length
    ids = tokenizer.encode(prompt, [(0, len(prompt))])
    room = len(ids) if context is None else context - len(start)
    return [*start, *ids[-room:]], len(ids) > room


def context_of(model: nn.Module) -> int | None:
    """Return how many positions a model has, if its configuration says so."""
    config = causal_model(model).config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def _question(row: Mapping[str, Any], where: str) -> Question:
    for column in ("input", "output", "subject"):
        if not isinstance(row.get(column), str) or not row[column]:
            raise DataError(
                f"{where}: no text in column '{column}'; MMLU rows are {{input, output, subject}}"
            )
    prompt, answer, subject = row["input"], row["output"], row["subject"]
    letter = answer.strip()
    if len(letter) != 1 or letter not in LETTERS:
        raise DataError(f"{where}: 'output' is '{answer[:20]}', not A, B, C or D; correct the row")
    if subject not in PLACES:
        near = difflib.get_close_matches(subject, PLACES, n=1, cutoff=0.6)
        hint = f"did you mean '{near[0]}'?" if near else "take the benchmark's names"
        raise DataError(f"{where}: no MMLU subject '{subject[:40]}'; {hint}")
    return Question(prompt, LETTERS.index(letter), subject)
