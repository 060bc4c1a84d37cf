"""One training process, from a job description to a trained adapter in the run folder.

The caller says where packs come from and where events go, so this runs inside a Ray Train
worker, inside a Ray Tune trial and in a plain test alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import Pack, Position
from raytune_ft.data.places import Placed
from raytune_ft.data.questions import Question
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing import hf_files
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import CheckpointError
from raytune_ft.model import adapter, fast, side_files
from raytune_ft.training import course, elastic, layouts, micro_graph
from raytune_ft.training.ahead import device_of
from raytune_ft.training.batching import TensorBatch, steps
from raytune_ft.training.build import build_engine
from raytune_ft.training.callbacks import build_hooks
from raytune_ft.training.engine import Engine, rank, world_size
from raytune_ft.training.evaluating import best
from raytune_ft.training.evaluating.answering import Voice
from raytune_ft.training.guarding import dry_step
from raytune_ft.training.guarding.exclusive import only_writer
from raytune_ft.training.guarding.guards import Guards, guarded, starting
from raytune_ft.training.guarding.room import Room
from raytune_ft.training.loop import Emit, train
from raytune_ft.training.run_folder import Event, RunFolder
from raytune_ft.training.saving import checkpoint, durable, identity
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.saving.load_from import Begin
from raytune_ft.training.watching.recording import recorded

PackStream = Callable[[Position], Iterator[Placed]]


@dataclass(frozen=True)
class Job:
    """What a worker is told; plain values, so that it travels to any node."""

    recipe: dict[str, Any]
    run_path: str
    model_folder: str
    expected_steps: int
    """Optimizer steps of the run, as far as they can be told before it."""
    counted: bool = False
    """Whether that is their exact number and the learning rate goes by it."""
    sure: bool = False
    """Whether that is their exact number, whatever the learning rate goes by."""
    sharing: int = 1
    """Training processes that share one machine's cores."""
    data_fingerprint: str = ""
    """Of the training rows; a checkpoint goes on with the same ones only."""
    questions: tuple[Question, ...] = ()
    """Held-out rows that are answered for `eval.metrics`."""
    begin: Begin | None = None
    """Trained weights that the run begins with."""
    gpu_share: float = 1.0
    """Part of a GPU that each process may use."""
    base: str = ""
    """What the result calls the model's folder, where it is loaded from another one."""


def run(
    job: Job,
    packs: PackStream,
    validation: Callable[[], Iterable[Pack]] | None,
    show: Callable[[Event], None],
    guards: Guards = Guards(),  # noqa: B008, frozen
) -> TrainState:
    """Load, resume if there is a checkpoint, train, and write the result.

    Raises:
        CheckpointError: another process trains this run, or its checkpoint is of another recipe.
        MemoryPlanError: the longest batch does not fit into memory.
        Interrupted: `guards` said so; the checkpoint of the last step is written.
    """
    recipe, folder = Recipe.model_validate(job.recipe), RunFolder(job.run_path)
    with (
        only_writer(folder.path, wanted=rank() == 0),
        recorded(folder, recipe, show) as emit,
        starting(guards, folder, device_of(job.sharing)) as watched,
    ):
        return _run(job, packs, validation, emit, watched)


