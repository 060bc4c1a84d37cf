"""Importance: values and outcomes of trials in, how much each field alone decides their order out.

The method is the effect size of the Kruskal-Wallis test, epsilon squared (Tomczak & Tomczak 2014):
the variance between groups of a field's values as a share of all, on the ranks of the outcomes,
less what groups of that number and size get by chance. Ranks, because one trial that diverged
would be the whole variance else; groups, because a learning rate is best somewhere in between. A
field's choices are its groups; numbers from a range are cut into groups of equal size. What two
fields do only together is not seen. No torch.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

LEAST = 8
"""Trials with an outcome below which nothing is said: three groups would be of two."""
SHUFFLES = 999
SURE = 0.95
SEED = 7
GROUPS = 6
"""Groups at most that numbers of a range are cut into."""

Ranks = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """What one field decides."""

    name: str
    share: float
    """Of the variance of the trials' ranks, 0 to 1."""
    by_chance: float
    """What 95% of shuffles of the outcomes stay under."""
    with_it: list[str] = field(default_factory=list)
    """Fields that move with it from trial to trial, so that they cannot be told apart."""

    @property
    def is_sure(self) -> bool:
        """Whether it is more than chance gives."""
        return self.share > self.by_chance


def importance(values: Sequence[Mapping[str, Any]], order: Sequence[float]) -> list[Share]:
    """Return the share of each field that is not the same in all trials, the largest first.

    Args:
        values: of n trials, field -> value.
        order: n numbers, the lower the better; equal ones tie.

    Returns:
        Nothing where n is under `LEAST`, or all trials are as good as each other.
    """
    if len(values) < LEAST or len(set(order)) < 2:
        return []
    ranks, random = ranked(order), np.random.default_rng(SEED)
    shuffled = random.permuted(np.tile(ranks, (SHUFFLES, 1)), axis=1)
    found: list[Share] = []
    seen: dict[tuple[int, ...], Share] = {}
    for name in dict.fromkeys(key for one in values for key in one):
        groups = grouped([_key(one.get(name)) for one in values])
        if groups.max() == 0:
            continue
        same = seen.get(tuple(groups.tolist()))
        if same is not None:
            same.with_it.append(name)
            continue
        chance = np.quantile(_epsilon(shuffled, groups), SURE)
        share = max(0.0, float(_epsilon(ranks[None], groups)[0]))
        found.append(Share(name, share, max(0.0, float(chance))))
        seen[tuple(groups.tolist())] = found[-1]
    return sorted(found, key=lambda one: (-one.share, one.name))


def ranked(order: Sequence[float]) -> Ranks:
    """Return ranks from 0, equal numbers sharing the mean of theirs; shape (n,)."""
    _, place, counts = np.unique(np.asarray(order), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    means: Ranks = (ends - counts + ends - 1) / 2
    return means[place]


def grouped(values: Sequence[Hashable]) -> Groups:
    """Return the number of each value's group, from 0 in order of appearance; shape (n,).

    Numbers with few repetitions are cut into about sqrt(n) groups of equal size; others are
    groups as they are.
    """
    n, distinct = len(values), len(set(values))
    most = max(2, min(GROUPS, round(n**0.5)))
    is_numeric = all(isinstance(one, float) for one in values)
    if is_numeric and distinct > most:
        ranks = ranked([one for one in values if isinstance(one, float)])
        values = np.minimum((ranks * most / n).astype(np.int64), most - 1).tolist()
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return np.array([places[value] for value in values])


def _key(value: Any) -> Hashable:
    """Return a number as a float, whose 1 and 1.0 are one, and anything else as its words."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number else repr(value)


def _epsilon(ranks: Ranks, groups: Groups) -> Ranks:
    """Return epsilon squared of each row of ranks; shapes (m, n) and (n,) to (m,)."""
    members = np.eye(int(groups.max()) + 1)[groups]  # (n, k)
    counts, n = members.sum(0), len(groups)
    centred = ranks - ranks.mean(1, keepdims=True)
    between = ((centred @ members) ** 2 / counts).sum(1)
    total = (centred**2).sum(1)
    within = (total - between) / max(1, n - len(counts))
    return np.asarray((between - (len(counts) - 1) * within) / total)
