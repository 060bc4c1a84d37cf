"""Kept beginnings: the longest common one is found, within a number of tokens, by any search."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from raytune_ft.serving.engines import memory
from raytune_ft.serving.engines.memory import SHORTEST, Prefixes

MOST = 120
"""Tokens that are kept at most."""
HEADS = [[1] * SHORTEST, [2] * SHORTEST, [1] * (SHORTEST - 1) + [2], [3]]


class Plain:
    """The same by looking at everything: prompts in the order of their last use."""

    def __init__(self) -> None:
        self.held: list[tuple[str, list[int]]] = []

    def find(self, model: str, ids: Sequence[int]) -> int:
        lengths = [common(held, ids[:-1]) if owner == model else 0 for owner, held in self.held]
        best = max(lengths, default=0)
        if best < SHORTEST:
            return 0
        self.held.append(self.held.pop(lengths.index(best)))
        return best

    def keep(self, model: str, ids: list[int]) -> None:
        if not SHORTEST <= len(ids) <= MOST:
            return
        for place, (owner, held) in enumerate(self.held):
            if owner == model and held[: len(ids)] == ids:
                self.held.append(self.held.pop(place))
                return
        self.held = [
            (owner, held) for owner, held in self.held if owner != model or ids[: len(held)] != held
        ]
        while self.held and sum(len(held) for _, held in self.held) + len(ids) > MOST:
            self.held.pop(0)
        self.held.append((model, ids))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return with how many the same tokens both begin."""
    n = 0
    while n < min(len(one), len(other)) and one[n] == other[n]:
        n += 1
    return n


prompts = st.builds(
    list.__add__, st.sampled_from(HEADS), st.lists(st.integers(1, 2), max_size=20)
).filter(len)
steps = st.lists(
    st.tuples(st.sampled_from(["find", "keep", "oldest", "forget"]), st.sampled_from("ab"), prompts)
)


@settings(max_examples=400, deadline=None)
@given(steps)
def test_what_is_found_is_what_looking_at_all_finds(
    taken: list[tuple[str, str, list[int]]],
) -> None:
    kept, plain = Prefixes(), Plain()
    for what, model, ids in taken:
        if what == "find":
            assert kept.find(model, ids)[1] == plain.find(model, ids)
        elif what == "keep":
            kept.keep(model, ids, list, MOST)
            plain.keep(model, ids)
        elif what == "oldest":
            assert kept.drop_oldest() == bool(plain.held)
            plain.held = plain.held[1:]
        else:
            kept.forget(model)
            plain.held = [one for one in plain.held if one[0] != model]
        assert kept.tokens == sum(len(held) for _, held in plain.held) <= MOST
        assert [(p.model, p.ids.tolist()) for p in kept._held.values()] == plain.held
        assert sum(map(len, kept._alike.values())) == len(plain.held)


def test_no_more_are_kept_than_may_be() -> None:
    kept = Prefixes()
    for number in range(memory.MOST_KEPT + 5):
        kept.keep("a", [number] * SHORTEST, list, 10**6)
    assert len(kept._held) == memory.MOST_KEPT
    assert kept.find("a", [4] * 20) == ([], 0)
    assert kept.find("a", [5] * 20)[1] == SHORTEST
