"""Preference losses: packs of pairs in, the loss of DPO or ORPO out, as `loss.TokenLoss` gives it.

A pair is two segments of a pack next to each other: the chosen answer with its prompt in an even
place, the rejected one behind it. Log-probabilities are those of labelled tokens.

DPO (Rafailov et al. 2023, arXiv 2305.18290): mean over pairs of -log sigmoid of beta times how
much further the chosen answer's log-probability rose than the rejected one's, since the run began.
ORPO (Hong et al. 2024, arXiv 2403.07691): mean loss of chosen answers' tokens, plus beta times the
mean over pairs of -log sigmoid of the log odds ratio, log-probabilities per token.

Shapes: B = packs, L = padded length, T = labelled tokens, S = segments, padding among them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from raytune_ft.config.schema import TrainSection
from raytune_ft.model.loss import TokenLoss, bounds_of

if TYPE_CHECKING:
    from raytune_ft.model.fast import Report

CERTAIN = -1e-12
"""Log-probability per token above which an answer counts as this likely: the odds of certainty
are infinite."""


def build_loss(model: nn.Module, train: TrainSection, fast: Report | None = None) -> TokenLoss:
    """Wrap a model into the loss of the recipe's objective; its weights are those to begin with."""
    if train.objective == "dpo":
        return DirectPreferenceLoss(model, train.beta, fast)
    if train.objective == "orpo":
        return OddsRatioLoss(model, train.beta, fast)
    return TokenLoss(model, fast)


