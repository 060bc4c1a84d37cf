"""A recipe shared out among fewer workers takes the same steps, whether their number divides."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.config.schema import Recipe
from raytune_ft.training.batching import StepData, steps
from raytune_ft.training.elastic import line, shared_out
from raytune_ft.training.guarding import failures
from raytune_ft.training.guarding.guards import Guards, guarded
from raytune_ft.training.run_folder import RunFolder
from raytune_ft.training.saving.checkpoint import TrainState
from tests.training.recorded import Recorder, quiet_hooks
from tests.training.test_batching import epochs, labelled, packs_of, without_batches


def recipe_of(workers: int, micro: int, accumulation: int) -> Recipe:
    return Recipe.model_validate({
        "model": {"path": "m"},
        "data": {"sources": [{"path": "rows.jsonl"}]},
        "train": {"micro_batch_size": micro, "accumulation": accumulation},
        "run": {"workers": workers, "min_workers": 1},
    })  # fmt: skip


def steps_of_ranks(recipe: Recipe, asked: Recipe, counts: list[int]) -> list[list[StepData]]:
    n, packs = recipe.run.workers, asked.global_batch_size
    placed = epochs(counts, [3, 4])
    ranks = [
        list(steps(placed, recipe.train, rank=rank, workers=n, packs_per_step=packs))
        for rank in range(n)
    ]
    return [list(step) for step in zip(*ranks, strict=True)]


@settings(deadline=None)
@given(
    workers=st.integers(1, 9),
    left=st.data(),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 4),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=3),
)
def test_any_number_of_workers_takes_the_same_steps(
    workers: int, left: st.DataObject, micro: int, accumulation: int, counts: list[int]
) -> None:
    """Each pack once, in the step where all workers would have it; as many passes on every rank."""
    asked = recipe_of(workers, micro, accumulation)
    shared = shared_out(asked, left.draw(st.integers(1, workers)))
    wanted = steps_of_ranks(asked, asked, counts)
    found = steps_of_ranks(shared, asked, counts)
    assert len(found) == len(wanted)
    for ranks, whole in zip(found, wanted, strict=True):
        assert sorted(itertools.chain(*map(packs_of, ranks))) == sorted(
            itertools.chain(*map(packs_of, whole))
        )
        assert all(without_batches(step) == without_batches(whole[0]) for step in ranks)
        assert {len(step.micro_batches) for step in ranks} == {shared.train.accumulation}
        assert all(len(labelled(step)) <= micro * shared.train.accumulation for step in ranks)


@settings(deadline=None)  # a busy machine
@given(workers=st.integers(1, 64), micro=st.integers(1, 8), accumulation=st.integers(1, 16))
def test_no_pass_is_made_that_no_rank_needs(workers: int, micro: int, accumulation: int) -> None:
    """And where the number divides, the product of the three is the step, as in a recipe."""
    asked = recipe_of(workers, micro, accumulation)
    for n in range(1, workers + 1):
        shared = shared_out(asked, n)
        room = shared.global_batch_size
        assert 0 <= room - asked.global_batch_size < micro * n
        if workers % n == 0:
            assert room == asked.global_batch_size
    assert shared_out(asked, workers) is asked


def test_what_is_said_of_it() -> None:
    asked = recipe_of(4, 1, 2)
    assert line(asked, shared_out(asked, 3)) == (
        "3 of 4 workers: the same steps of 8 packs, 3 passes per worker instead of 2"
    )


def test_workers_end_to_be_more_behind_a_checkpoint_and_never_at_a_run_s_end(
    tmp_path: Path,
) -> None:
    """What was asked for before the save counts; nobody writes it down as a failure."""
    recipe, run, saved = recipe_of(4, 1, 1), RunFolder(tmp_path), []
    failures.begin(run)
    wanted = [False]

    def save(epoch: int, step: int) -> None:
        state = TrainState(epoch=epoch, step=step)
        failures.guard(lambda: hooks.save(state), run, 0)

    guards = Guards(wanting=lambda: wanted[0])
    own = quiet_hooks(save=lambda state: saved.append(state.step))
    with guarded(guards, own, Recorder(), recipe, run) as hooks:
        save(0, 1)
        wanted[0] = True
        with pytest.raises(failures.Grow, match="step 2"):
            save(0, 2)
        save(recipe.train.epochs, 3)
    assert saved == [1, 2, 3]
    assert failures.last(run) is None
