"""What only some engines have to do: a loss scale, whole weights for a while, skips told."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.model.generate import stream_ids
from raytune_ft.training.engine import Engine, ZeroEngine
from raytune_ft.training.engine.scaling import CLEAN_KEY, FACTOR_KEY, WINDOW, LossScale
from tests.training.engines import advance, build, close
from tests.training.ragged import batches, targets

ENGINES = ("none", "zero1", "zero2", "zero3")
HUGE = 2.0**44
"""A loss scale over which every float16 gradient is infinite."""


@pytest.fixture
def half_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let DeepSpeed compute float16 on a CPU, which it leaves to GPUs."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    yield


def at_scale(engine: Engine, factor: float, clean: int = 0) -> Engine:
    """Set an engine's loss scale, by what a checkpoint says of it."""
    state = engine.optimizer_state()
    state[FACTOR_KEY], state[CLEAN_KEY] = torch.tensor(factor), torch.tensor(clean)
    engine.load(engine.weights(), state)
    return engine


def scale_of(engine: Engine) -> float:
    return float(engine.optimizer_state()[FACTOR_KEY])


@pytest.mark.usefixtures("half_cpu")
@pytest.mark.parametrize("zero", ENGINES)
def test_an_overflow_changes_no_weight_and_halves_the_scale(tiny_model: Path, zero: str) -> None:
    """C15: the caller is told, and the same step taken again is the step without an overflow."""
    engine, calm = (build(tiny_model, 4, zero, "float16") for _ in range(2))
    step = batches()[0]
    advance(engine, step), advance(calm, step)
    at_scale(engine, HUGE)
    before, state = engine.weights(), engine.optimizer_state()

    assert advance(engine, batches()[1]) is None
    assert scale_of(engine) == HUGE / 2
    assert int(engine.optimizer_state()[CLEAN_KEY]) == 0
    close(engine.weights(), before, 0)
    kept = {k: v for k, v in engine.optimizer_state().items() if not k.startswith("loss_scale")}
    close(kept, {k: state[k] for k in kept}, 0)

    at_scale(engine, scale_of(calm), int(calm.optimizer_state()[CLEAN_KEY]))
    assert advance(engine, batches()[1]) == advance(calm, batches()[1])  # no gradient was left
    close(engine.weights(), calm.weights(), 0)


@pytest.mark.usefixtures("half_cpu")
@pytest.mark.parametrize("zero", ["none", "zero3"])
def test_the_scale_falls_until_the_step_fits(tiny_model: Path, zero: str) -> None:
    engine = at_scale(build(tiny_model, 4, zero, "float16"), 2.0**26)
    for _ in range(20):
        norm = advance(engine, batches()[0])
        if norm is not None:
            break
    exact = advance(build(tiny_model, 4, "none"), batches()[0])
    assert norm == pytest.approx(exact, rel=1e-2)
    assert scale_of(engine) < 2.0**26


@pytest.mark.usefixtures("half_cpu")
def test_engines_move_the_scale_by_one_law(tiny_model: Path) -> None:
    """It doubles after a window without an overflow, whoever counts; a checkpoint knows where."""
    engines = [build(tiny_model, 4, zero, "float16") for zero in ("none", "zero2", "zero3")]
    for engine in engines:
        at_scale(engine, 1024.0, WINDOW - 1)
    for expected in (1024.0, 2048.0, 2048.0):
        for engine in engines:
            assert advance(engine, batches()[0]) is not None
            assert scale_of(engine) == expected
    counts = {int(engine.optimizer_state()[CLEAN_KEY]) for engine in engines}
    assert len(counts) == 1


def test_the_scale_never_falls_below_one() -> None:
    scale = LossScale.of(torch.float16)
    for _ in range(40):
        scale.update(overflowed=True)
    assert scale.factor == 1.0
    assert LossScale.of(torch.bfloat16).state() == {}


