"""Sampling: the logits of some answers' next tokens in, one id for each out, all rows at once.

Which token an answer gets depends on its logits, its own rule, its seed and how many tokens it
has, never on who else is in the batch: the random number of the n-th token is a hash of seed and
n, and a token is where it falls in the cumulated probabilities. torch's own drawing would take
its numbers from one state for the whole batch.

The order is transformers': penalties, temperature, top-k, top-p. Penalties are OpenAI's, on what
the answer has so far. Chances are natural logarithms of the model's own distribution.

Shapes: B = rows, V = words, K = words that are looked at in order of likelihood.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

FIRST = 256
"""Words that are put in order at first where only a share of probability bounds them."""
LEAST_HEAT = 1e-30
"""Lower temperatures are this one: in float32 they would be 0, and 0 / 0 is no number."""
_MASK = 2**64 - 1


class Rule(Protocol):
    """How an answer is drawn; `chat.Sampling` is one."""

    @property
    def temperature(self) -> float:
        """0 is greedy."""

    @property
    def top_p(self) -> float:
        """Share of probability that is kept; 1 keeps all."""

    @property
    def top_k(self) -> int:
        """Words that are kept; 0 keeps all."""

    @property
    def seed(self) -> int:
        """Of the answer's random numbers."""

    @property
    def frequency_penalty(self) -> float:
        """Taken off a word's logit for each time that the answer has it."""

    @property
    def presence_penalty(self) -> float:
        """Taken off once the answer has the word."""

    @property
    def logprobs(self) -> int | None:
        """The likeliest words to tell beside each one chosen; None: nothing."""


@dataclass(frozen=True)
class Told:
    """How likely a token was, and which ones were likeliest."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Draw:
    """One answer: its rule, and what it has so far."""

    rule: Rule
    n_drawn: int = 0
    counts: torch.Tensor | None = field(default=None, repr=False)
    """How often each word is in the answer (V,), where the rule has penalties."""

    @property
    def penalised(self) -> bool:
        """Whether the answer's own words change its logits."""
        return bool(self.rule.frequency_penalty or self.rule.presence_penalty)


@dataclass(frozen=True)
class Chosen:
    """The next token of each row."""

    ids: torch.Tensor
    """(B,), where the logits are."""
    told: dict[int, Told]
    """By row, of those that ask."""
    broken: torch.Tensor
    """(B,), true where the logits hold a NaN: the id means nothing."""


class Chooser:
    """Chooses for the same rows again and again; made anew where rows come and go."""

    def __init__(self, draws: Sequence[Draw], device: torch.device) -> None:
        self.draws = list(draws)
        rules = [draw.rule for draw in draws]
        drawn = [row for row, rule in enumerate(rules) if rule.temperature > 0.0]
        cut = [row for row in drawn if rules[row].top_k > 0 or rules[row].top_p < 1.0]
        free = [row for row in drawn if not (rules[row].top_k > 0 or rules[row].top_p < 1.0)]
        self._cut = _Group(cut, rules, device)
        self._free = _Group(free, rules, device)
        self._penalised = [row for row, draw in enumerate(draws) if draw.penalised]
        self._asking = [row for row, rule in enumerate(rules) if rule.logprobs is not None]
        self._most = max((rules[row].logprobs or 0 for row in self._asking), default=0)

    def choose(self, logits: torch.Tensor) -> Chosen:
        """Return the next token of each row for float32 logits (B, V), which stay as they are."""
        scores = self._punished(logits)
        highest, ids = scores.max(-1)
        for group, pick in ((self._cut, _ordered), (self._free, _anywhere)):
            if group.rows:
                some = scores if len(group.rows) == len(scores) else scores[group.index]
                numbers = [_uniform(self.draws[r].rule.seed, self.draws[r].n_drawn) for r in group]
                at = torch.tensor(numbers, dtype=torch.float64, device=scores.device)
                ids = ids.index_copy(0, group.index, pick(some, group, at))
        for draw in self.draws:
            draw.n_drawn += 1
        self._count(ids)
        return Chosen(ids, self._tell(logits, ids), highest.isnan())

    def _punished(self, logits: torch.Tensor) -> torch.Tensor:
        if not self._penalised:
            return logits
        scores = logits.clone()
        for row in self._penalised:
            draw = self.draws[row]
            if draw.counts is None:
                draw.counts = torch.zeros_like(logits[row])
            scores[row] -= draw.rule.frequency_penalty * draw.counts
            scores[row] -= draw.rule.presence_penalty * (draw.counts > 0)
        return scores

    def _count(self, ids: torch.Tensor) -> None:
        for row in self._penalised:
            counts = self.draws[row].counts
            if counts is not None:
                counts.index_add_(0, ids[row : row + 1], counts.new_ones(1))

    def _tell(self, logits: torch.Tensor, ids: torch.Tensor) -> dict[int, Told]:
        if not self._asking:
            return {}
        rows = torch.tensor(self._asking, device=logits.device)
        logarithms = logits[rows].log_softmax(-1)
        own = logarithms.gather(1, ids[rows, None])[:, 0].tolist()
        values, words = (found.tolist() for found in logarithms.topk(max(self._most, 1)))
        told = {}
        for place, (row, id_) in enumerate(zip(self._asking, ids[rows].tolist(), strict=True)):
            asked = self.draws[row].rule.logprobs or 0
            top = tuple(zip(words[place][:asked], values[place][:asked], strict=True))
            told[row] = Told(id_, own[place], top)
        return told


