"""What a run does beside optimizing: answer prompts and MMLU, measure held-out loss, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.config.schema import Recipe
from raytune_ft.data.encode import encode_prompt
from raytune_ft.data.packing import Pack, collate
from raytune_ft.data.rows.formats import fill_text
from raytune_ft.data.templating.templates import Template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.model.generate import stream_ids
from raytune_ft.training import checkpoint, data_record, mmlu
from raytune_ft.training.batching import to_tensors
from raytune_ft.training.checkpoint import TrainState
from raytune_ft.training.engine import Engine, rank, world_size
from raytune_ft.training.loop import Emit, Hooks
from raytune_ft.training.mmlu import Benchmark
from raytune_ft.training.run_folder import RunFolder


@dataclass(frozen=True)
class Voice:
    """Everything needed to ask the model in training a question."""

    model: nn.Module
    tokenizer: TextTokenizer
    template: Template

    def answer(self, prompt: str, system: str, max_new_tokens: int) -> str:
        """Answer one prompt greedily, so that two runs can be compared."""
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        ids = stream_ids(
            self.model,
            encode_prompt(messages, self.template, self.tokenizer),
            stop_ids=self.template.stop_ids,
            max_new_tokens=max_new_tokens,
            temperature=0.0,
        )
        return self.tokenizer.decode(list(ids)).strip()


def build_hooks(
    engine: Engine,
    recipe: Recipe,
    folder: RunFolder,
    voice: Voice,
    validation: Callable[[], Iterable[Pack]] | None,
    emit: Emit,
) -> Hooks:
    """Bind the hooks of a run to its engine and folder."""

    def sample(step: int, when: str) -> None:
        if rank() == 0:
            _sample(recipe, voice, step, when, emit)

    def validate(_step: int) -> dict[str, float] | None:
        if validation is None:
            return None
        loss = held_out_loss(engine, validation())
        return {"val_loss": loss, "val_perplexity": math.exp(min(loss, 700.0))}

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
        for questions in benchmarks:
            _benchmark(engine, recipe, voice, questions, step, emit)

    return Hooks(sample, validate, benchmark, record, save, interrupted=lambda: False)


def held_out_loss(engine: Engine, packs: Iterable[Pack]) -> float:
    """Mean loss per labelled token over held-out packs; every rank computes the same number."""
    engine.module.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for pack in packs:
            loss_sum, n_targets = engine.module(**engine.put(to_tensors(collate([pack]))))
            total += float(loss_sum)
            count += int(n_targets)
    return total / max(1, count)


def _benchmark(
    engine: Engine, recipe: Recipe, voice: Voice, questions: Benchmark, step: int, emit: Emit
) -> None:
    found = mmlu.evaluate(
        voice.model,
        voice.tokenizer,
        questions,
        recipe.data,
        engine.device,
        lambda done, total: emit("stage", name="mmlu", done=done, total=total, step=step),
    )
    emit("mmlu", step=step, name=questions.name, **found)


def _sample(recipe: Recipe, voice: Voice, step: int, when: str, emit: Emit) -> None:
    prompts = recipe.chat_eval.prompts
    system = recipe.data.system if recipe.chat_eval.system is None else recipe.chat_eval.system
    for index, prompt in enumerate(prompts):
        emit("stage", name="samples", done=index, total=len(prompts), step=step)
        question = fill_text(prompt, recipe.data.fill)
        answer = voice.answer(
            question, fill_text(system, recipe.data.fill), recipe.chat_eval.max_new_tokens
        )
        emit("sample", step=step, when=when, prompt=question, answer=answer)
