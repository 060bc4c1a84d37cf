"""DPO and ORPO on batches of packed pairs against each pair on its own, and against TRL's figures.

The plain implementation runs every conversation alone through two separate models, without packs,
masks, chunks or adapters that are switched; it is written from the papers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from raytune_ft.config.schema import LoraSection, TrainSection
from raytune_ft.model import loss as loss_module
from raytune_ft.model import noise
from raytune_ft.model.adapter import attach
from raytune_ft.model.preference import (
    Answers,
    DirectPreferenceLoss,
    OddsRatioLoss,
    PreferenceLoss,
    build_loss,
)
from tests.model.test_loss import OTHERS, SHAPE, Sample, batch, gradients, llama, samples

BETA = 0.3
Pair = tuple[Sample, Sample]


def pairs(sizes: Sequence[tuple[int, int]], seed: int = 1) -> list[Pair]:
    found = samples([n for both in sizes for n in both], seed)
    return list(zip(found[::2], found[1::2], strict=True))


def row(found: Sequence[Pair]) -> list[Sample]:
    return [side for pair in found for side in pair]


def log_prob(model: Any, sample: Sample) -> tuple[torch.Tensor, int]:
    """One conversation alone: the sum over labelled tokens, and their number."""
    ids, labels = sample
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].double()
    wanted = torch.tensor(labels[1:])
    learned = wanted != -100
    scores = torch.log_softmax(logits, -1).gather(1, wanted.clamp(min=0)[:, None])[:, 0]
    return scores[learned].sum(), int(learned.sum())


def plain_loss(objective: str, model: Any, reference: Any, found: Sequence[Pair]) -> torch.Tensor:
    """The mean loss of pairs, each on its own."""
    losses, learned, n_learned = [], [], 0
    for chosen, rejected in found:
        (better, n_better), (worse, n_worse) = log_prob(model, chosen), log_prob(model, rejected)
        if objective == "dpo":
            with torch.no_grad():
                before = log_prob(reference, chosen)[0], log_prob(reference, rejected)[0]
            margin = (better - before[0]) - (worse - before[1])
            losses.append(-nn.functional.logsigmoid(BETA * margin))
            continue
        per_token = better / n_better, worse / n_worse
        odds = [p - torch.log1p(-torch.exp(p)) for p in per_token]
        losses.append(-BETA * nn.functional.logsigmoid(odds[0] - odds[1]))
        learned.append(-better)
        n_learned += n_better
    mean = torch.stack(losses).mean()
    return mean + torch.stack(learned).sum() / n_learned if learned else mean


def moved(model: nn.Module, seed: int = 7) -> None:
    """Change what is trained, as steps of training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.03 * noise.to(parameter.dtype))


def adapted(model: nn.Module, dropout: float = 0.0) -> Any:
    """A LoRA adapter that has been trained before: the run begins with it, not with the base."""
    wrapped = attach(model, LoraSection(r=4, dropout=dropout), seed=1)
    for parameter in wrapped.parameters():
        parameter.data = parameter.data.double()
    moved(wrapped, seed=5)
    return wrapped


def loss_of(model: nn.Module, objective: str) -> Any:
    return build_loss(model, TrainSection.model_validate({"objective": objective, "beta": BETA}))


def close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        error = float((found[name] - value).norm() / value.norm())
        assert error <= tolerance, (name, error)