@pytest.mark.parametrize("zero", ["none", "zero2", "zero3"])
def test_a_gradient_that_is_not_finite_changes_no_weight(tiny_model: Path, zero: str) -> None:
    """float32 has no scale to lower: the norm says so, and the loop stops."""
    engine = build(tiny_model, 4, zero)
    advance(engine, batches()[0])
    before = engine.weights()
    for batch in batches()[1]:
        engine.forward_backward(batch, 1e-38)  # type: ignore[arg-type]
    norm = engine.step(1e-2)
    assert norm is not None and not math.isfinite(norm)
    close(engine.weights(), before, 0)


def test_float16_needs_a_machine_that_has_it(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(RecipeError, match="float16 is not computed here"):
        build(tiny_model, 4, "zero2", "float16")


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_rotary_frequencies_are_not_rounded(tiny_model: Path, zero: str) -> None:
    """In bfloat16 they would be radians off at long positions, and in training alone.

    The pinned DeepSpeed leaves buffers as they are; earlier ones rounded them with the weights.
    """
    found = dict(build(tiny_model, 4, zero, "bfloat16").module.named_buffers())
    exact = dict(build(tiny_model, 4, "none").module.named_buffers())
    assert any("inv_freq" in name for name in exact)
    for name, buffer in exact.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], buffer), name


def test_whole_weights_can_be_read_and_trained_on(tiny_model: Path) -> None:
    """Inside `whole` the model answers as a plain one does; behind it training is undisturbed."""
    plain, sharded, read = (build(tiny_model, 4, zero) for zero in ("none", "zero3", "zero3"))
    for engine in (plain, sharded, read):
        advance(engine, batches()[0])
    answer = greedy(plain)
    held = whole_weights(read)
    with read.whole():
        assert greedy(read) == answer
        assert whole_weights(read) == len(list(read.module.parameters()))
    assert whole_weights(read) <= held
    for step in batches()[1:]:
        assert advance(read, step) == advance(sharded, step)
    close(read.weights(), sharded.weights(), 0)


def whole_weights(engine: Engine) -> int:
    return sum(p.numel() > 0 for p in engine.module.parameters())


def test_whole_weights_go_back_after_an_error(tiny_model: Path) -> None:
    engine = build(tiny_model, 4, "zero3")
    with pytest.raises(KeyError), engine.whole():
        raise KeyError
    assert advance(engine, batches()[0]) is not None


def greedy(engine: Engine) -> list[int]:
    model = engine.module.model
    ids = stream_ids(model, [5, 9, 31], stop_ids=frozenset(), max_new_tokens=12, temperature=0.0)
    return list(ids)


def test_round_robin_gradients_keep_names(tiny_model: Path, tmp_path: Path) -> None:
    """A file may lay weights in another order; a checkpoint has them by name all the same."""
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2, "round_robin_gradients": true}}')
    one, other = build(tiny_model, 4, str(file)), build(tiny_model, 4, "none")
    assert isinstance(one, ZeroEngine)
    close(one.weights(), other.weights(), 0)
    advance(one, batches()[0]), advance(other, batches()[0])
    close(one.weights(), other.weights(), 5e-6)


def test_a_file_of_stage_0_shards_nothing(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 0}}')
    assert not isinstance(build(tiny_model, 4, str(file)), ZeroEngine)


def test_state_in_blocks_is_not_sharded(tiny_model: Path) -> None:
    engine = build(tiny_model, 4, "zero2")
    name = min(engine.trained)
    state = {f"{n}/absmax1": torch.zeros(3) for n in engine.trained}
    with pytest.raises(CheckpointError, match="'absmax1' in blocks"):
        engine.load(engine.weights(), state)
    assert name


def test_a_window_is_as_long_as_the_recipe_says(tiny_model: Path) -> None:
    """C22: every micro-batch of a window counts, the first and the last."""
    step = batches()[0]
    norms = []
    for left_out in (None, 0, 2):
        engine = build(tiny_model, 4, "zero2")
        for index, batch in enumerate(step):
            quiet = {**batch, "labels": torch.full_like(batch["labels"], -100)}
            engine.forward_backward(quiet if index == left_out else batch, targets(step))
        norms.append(engine.step(1e-2))
    assert len(set(norms)) == 3