@dataclass(frozen=True)
class Answers:
    """All segments of a batch; float64 (S,) each, `first` bool (S - 1,)."""

    log_probs: torch.Tensor
    """Summed over labelled tokens."""
    counts: torch.Tensor
    """Labelled tokens."""
    first: torch.Tensor
    """Whether a segment is a chosen answer, which its rejected one follows."""

    def per_pair(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the values (S,) of chosen and rejected answers, (S - 1,); 0 where is no pair."""
        nothing = torch.zeros_like(values[1:])
        chosen = torch.where(self.first, values[:-1], nothing)
        return chosen, torch.where(self.first, values[1:], nothing)


class PreferenceLoss(TokenLoss, ABC):
    """What DPO and ORPO share: answers of packs, and what is summed up beside the loss."""

    def __init__(self, model: nn.Module, beta: float, fast: Report | None = None) -> None:
        super().__init__(model, fast)
        self.beta = beta
        self._sums: dict[str, torch.Tensor] = {}

    def forward(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None = None,
        max_seqlen: torch.Tensor | None = None,
        places: torch.Tensor | None = None,
        pair_weight: torch.Tensor | None = None,
        chosen_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum the loss of a batch's pairs.

        Args:
            input_ids: as all to `places` for `TokenLoss.forward`.
            labels: see there.
            position_ids: see there.
            segment_ids: see there.
            cu_seqlens: see there.
            max_seqlen: see there.
            places: see there.
            pair_weight: scalar on the host, factor of each pair's loss: of an optimizer step its
                labelled tokens over its pairs, so that the sum divided by the tokens is the mean.
            chosen_weight: the same for each labelled token of a chosen answer.

        Returns:
            (loss sum, scalar; number of pairs, int64 scalar). Without weights their quotient is
            the loss of this batch alone.
        """
        inputs = (input_ids, labels, position_ids, segment_ids, cu_seqlens, max_seqlen, places)
        before = self.start_log_probs(*inputs)
        answers = self.answers(*inputs)
        margins, losses = self.compare(answers, before)
        pairs, n_pairs = answers.first.double(), answers.first.sum()
        loss = (losses * pairs).sum()
        chosen, n_chosen = (part.sum() for part in self.learned(answers))
        self._add(
            pairs=n_pairs, losses=loss, margins=(margins * pairs).sum(),
            preferred=(torch.heaviside(margins, torch.full_like(margins, 0.5)) * pairs).sum(),
            chosen_losses=chosen, chosen_tokens=n_chosen,
        )  # fmt: skip
        if chosen_weight is None:
            chosen_weight = n_pairs / n_chosen.clamp(min=1)
        total = loss * (1.0 if pair_weight is None else pair_weight) + chosen * chosen_weight
        wide = torch.float64 if input_dtype(self.model) is torch.float64 else torch.float32
        return total.to(wide), n_pairs

    def answers(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        position_ids: torch.Tensor,
        segment_ids: torch.Tensor,
        cu_seqlens: torch.Tensor | None,
        max_seqlen: torch.Tensor | None,
        places: torch.Tensor | None = None,
    ) -> Answers:
        """Sum the log-probabilities of each segment's labelled tokens."""
        losses, keep = self.token_losses(
            input_ids, labels, position_ids, segment_ids, cu_seqlens, max_seqlen, places
        )
        bounds = bounds_of(segment_ids) if cu_seqlens is None else cu_seqlens
        tokens = torch.arange(segment_ids.numel(), device=segment_ids.device)
        segments = torch.bucketize(tokens, bounds[1:].long(), right=True)
        owners = segments.view_as(segment_ids)[:, 1:][keep]
        # float64: a margin is a small difference of sums over whole answers
        nothing = torch.zeros(len(bounds) - 1, dtype=torch.float64, device=losses.device)
        log_probs = nothing.index_add(0, owners, -losses.double())
        counts = nothing.index_add(0, owners, torch.ones_like(losses, dtype=torch.float64))
        places = segment_ids.flatten()[bounds[:-1].long()]
        even = (places[:-1] >= 0) & (places[:-1] % 2 == 0)
        return Answers(log_probs, counts, even & (places[1:] == places[:-1] + 1))

    def start_log_probs(self, *inputs: torch.Tensor | None) -> torch.Tensor | None:
        """Return the log-probabilities (S,) of the model that the run began with, if needed."""
        return None

    @abstractmethod
    def compare(
        self, answers: Answers, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return reward margins and losses of pairs, (S - 1,)."""

    def learned(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses and numbers of the tokens that are learned beside, by pair (S - 1,)."""
        nothing = torch.zeros_like(answers.log_probs[1:])
        return nothing, nothing

    def take_sums(self) -> dict[str, torch.Tensor]:
        """Return what passes since the last call have summed up; start anew."""
        sums, self._sums = self._sums, {}
        return sums or dict.fromkeys(SUMS, torch.zeros((), dtype=torch.float64))

    @staticmethod
    def measures(sums: Mapping[str, float]) -> dict[str, float]:
        """Return `rewards_margin` and `rewards_accuracy`, the means over pairs; a tie is half."""
        pairs = max(1.0, sums["pairs"])
        return {
            "rewards_margin": sums["margins"] / pairs,
            "rewards_accuracy": sums["preferred"] / pairs,
        }

    @staticmethod
    def mean_loss(sums: Mapping[str, float]) -> float:
        """Return the loss of all pairs that were summed up, as training weighs it."""
        learned = sums["chosen_losses"] / max(1.0, sums["chosen_tokens"])
        return sums["losses"] / max(1.0, sums["pairs"]) + learned

    def _add(self, **found: torch.Tensor) -> None:
        for name, value in found.items():
            known = self._sums.get(name, 0.0)
            self._sums[name] = known + value.detach().double()


SUMS = ("pairs", "losses", "margins", "preferred", "chosen_losses", "chosen_tokens")
"""What a preference loss sums up, in this order."""


class DirectPreferenceLoss(PreferenceLoss):
    """DPO against the weights that the model has when it is wrapped."""

    def __init__(self, model: nn.Module, beta: float, fast: Report | None = None) -> None:
        super().__init__(model, beta, fast)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        for number, parameter in enumerate(self._trained):
            # buffers follow the model to another device or dtype, and no checkpoint keeps them
            start = parameter.detach().clone()
            self.register_buffer(f"start_{number}", start, persistent=False)

    def start_log_probs(self, *inputs: torch.Tensor | None) -> torch.Tensor:
        """Ask the model as it was when it was wrapped: no dropout, no gradient."""
        with torch.no_grad(), self._as_it_began():
            return self.answers(*inputs).log_probs  # type: ignore[arg-type]

    def compare(
        self, answers: Answers, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare by how far log-probabilities have risen."""
        rise = answers.log_probs - (0.0 if before is None else before)
        chosen, rejected = answers.per_pair(self.beta * rise)
        margins = chosen - rejected
        return margins, -nn.functional.logsigmoid(margins)

    @contextmanager
    def _as_it_began(self) -> Iterator[None]:
        """Give trained weights the values of the start; other tensors, so nothing is copied."""
        now = [parameter.data for parameter in self._trained]
        training = self.model.training
        self.model.eval()
        try:
            for number, parameter in enumerate(self._trained):
                parameter.data = self.get_buffer(f"start_{number}").to(parameter)
            yield
        finally:
            for parameter, values in zip(self._trained, now, strict=True):
                parameter.data = values
            self.model.train(training)


class OddsRatioLoss(PreferenceLoss):
    """ORPO: learns chosen answers, and to hold them likelier than rejected ones."""

    def compare(
        self, answers: Answers, before: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compare by the odds of answers, log-probabilities per token."""
        per_token = answers.log_probs / answers.counts.clamp(min=1.0)
        chosen, rejected = answers.per_pair(per_token)
        ratios = log_odds(chosen) - log_odds(rejected)
        margins = self.beta * (chosen - rejected)
        return margins, -self.beta * nn.functional.logsigmoid(ratios)

    def learned(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the losses of chosen answers' tokens."""
        losses, _ = answers.per_pair(-answers.log_probs)
        return losses, answers.per_pair(answers.counts)[0]


def log_odds(log_probs: torch.Tensor) -> torch.Tensor:
    """Return log(p / (1 - p)) of log p."""
    known = log_probs.clamp(max=CERTAIN)
    return known - torch.log(-torch.expm1(known))


def input_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of a model's first floating-point weight."""
    return next(p.dtype for p in model.parameters() if p.is_floating_point())
