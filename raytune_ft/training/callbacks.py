"""What a run does beside optimizing: answer prompts and MMLU, measure held-out rows, save."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch.distributed as dist

from raytune_ft.config.schema import Recipe
from raytune_ft.data.encode import encode_prompt
from raytune_ft.data.packing import Pack
from raytune_ft.data.questions import Question
from raytune_ft.data.rows.formats import fill_text
from raytune_ft.model.answers import Drawing
from raytune_ft.training.engine import Engine, rank, world_size
from raytune_ft.training.evaluating import answer_metrics, mmlu
from raytune_ft.training.evaluating.answering import Voice
from raytune_ft.training.evaluating.mmlu import Benchmark
from raytune_ft.training.evaluating.validation import held_out_figures
from raytune_ft.training.loop import Emit, Hooks
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.saving import checkpoint
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.watching import data_record

FIRST_TOKENS = 50
"""Longest answer before training, as in XTuner v0.1.9: an untrained model may never end."""


def build_hooks(
    engine: Engine,
    recipe: Recipe,
    folder: RunFolder,
    voice: Voice,
    validation: Callable[[], Iterable[Pack]] | None,
    emit: Emit,
    questions: Sequence[Question] = (),
) -> Hooks:
    """Bind the hooks of a run to its engine and folder."""

    def sample(step: int, when: str) -> None:
        ask_prompts(recipe, voice, step, when, emit)

    def validate(step: int) -> dict[str, float] | None:
        if validation is None:
            return None
        emit("stage", name="validation", step=step)
        batch_tokens = recipe.train.micro_batch_size * recipe.data.max_length
        measured = held_out_figures(engine, validation(), batch_tokens)
        return {**measured, **ask_questions(recipe, voice, questions, step, emit)}

    def record(state: TrainState, steps: int) -> None:
        if rank() == 0:
            data_record.write(folder, state, recipe.data.max_length, steps)

    def save(state: TrainState) -> None:
        weights, optimizer = engine.weights(), engine.optimizer_state()
        if rank() == 0:
            emit("stage", name="checkpoint", step=state.step)
            checkpoint.save(
                folder.checkpoints, state, weights, optimizer, keep=recipe.checkpoint.keep
            )
        if world_size() > 1:
            dist.barrier()

    benchmarks = [mmlu.read_benchmark(path) for path in recipe.chat_eval.mmlu]

    def benchmark(step: int) -> None:
        for known in benchmarks:
            _benchmark(engine, recipe, voice, known, step, emit)

    return Hooks(sample, validate, benchmark, record, save, interrupted=lambda: False)


def ask_prompts(recipe: Recipe, voice: Voice, step: int, when: str, emit: Emit) -> None:
    """Answer the recipe's prompts, greedily and, if it says so, by drawing; emit each answer."""
    wanted = recipe.chat_eval
    if not wanted.prompts:
        return
    system = fill_text(
        recipe.data.system if wanted.system is None else wanted.system, recipe.data.fill
    )
    prompts = [fill_text(prompt, recipe.data.fill) for prompt in wanted.prompts]
    ids = [_encoded(prompt, system, voice) for prompt in prompts]
    longest = wanted.max_new_tokens
    if when == "before":
        longest = min(longest, FIRST_TOKENS)
    seeds: list[int | None] = [None] * len(prompts)
    kinds = ["greedy"] * len(prompts)
    if wanted.temperature > 0.0:  # beside the greedy ones: a batch takes little longer
        seeds += [seed_of(recipe.train.seed, step, place) for place in range(len(prompts))]
        kinds += ["sampled"] * len(prompts)
    emit("stage", name="samples", done=0, total=len(kinds), step=step)
    times = len(kinds) // len(prompts)
    drawing = Drawing(wanted.temperature, wanted.top_p)
    answers = voice.answer(ids * times, longest, drawing, seeds)
    for prompt, kind, answer in zip(prompts * times, kinds, answers, strict=True):
        emit(
            "sample", step=step, when=when, prompt=prompt, answer=voice.text(answer),
            kind=kind, tokens=len(answer.ids), stopped=answer.stopped,
        )  # fmt: skip


def seed_of(seed: int, step: int, place: int) -> int:
    """Return the seed of one drawn answer: a run taken up again draws the same."""
    return ((seed * 1_000_003 + step) * 8_191 + place) % 2**63


def ask_questions(
    recipe: Recipe, voice: Voice, questions: Sequence[Question], step: int, emit: Emit
) -> dict[str, float]:
    """Answer held-out rows and compare; emit each answer, return the metrics in percent."""
    metrics = recipe.eval.metrics
    if not metrics or not questions:
        return {}
    emit("stage", name="questions", done=0, total=len(questions), step=step)
    found = voice.answer([asked.prompt for asked in questions], recipe.eval.max_new_tokens)
    texts = [voice.text(answer) for answer in found]
    for asked, answer, text in zip(questions, found, texts, strict=True):
        emit(
            "evaluation", step=step, row=asked.row, prompt=_spelled(voice, asked.prompt),
            wanted=asked.answer, answer=text, tokens=len(answer.ids), stopped=answer.stopped,
        )  # fmt: skip
    return answer_metrics.score(metrics, texts, [asked.answer for asked in questions])


def _encoded(prompt: str, system: str, voice: Voice) -> list[int]:
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    return encode_prompt(messages, voice.template, voice.tokenizer)


def _spelled(voice: Voice, ids: Sequence[int]) -> str:
    return voice.tokenizer.decode(list(ids), skip_special_tokens=False)


def _benchmark(
    engine: Engine, recipe: Recipe, voice: Voice, questions: Benchmark, step: int, emit: Emit
) -> None:
    with engine.whole():
        found = mmlu.evaluate(
            voice.model,
            voice.tokenizer,
            questions,
            recipe.data,
            engine.device,
            lambda done, total: emit("stage", name="mmlu", done=done, total=total, step=step),
        )
    emit("mmlu", step=step, name=questions.name, **found)
