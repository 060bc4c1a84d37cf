"""Member: one adapter's run among several on one base, a step at a time.

What happens is `training.worker`'s: the same loop, folder, checkpoints and export. Only the engine
is one of several, and its owner lets the others take a step between two of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path

from raytune_ft.config.schema import Recipe
from raytune_ft.data.packing import Pack
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.model import fast
from raytune_ft.training import course
from raytune_ft.training.batching import StepData
from raytune_ft.training.callbacks import build_hooks
from raytune_ft.training.evaluating import best
from raytune_ft.training.evaluating.answering import Voice
from raytune_ft.training.guarding.exclusive import only_writer
from raytune_ft.training.guarding.guards import Guards, guarded
from raytune_ft.training.guarding.room import Room
from raytune_ft.training.loop import Emit, training
from raytune_ft.training.run_folder import Event, RunFolder
from raytune_ft.training.saving.checkpoint import TrainState
from raytune_ft.training.together.passes import SharedEngine
from raytune_ft.training.watching.recording import recorded
from raytune_ft.training.worker import Job, export, resume


class Member:
    """One adapter on its way; `go_on` while it sits in the base."""

    def __init__(
        self,
        job: Job,
        recipe: Recipe,
        engine: SharedEngine,
        validation: Callable[[], Iterable[Pack]] | None,
        show: Callable[[Event], bool],
        guards: Guards,
    ) -> None:
        """Take an adapter's job.

        Args:
            job: of its run.
            recipe: the job's, in the layout of the group.
            engine: of its adapter.
            validation: held-out packs.
            show: is told each event; False: the adapter is given up behind its step.
            guards: of this process.
        """
        self.job, self.recipe, self.engine = job, recipe, engine
        self.folder = RunFolder(job.run_path)
        self.state = TrainState()
        self.steps: Iterator[StepData] = iter(())
        """Its data from `state` on; to be set behind the first `go_on`."""
        self.is_given_up = False
        self._validation, self._show, self._guards = validation, show, guards
        self._course = self._run()

    @property
    def has_ended(self) -> bool:
        """Whether no step is left."""
        return course.ended(self.state, self.recipe)

    def go_on(self) -> bool:
        """Resume at the first call, take a step at each later one; False at the run's end.

        Raises:
            RaytuneError: what ends this run, as if it were alone.
        """
        return next(self._course, None) is not None

    def give_up(self, why: BaseException) -> None:
        """End the run where it is; its record closes as for `why`, which is raised."""
        self._course.throw(why)

    def _run(self) -> Generator[TrainState, None, None]:
        engine, recipe, folder, job = self.engine, self.recipe, self.folder, self.job
        with only_writer(folder.path), recorded(folder, recipe, self._told) as emit:
            if lines := fast.report_of(engine.module).lines():
                emit("fast_path", lines=lines)
            tokenizer = TextTokenizer.from_folder(job.model_folder, recipe.model.eos_token)
            template = get_template(recipe.model.template, tokenizer)
            voice = Voice(engine.module.model, tokenizer, template, engine)  # type: ignore[arg-type]
            state = self.state = resume(engine, folder, recipe, job.data_fingerprint, emit)
            yield state
            yield from self._steps(voice, emit)
            if recipe.eval.export == "best":
                best.put_back(engine, folder.checkpoints, state)
            emit("stage", name="export")
            export(recipe, voice, folder, Path(job.model_folder), job.base)
            folder.update(**best.record(state, recipe.eval))

    def _steps(self, voice: Voice, emit: Emit) -> Iterator[TrainState]:
        engine, recipe, folder, job = self.engine, self.recipe, self.folder, self.job
        state = self.state
        hooks = build_hooks(engine, recipe, folder, voice, self._validation, emit, job.questions)
        counted = job.expected_steps if job.counted else None
        known = job.expected_steps if job.counted or job.sure else None
        share, total, exact = 0.0, job.expected_steps, known is not None
        if state.step:
            share, total, exact = course.progress(state, counted, recipe, known)
            hooks.record(state, total)
        emit("stage", name="train", step=state.step, total=total, exact=exact, share=share)
        room = Room.of(recipe)
        with guarded(self._guards, hooks, engine, recipe, folder) as safe:
            for _ in training(engine, recipe, self.steps, state, counted, safe, emit, known, room):
                yield state

    def _told(self, event: Event) -> None:
        if not self._show(event):
            self.is_given_up = True