class _Group:
    """Rows that are drawn by the same steps, and their rules as tensors (B, 1)."""

    def __init__(self, rows: list[int], rules: Sequence[Rule], device: torch.device) -> None:
        self.rows = rows
        if not rows:
            return
        self.index = torch.tensor(rows, device=device)
        mine = [rules[row] for row in rows]
        heat = [max(rule.temperature, LEAST_HEAT) for rule in mine]
        self.heat = torch.tensor(heat, device=device)[:, None]
        share = [rule.top_p for rule in mine]
        self.share = torch.tensor(share, dtype=torch.float64, device=device)[:, None]
        bounds = [rule.top_k for rule in mine]
        self.bounded = torch.tensor([k > 0 for k in bounds], device=device)[:, None]
        self.most = torch.tensor([k or 2**31 for k in bounds], device=device)[:, None]
        self.looked = max(k or FIRST for k in bounds)
        """Words that are put in order: enough for all that are kept, but for flat shares."""
        self.open = not all(bounds)

    def __iter__(self) -> Iterator[int]:
        return iter(self.rows)


def _anywhere(scores: torch.Tensor, group: _Group, at: torch.Tensor) -> torch.Tensor:
    """Draw from all words, in the vocabulary's order."""
    shares = (_lowered(scores) / group.heat).softmax(-1).double().cumsum(-1)
    return _fallen(shares, at)


def _ordered(scores: torch.Tensor, group: _Group, at: torch.Tensor) -> torch.Tensor:
    """Draw from the likeliest words, in order of likelihood."""
    scores, words = _lowered(scores), scores.shape[-1]
    looked = min(words, group.looked)
    whole = (scores / group.heat).logsumexp(-1, keepdim=True) if group.open else None
    values, ids = scores.topk(looked)
    before = _cumulated(values, whole, group)
    if looked < words and group.open:
        short = (before[:, -1:] < group.share) & ~group.bounded
        if bool(short.any()):
            values, ids = scores.sort(-1, descending=True)
            before = _cumulated(values, whole, group)
    shares = before.diff(dim=-1, prepend=before.new_zeros(len(before), 1))
    kept = shares.masked_fill(before - shares >= group.share, 0.0)
    place = _fallen(kept.cumsum(-1), at)
    return ids.gather(1, place[:, None])[:, 0]


def _lowered(scores: torch.Tensor) -> torch.Tensor:
    """Return scores of which 0 is the highest: a low temperature makes no infinity of them."""
    return scores - scores.amax(-1, keepdim=True)


def _cumulated(values: torch.Tensor, whole: torch.Tensor | None, group: _Group) -> torch.Tensor:
    """Return the cumulated shares (B, K) of values in order, among the words that top-k keeps.

    `whole` is the logarithm of all words' weights, for rows without top-k.
    """
    ranks = torch.arange(values.shape[-1], device=values.device)
    heated = (values / group.heat).masked_fill(ranks >= group.most, -torch.inf)
    of_kept = heated.logsumexp(-1, keepdim=True)
    base = of_kept if whole is None else torch.where(group.bounded, of_kept, whole)
    return (heated - base).exp().double().cumsum(-1)


def _fallen(cumulated: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Return where numbers in [0, 1) fall in cumulated weights (B, K), which need not end at 1."""
    wanted = at[:, None] * cumulated[:, -1:]
    place = torch.searchsorted(cumulated, wanted, right=True)[:, 0]
    # rounding may put a number on the very end, behind the last word that has a share
    last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous())[:, 0]
    return torch.minimum(place, last)


def _uniform(seed: int, n: int) -> float:
    """Return the n-th number in [0, 1) of a seed: SplitMix64 twice (Steele et al., 2014)."""
    return (_mixed(_mixed(seed & _MASK) + n + 1) >> 11) * 2.0**-53


def _mixed(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
