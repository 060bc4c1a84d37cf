"""Passes replayed from a CUDA graph beside passes as they are: bfloat16, NF4, dropout.

    python -m pytest tests/gpu/test_micro_graph.py -s -q

prints what each pair came to, and the host's time of a pass both ways. About two minutes on an
H100, most of it the compilation of kernels. Without a CUDA device the same tests can be gone
through with fixed passes that are not captured, where the marks are taken out.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from raytune_ft.training.evaluating.validation import evaluating
from raytune_ft.training.step import seed_step
from tests.conftest import make_tiny_model
from tests.training.micro import Side, batches, side

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
WAY: Any = "auto" if ON_GPU else "fixed"
LR = 1e-3


@dataclass(frozen=True)
class Kind:
    """A network and its packs."""

    network: dict[str, int]
    length: int
    """Tokens of a full pack."""
    unit: int
    """Samples are multiples of it."""

    def steps(self) -> Any:
        """Make three optimizer steps of three packs: whole, of many samples, with padding."""
        n, u = self.length, self.unit
        many = tuple([u] * (n // u))
        return (
            ((n - 3 * u, 3 * u), (n,), many),
            ((n - u - 1, u), (n - 5,), many[:-2]),
            ((n,), (3 * u, 2 * u, n - 5 * u), (u + 3, n - 2 * u)),
        )


KINDS = {
    "heads of 64": Kind(
        {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 8,
         "num_key_value_heads": 8, "num_hidden_layers": 4}, 512, 32,
    ),
    "groups of 128": Kind(
        {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8,
         "num_key_value_heads": 2, "num_hidden_layers": 3}, 2048, 150,
    ),
    "odd": Kind(
        {"hidden_size": 320, "intermediate_size": 704, "num_attention_heads": 4,
         "num_key_value_heads": 4, "num_hidden_layers": 2}, 333, 21,
    ),
}  # fmt: skip
ENGINES: dict[str, dict[str, Any]] = {
    "zero2": {"train.deepspeed": "zero2", "train.optimizer": "paged_adamw_32bit"},
    "plain": {},
    "recomputed": {"model.gradient_checkpointing": True, "train.deepspeed": "zero2"},
}
HALF = {"model.dtype": "bfloat16"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("micro")


def built(kind: str, folder: Path, way: Any, **changes: Any) -> Side:
    """Build an engine of a kind; weights are the same however often it is built."""
    place, chosen = folder / kind.replace(" ", "_"), KINDS[kind]
    if not place.exists():
        place.mkdir()
        make_tiny_model(place, max_position_embeddings=4096, **chosen.network)
    nf4 = {"model.quantization": "nf4"} if ON_GPU else {}
    return side(place, way, DEVICE, **{**HALF, **nf4, "data.max_length": chosen.length, **changes})


def passes(one: Side, kind: str, number: int) -> list[float]:
    """Run the passes of a step; return their losses."""
    step, n_targets = batches(KINDS[kind].steps())[number % 3]
    seed_step(7, number + 1)
    return [float(one.engine.forward_backward(batch, n_targets)) for batch in step]


def uncaptured(one: Side) -> Side:
    """Let an engine keep fixed passes, but run them as they are."""
    assert one.micro is not None
    one.micro.may_capture = False
    return one


def least_cosine(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    return min(
        float(cosine_similarity(found[n].flatten(), e.flatten(), dim=0))
        for n, e in expected.items() if e.any()
    )  # fmt: skip


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_replays_have_the_numbers_of_passes(kind: str, engine: str, folder: Path) -> None:
    """Losses and gradients: the bits of fixed passes without a graph; near passes of any shape."""
    changes = ENGINES[engine]
    graph = built(kind, folder, WAY, **changes)
    fixed = uncaptured(built(kind, folder, WAY, **changes))
    free = built(kind, folder, None, **changes)
    for _ in range(2):  # all shapes are captured behind the second time
        for number in range(3):
            for one in (graph, fixed, free):
                passes(one, kind, number)
                one.engine.step(0.0)
    apart, cosines = [0.0, 0.0], [1.0, 1.0]
    for number in range(3):
        replayed, *others = (passes(one, kind, number) for one in (graph, fixed, free))
        found = graph.gradients()
        for place, (losses, one) in enumerate(zip(others, (fixed, free), strict=True)):
            far = max(abs(a - b) / abs(b) for a, b in zip(replayed, losses, strict=True) if b)
            apart[place] = max(apart[place], far)
            cosines[place] = min(cosines[place], least_cosine(found, one.gradients()))
        alike = fixed.gradients()
        assert all(torch.equal(value, alike[name]) for name, value in found.items())
        for one in (graph, fixed, free):
            one.engine.step(0.0)
    assert graph.micro is not None and graph.said == []
    print(f"\n{kind}, {engine}: {graph.micro.captured} graphs; fixed passes {apart[0]:.1e} of a "
          f"loss apart, cosine {cosines[0]:.7f}; any shape {apart[1]:.1e}, "
          f"{cosines[1]:.7f}")  # fmt: skip
    assert graph.micro.captured >= (3 if ON_GPU else 0)
    assert apart[0] == 0.0
    assert apart[1] < 5e-3
    assert cosines[1] >= 0.999


def test_all_graphs_work_in_the_memory_of_one(folder: Path) -> None:
    """And so do first passes of further shapes; the largest pass comes first here."""
    kind = "groups of 128"
    one = built(kind, folder, WAY, **ENGINES["zero2"])
    (largest, *others), n_targets = batches(KINDS[kind].steps())[0]
    for _ in range(3):
        one.engine.forward_backward(largest, n_targets)
    assert one.micro is not None
    first, held = one.micro.captured, torch.cuda.memory_reserved() if ON_GPU else 0
    for batch in 3 * others:
        one.engine.forward_backward(batch, n_targets)
    taken = (torch.cuda.memory_reserved() if ON_GPU else 0) - held
    print(f"\n{held / 2**20:.0f} MiB with {first} graph, {taken / 2**20:.0f} more with "
          f"{one.micro.captured}")  # fmt: skip
    assert one.said == []
    assert not ON_GPU or one.micro.captured > first
    # many samples have a few KB more of bounds; a graph of its own would take hundreds of MiB
    assert taken <= 32 * 2**20


def test_masks_differ_between_replays_and_come_again(folder: Path) -> None:
    kind = "heads of 64"
    one = built(kind, folder, WAY, **ENGINES["zero2"])
    (first, *_), n_targets = batches(KINDS[kind].steps())[0]
    for _ in range(3):
        one.engine.forward_backward(first, n_targets)
    one.engine.step(0.0)

    def losses(seed: int) -> list[float]:
        seed_step(seed, 1)
        found = [float(one.engine.forward_backward(first, n_targets)) for _ in range(3)]
        one.engine.step(0.0)
        return found

    found = losses(7)
    print(f"\nthree replays of a batch: {found}")
    assert len(set(found)) == 3
    assert losses(8) != found
    assert losses(7) == found
    none = built(kind, folder, WAY, **{**ENGINES["zero2"], "lora.dropout": 0.0})
    same = [float(none.engine.forward_backward(first, n_targets)) for _ in range(4)]
    assert len(set(same)) == 1


@pytest.mark.parametrize("engine", ["zero2", "plain"])
def test_ten_steps_and_a_restart(engine: str, folder: Path) -> None:
    """Losses within 1% of a run without graphs; held-out rows in between disturb nothing."""
    kind = "groups of 128"
    graph = built(kind, folder, WAY, **ENGINES[engine])
    free = built(kind, folder, None, **ENGINES[engine])
    taken: dict[int, list[float]] = {}
    kept: Any = None
    for number in range(10):
        taken[number], expected = passes(graph, kind, number), passes(free, kind, number)
        assert taken[number] == pytest.approx(expected, rel=0.01)
        norms = graph.engine.step(LR), free.engine.step(LR)
        assert norms[0] == pytest.approx(norms[1], rel=0.05)
        held_out(graph, kind)
        if number == 4:
            kept = graph.engine.weights(), graph.engine.optimizer_state()
    again = built(kind, folder, WAY, **ENGINES[engine])
    again.engine.load(*kept)
    for number in range(5, 10):
        found = passes(again, kind, number)
        far = max(abs(a - b) / b for a, b in zip(found, taken[number], strict=True))
        print(f"\n{engine}: step {number + 1} again, {far:.1e} of a loss apart")
        assert far < 1e-3
        again.engine.step(LR)


def held_out(one: Side, kind: str) -> None:
    batch = batches(KINDS[kind].steps())[1][0][1]
    with evaluating(one.engine.module):
        loss, count = one.engine.module(**one.engine.put(batch))
    assert torch.isfinite(loss) and count > 0


def test_graphs_go_and_come_again(folder: Path) -> None:
    """As where a step did not fit: the next layout has graphs of its own; memory is given back."""
    kind = "groups of 128"
    one = built(kind, folder, WAY, **ENGINES["zero2"])
    losses = [passes(one, kind, 0) for _ in range(3)]
    one.engine.step(0.0)
    assert one.micro is not None
    held = torch.cuda.memory_reserved() if ON_GPU else 0
    captured = one.micro.captured
    one.micro.close()
    if ON_GPU:
        assert torch.cuda.memory_reserved() < held
    assert [passes(one, kind, 0) for _ in range(3)] == losses
    assert one.micro.captured == 2 * captured


def test_the_time_that_a_pass_costs(folder: Path) -> None:
    """Prints; asserts nothing."""
    kind = "heads of 64"
    step, n_targets = batches(KINDS[kind].steps())[1]
    for way in (WAY, None):
        one = built(kind, folder, way, **ENGINES["zero2"])
        for _ in range(3):
            one.engine.forward_backward(step[0], n_targets)
        wait()
        began = time.perf_counter()
        for _ in range(20):
            one.engine.forward_backward(step[0], n_targets)
        host = time.perf_counter() - began
        wait()
        whole = time.perf_counter() - began
        layers = KINDS[kind].network["num_hidden_layers"]
        print(f"\n{'graph' if way else 'no graph'}: host {host * 50:.2f} ms a pass, "
              f"{whole * 50:.2f} with the device, {layers} layers")  # fmt: skip


def wait() -> None:
    if ON_GPU:
        torch.cuda.synchronize()