def _run(
    job: Job,
    packs: PackStream,
    validation: Callable[[], Iterable[Pack]] | None,
    emit: Emit,
    guards: Guards,
) -> TrainState:
    folder, device = RunFolder(job.run_path), device_of(job.sharing)

    def tell(text: str) -> None:
        emit("warning", text=text)

    asked = Recipe.model_validate(job.recipe)
    here = elastic.shared_out(asked, world_size())
    if here is not asked:
        tell(elastic.line(asked, here))
    choice = layouts.settled(
        here, folder, Path(job.model_folder), device, tell, share=job.gpu_share
    )
    room = Room.of(here, folder.path, tell, choice)
    recipe = room.fitting()

    emit("stage", name="load model")
    engine, model = build_engine(
        recipe, Path(job.model_folder), device,
        partial(_first_batches, packs, recipe if here is asked else asked),
        folder.path, job.begin, resident=room.is_resident, hosted=room.hosted,
        tell=tell,
    )  # fmt: skip
    if lines := fast.report_of(engine.module).lines():
        emit("fast_path", lines=lines)
    tokenizer = TextTokenizer.from_folder(
        job.model_folder, recipe.model.eos_token, recipe.model.new_tokens
    )
    voice = Voice(model, tokenizer, get_template(recipe.model.template, tokenizer), engine)
    state = resume(engine, folder, asked, job.data_fingerprint, emit)
    if dry_step.wanted(engine):
        emit("stage", name="dry step")
        dry_step.find_room(engine, room)
    micro_graph.attach(engine, room, tell)

    hooks = build_hooks(engine, recipe, folder, voice, validation, emit, job.questions)
    counted = job.expected_steps if job.counted else None
    known = job.expected_steps if job.counted or job.sure else None
    share, total, exact = 0.0, job.expected_steps, known is not None
    if state.step:
        share, total, exact = course.progress(state, counted, recipe, known)
        hooks.record(state, total)  # what is known by now goes before what was estimated again
    emit("stage", name="train", step=state.step, total=total, exact=exact, share=share)
    place = Position(state.epoch, state.window, state.pack)
    with (
        guarded(guards, hooks, engine, recipe, folder) as safe_hooks,
        closing(packs(place)) as stream,
    ):
        batches = steps(
            stream, room, rank=rank(), workers=world_size(), packs_per_step=asked.global_batch_size
        )
        train(engine, recipe, batches, state, counted, safe_hooks, emit, known, room)
    if recipe.eval.export == "best":
        best.put_back(engine, folder.checkpoints, state)
    with engine.whole():
        if rank() == 0:
            emit("stage", name="export")
            export(recipe, voice, folder, Path(job.model_folder), job.base)
    if rank() == 0:
        folder.update(**best.record(state, recipe.eval))
    return state


def resume(
    engine: Engine, folder: RunFolder, recipe: Recipe, data_fingerprint: str, emit: Emit
) -> TrainState:
    """Give an engine what the newest checkpoint of a run holds; return where the run goes on.

    Raises:
        CheckpointError: it is of another recipe or of other rows.
    """
    loaded = None
    if rank() == 0:
        for place in (folder.path, folder.checkpoints):
            durable.tidy(place)
        loaded = checkpoint.load_latest(folder.checkpoints, lambda text: emit("warning", text=text))
    step = _from_rank_0(loaded.state.step if loaded else 0)
    if step == 0:
        redone = folder.cut_after(0) if rank() == 0 else 0
        if redone:
            emit("resumed", step=0, redone=redone)
        return identity.new_state(recipe, data_fingerprint)
    loaded = loaded or checkpoint.load(folder.checkpoints / checkpoint.folder_name(step))
    identity.check(loaded.state, recipe, data_fingerprint, str(folder.path))
    redone = folder.cut_after(step) if rank() == 0 else 0
    engine.load(loaded.weights, loaded.optimizer)
    emit("resumed", step=step, redone=redone)
    return loaded.state


@contextmanager
def closing(stream: Iterator[Placed]) -> Iterator[Iterator[Placed]]:
    """End what makes packs ahead when training ends, however it ends."""
    try:
        yield stream
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()


def _from_rank_0(number: int) -> int:
    if world_size() == 1:
        return number
    cell = torch.tensor([number])
    if torch.cuda.is_available():
        cell = cell.cuda()
    dist.broadcast(cell, src=0)
    return int(cell.item())


def _first_batches(packs: PackStream, recipe: Recipe) -> list[TensorBatch]:
    """Return the micro-batches of the first step as one rank alone would have them."""
    with closing(packs(Position())) as stream:
        return next(steps(stream, recipe.train, rank=0, workers=1)).micro_batches


def export(
    recipe: Recipe, voice: Voice, folder: RunFolder, base: Path, base_name: str = ""
) -> None:
    """Write the result, whole or not at all; CheckpointError if the disk refuses.

    Args:
        recipe: that was trained.
        voice: with the trained model.
        folder: of the run.
        base: folder that the model was loaded from.
        base_name: what an adapter calls it, where that is another one.
    """
    is_adapter = recipe.model.method == "lora"
    target = folder.adapter if is_adapter else folder.model
    try:
        with durable.whole_folder(target) as place:
            if is_adapter:
                adapter.save_adapter(voice.model, place, base_name or str(base))
            else:
                side_files.save_full(voice.model, base, place)
            if recipe.model.new_tokens:
                template = hf_files.chat_template(recipe.model.template, voice.tokenizer)
                hf_files.write(voice.tokenizer, place, template)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{target}: cannot be written ({error}); the last checkpoint is unharmed: free space "
            f"on {checkpoint.mount_of(target)} and go on with --resume {folder.path}"
        ) from error