OBJECTIVES = ("dpo", "orpo")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("method", ["lora", "full", "head"])
def test_packed_pairs_have_loss_and_gradients_of_each_pair_alone(
    objective: str, method: str
) -> None:
    """float64, to 1e-10: only the order of additions differs."""
    model = adapted(llama()) if method == "lora" else llama()
    if method == "head":
        model.requires_grad_(False)
        model.lm_head.requires_grad_(True)
    reference = copy.deepcopy(model)
    ours = loss_of(model, objective)
    moved(model)
    found = [pairs([(9, 30), (17, 12)]), pairs([(40, 5)], seed=2)]
    total, count = ours(**batch([row(one) for one in found]))
    (total / count).backward()
    together = gradients(model)
    alone = plain_loss(objective, model, reference, [pair for one in found for pair in one])
    alone.backward()
    assert int(count) == 3
    assert float(total / count) == pytest.approx(float(alone), rel=1e-10)
    close(together, gradients(model), 1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weights_of_a_step_make_the_mean_over_all_of_its_batches(objective: str) -> None:
    """Two batches of unlike pairs: their sums over the step's tokens are one mean."""
    model = adapted(llama())
    reference = copy.deepcopy(model)
    ours = loss_of(model, objective)
    moved(model)
    groups = [pairs([(9, 30), (17, 12)]), pairs([(40, 5)], seed=2)]
    labels = [sum(1 for label in side[1] if label != -100) for one in groups for side in row(one)]
    weights = {
        "pair_weight": torch.tensor(sum(labels) / 3, dtype=torch.float64),
        "chosen_weight": torch.tensor(sum(labels) / sum(labels[::2]), dtype=torch.float64),
    }
    for one in groups:
        (ours(**batch([row(one)]), **weights)[0] / sum(labels)).backward()
    together = gradients(model)
    alone = plain_loss(objective, model, reference, [pair for one in groups for pair in one])
    alone.backward()
    close(together, gradients(model), 1e-10)
    sums = {name: float(value) for name, value in ours.take_sums().items()}
    assert ours.mean_loss(sums) == pytest.approx(float(alone), rel=1e-10)
    assert sums["pairs"] == 3 and not any(float(value) for value in ours.take_sums().values())


def test_measures_are_the_means_over_pairs() -> None:
    model = adapted(llama())
    reference = copy.deepcopy(model)
    ours = loss_of(model, "dpo")
    moved(model)
    found = pairs([(9, 30), (17, 12), (40, 5), (20, 21)])
    ours(**batch([row(found[:2]), row(found[2:])]))
    told = ours.measures({name: float(value) for name, value in ours.take_sums().items()})
    rises = [
        [float(log_prob(model, side)[0] - log_prob(reference, side)[0]) for side in pair]
        for pair in found
    ]
    margins = [BETA * (chosen - rejected) for chosen, rejected in rises]
    assert told["rewards_margin"] == pytest.approx(sum(margins) / 4, rel=1e-9)
    assert told["rewards_accuracy"] == sum(margin > 0 for margin in margins) / 4
    assert 0 < told["rewards_accuracy"] < 1, "both kinds of pair must be there"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind, config, changes", OTHERS, ids=[k.__name__ for k, _, _ in OTHERS])
def test_other_families(kind: Any, config: Any, changes: dict[str, Any], objective: str) -> None:
    """Capped and scaled logits and sliding windows; Gemma's norms work in float32."""
    torch.manual_seed(0)
    model = kind(config(**SHAPE, **changes)).double()
    reference = copy.deepcopy(model)
    ours = loss_of(model, objective)
    moved(model)
    found = pairs([(33, 21), (8, 12)])
    total, count = ours(**batch([row(found)], length=80))
    alone = plain_loss(objective, model, reference, found)
    assert float(total / count) == pytest.approx(float(alone), rel=1e-5)


def test_the_reference_is_what_the_run_began_with_and_weights_stay_where_they_are() -> None:
    """Not the bare base, where the run goes on from an adapter; without dropout in training."""
    model = adapted(llama(), dropout=0.5)
    ours = loss_of(model, "dpo")
    data = batch([row(pairs([(9, 30), (17, 12)]))])
    inputs = (*data.values(), None, None)
    own = ours.eval().answers(*inputs).log_probs
    start = ours.start_log_probs(*inputs)
    assert torch.equal(own, start)
    with model.disable_adapter():
        assert not torch.allclose(ours.answers(*inputs).log_probs, start)
    total, count = ours(**data)
    assert float(total / count) == pytest.approx(math.log(2), rel=1e-12)

    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    moved(model)
    values = {name: p.clone() for name, p in model.named_parameters()}
    ours.train()
    assert torch.equal(ours.start_log_probs(*inputs), start)
    assert model.training and all(m.training for m in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == places[name] and torch.equal(parameter, values[name])
    assert not any("start_" in name for name in ours.state_dict())


def test_noise_on_embeddings_shakes_the_policy_and_not_the_reference() -> None:
    model = adapted(llama())
    ours = loss_of(model, "dpo").train()
    data = batch([row(pairs([(9, 30), (17, 12)]))])
    found: list[torch.Tensor] = []
    asked = ours.start_log_probs

    def remember(*inputs: Any) -> torch.Tensor:
        found.append(asked(*inputs))
        return found[-1]

    ours.start_log_probs = remember
    plain, _ = ours(**data)
    noise.install(ours, model, 15.0)
    shaken, _ = ours(**data)
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(plain, shaken)


def test_weights_come_back_where_the_model_fails() -> None:
    model = adapted(llama())
    ours = loss_of(model, "dpo")
    moved(model)
    values = {name: p.clone() for name, p in model.named_parameters()}
    bad = batch([row(pairs([(9, 30)]))])
    bad["input_ids"] = bad["input_ids"] + 10_000
    with pytest.raises(IndexError):
        ours(**bad)
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_recomputed_activations_and_chunks_of_the_head_change_nothing(
    objective: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for recompute in (False, True):
        model = adapted(llama())
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
            monkeypatch.setattr(loss_module, "CHUNK_ROWS", 7)
        ours = loss_of(model, objective)
        moved(model)
        ours.train()
        total, count = ours(**batch([row(pairs([(30, 20), (9, 40)]))]))
        (total / count).backward()
        found.append((float(total.detach()), gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    close(found[1][1], found[0][1], 1e-10)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_batch_without_a_pair_has_zero_gradients(objective: str) -> None:
    """Ranks that have no pack in a step run one of these."""
    model = adapted(llama())
    ours = loss_of(model, objective)
    ids = list(range(1, 11))
    for samples_of_row in ([(ids, [-100] * 10)], [(ids, ids)]):
        total, count = ours(**batch([samples_of_row]))
        total.backward()
        assert (float(total.detach()), int(count)) == (0.0, 0)
        found = gradients(model)
        assert found and not any(bool(g.any()) for g in found.values())


def test_the_bounds_of_a_batch_are_those_that_it_brings() -> None:
    from raytune_ft.data.packing import collate
    from raytune_ft.model.preference import bounds_of
    from raytune_ft.training.batching import empty_batch, to_tensors
    from tests.data.conftest import join_examples
    from tests.data.test_preference import example_of

    packs = [join_examples([example_of(0, 3, 4), example_of(1, 5, 2)], [0, 1]),
             join_examples([example_of(2, 2, 2)], [2])]  # fmt: skip
    for made in (to_tensors(collate(packs)), empty_batch()):
        assert torch.equal(bounds_of(made["segment_ids"]), made["cu_seqlens"].long())


def answers(chosen: Sequence[float], rejected: Sequence[float], counts: Sequence[int]) -> Answers:
    both = torch.tensor([chosen, rejected], dtype=torch.float64).T.flatten()
    n = torch.tensor(counts, dtype=torch.float64).repeat_interleave(2)
    first = torch.arange(len(both) - 1) % 2 == 0
    return Answers(both * n, n, first)


def test_orpo_has_the_figures_of_trl() -> None:
    """TRL 1.16.0, `ORPOTrainer.odds_ratio_loss` at beta 0.3, which works in float32.

    Log-probabilities per token in; its losses have the other sign.
    """
    found = answers([-0.5, -1.25, -0.02], [-0.75, -0.1, -3.0], [4, 7, 1])
    margins, losses = OddsRatioLoss(llama(), 0.3).compare(found, None)
    expected = [0.13737383484840393, 0.9617859721183777, 0.0003173711593262851]
    assert losses[::2].tolist() == pytest.approx(expected, rel=1e-6)
    assert margins[::2].tolist() == pytest.approx([0.075, -0.345, 0.894], rel=1e-6)


def test_dpo_has_the_figures_of_its_formula() -> None:
    """-log sigmoid(beta (ratio of chosen - ratio of rejected)), worked out by hand."""
    found = answers([-10.0, -3.0], [-12.0, -8.0], [1, 1])
    before = torch.tensor([-11.0, -11.0, -3.0, -6.0], dtype=torch.float64)
    margins, losses = DirectPreferenceLoss(llama(), 0.1).compare(found, before)
    assert margins[::2].tolist() == pytest.approx([0.2, 0.2], rel=1e-12)
    assert losses[::2].tolist() == pytest.approx([0.598138869381592] * 2, rel=1e-12)


def test_a_certain_answer_has_finite_odds() -> None:
    found = answers([0.0], [-2.0], [3])
    found.log_probs.requires_grad_()
    _, losses = OddsRatioLoss(llama(), 0.1).compare(found, None)
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(found.log_probs.grad).all()


def test_an_objective_of_answers_has_the_plain_loss() -> None:
    assert not isinstance(loss_of(llama(), "sft"), PreferenceLoss)
