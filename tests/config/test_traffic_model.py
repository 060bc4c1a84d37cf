"""The model of traffic and networks against arithmetic by hand, messages one by one, and laws."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytune_ft.config import catalog
from raytune_ft.config.estimates import links, traffic
from raytune_ft.config.estimates.footprint import Counts, count
from raytune_ft.config.estimates.links import FABRICS, Fabric, Link
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import Recipe
from raytune_ft.config.zero import WHOLE_GRADIENTS

KINDS = ("all_reduce", "all_gather", "reduce_scatter")
LINKS = st.builds(Link, st.floats(1e6, 1e12), st.floats(0, 1e-2))
SIZES = st.floats(1, 1e11)
RANKS = st.integers(1, 600)
NETWORKS = st.builds(Fabric, st.just("any"), LINKS, LINKS, st.integers(1, 16), st.integers(1, 8))


def case(*overrides: str, model: str = "internlm_7b", recipe: str = "qlora_oasst1_e3"
         ) -> tuple[Recipe, Counts]:  # fmt: skip
    found = load_recipe(f"{model}_{recipe}", overrides)
    return found, count(catalog.card(model).config, found)


def messages(kind: str, size: float, ranks: int, link: Link) -> tuple[float, float]:
    """Pass a ring's parts on one by one; return when the last arrives, and what a rank has sent.

    A rank sends a part when it has come, added to its own or as it is, and the one before is out.
    """
    part, laps = size / ranks, 2 if kind == "all_reduce" else 1
    came = [0.0] * ranks
    free = [0.0] * ranks
    sent = 0.0
    for _ in range(laps * (ranks - 1)):
        out = [max(came[r], free[r]) + part / link.bandwidth for r in range(ranks)]
        free = out
        came = [out[r - 1] + link.latency for r in range(ranks)]
        sent += part
    return max(came), sent


@pytest.mark.parametrize("kind", KINDS)
@given(size=SIZES, ranks=st.integers(1, 24), link=LINKS)
def test_a_ring_takes_as_long_as_its_messages(
    kind: str, size: float, ranks: int, link: Link
) -> None:
    seconds, sent = messages(kind, size, ranks, link)
    assert links.ring_seconds(kind, size, ranks, link) == pytest.approx(seconds, rel=1e-9)
    assert traffic.sent(kind, size, ranks) == pytest.approx(sent, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(size=SIZES, own=st.integers(1, 16), nodes=st.integers(1, 40), speed=st.floats(1e6, 1e12))
def test_two_levels_equal_one_ring_where_every_rank_has_equal_links(
    kind: str, size: float, own: int, nodes: int, speed: float
) -> None:
    """Without latency, of which two levels have less."""
    link = Link(speed, 0.0)
    alike = Fabric("alike", link, link, per_node=own, cards=own)
    flat = links.flat_seconds(kind, size, own * nodes, alike)
    assert links.hierarchical_seconds(kind, size, own * nodes, alike) == pytest.approx(flat)
    slow = replace(alike, inside=Link(speed, 1e-3), across=Link(speed, 1e-3))
    levels = links.hierarchical_seconds(kind, size, own * nodes, slow)
    assert levels <= links.flat_seconds(kind, size, own * nodes, slow) * (1 + 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(size=SIZES, ranks=RANKS, more=RANKS, fabric=NETWORKS)
def test_more_ranks_bytes_or_latency_take_no_less_time(
    kind: str, size: float, ranks: int, more: int, fabric: Fabric
) -> None:
    taken = links.collective_seconds(kind, size, ranks, fabric)
    allowed = taken * (1 - 1e-9)
    assert links.collective_seconds(kind, size, 1, fabric) == 0 <= taken
    assert links.collective_seconds(kind, size, ranks + more, fabric) >= allowed
    assert links.collective_seconds(kind, 2 * size, ranks, fabric) >= allowed
    worse = replace(fabric, across=Link(fabric.across.bandwidth / 2, 2 * fabric.across.latency))
    assert links.collective_seconds(kind, size, ranks, worse) >= allowed
    if ranks > 1:  # every rank has to get what it lacks, by its node's ways in
        lacks = size * (ranks - 1) / ranks
        ways = max(fabric.inside.bandwidth, fabric.out)
        assert taken >= lacks / ways / (1 + 1e-9)


@given(work=st.floats(1e-3, 1e3), ranks=RANKS, fabric=NETWORKS, parts=st.integers(1, 50))
def test_efficiency_is_a_share(work: float, ranks: int, fabric: Fabric, parts: int) -> None:
    found = traffic.Exchange({"all_reduce": 10**8}, {"all_reduce": parts})
    share = links.efficiency(work, found, ranks, fabric)
    assert 0 < share <= 1 and (share == 1) == (ranks == 1)
    assert links.efficiency(2 * work, found, ranks, fabric) >= share
    split = replace(found, calls={"all_reduce": parts + 1})
    assert links.efficiency(work, split, ranks, fabric) <= share * (1 + 1e-9)


def test_a_tree_goes_up_and_down_by_the_logarithm_of_the_nodes() -> None:
    """Two trees at once send all bytes up and down at full speed."""
    far = Fabric("far", Link(1e9, 0.0), Link(1e9, 1.0), per_node=1)
    for nodes, depth in ((2, 1), (8, 3), (9, 4), (512, 9)):
        assert links.tree_seconds(1e9, nodes, far) == pytest.approx(2 * depth + 2)
    assert links.collective_seconds("all_reduce", 1e9, 512, far) == pytest.approx(20)
    assert links.ring_seconds("all_reduce", 1e9, 512, far.across) > 1000


def test_bytes_of_the_shipped_recipe_are_those_of_its_table() -> None:
    """P = 159,907,840 adapter weights: 4 bytes summed, 2 gathered, (N - 1) / N of 10 P sent."""
    recipe, counts = case("train.micro_batch_size=4", "train.accumulation=4")
    found = traffic.exchange(recipe, counts)
    assert counts.trained == 159_907_840
    assert found.payloads == {"all_reduce": 4 * 159_907_840, "all_gather": 2 * 159_907_840}
    assert found.sent(2) == 799_539_200 and found.sent(4) == 1_199_308_800
    assert found.sent(8) == 1_399_193_600
    assert found.calls == {"all_reduce": 8, "all_gather": 1}


@pytest.mark.parametrize(
    ("zero", "per_trained", "calls"),
    [
        ("none", 4, {"all_reduce": 2 * 7 * 32}),
        ("zero1", 4 + 2, {"all_reduce": 8, "all_gather": 1}),
        ("zero2", 4 + 2, {"all_reduce": 8, "all_gather": 1}),
        ("zero2_offload", 4 * 16 + 2, {"all_reduce": 8 * 16, "all_gather": 1}),
    ],
)
def test_presets_exchange_what_docs_scaling_says(
    zero: str, per_trained: int, calls: dict[str, int]
) -> None:
    override = f"train.deepspeed={zero}"
    optimizer = "train.optimizer=paged_adamw_32bit"
    recipe, counts = case(override, optimizer, "train.accumulation=16")
    found = traffic.exchange(recipe, counts)
    assert sum(found.payloads.values()) == per_trained * counts.trained
    assert found.calls == calls


def test_full_training_of_7b_sends_what_docs_scaling_says() -> None:
    """P = W = 7,321,403,392 at 2 bytes: 64 GB a step under ZeRO-1, 51 GB a pass under 2 and 3."""

    def sent(zero: str, accumulation: int) -> float:
        recipe, counts = case(f"train.deepspeed={zero}", f"train.accumulation={accumulation}",
                              recipe="full_oasst1_e3")  # fmt: skip
        assert counts.trained > WHOLE_GRADIENTS
        return traffic.exchange(recipe, counts).sent(8) / 1e9

    p = case(recipe="full_oasst1_e3")[1].trained / 1e9
    assert p == pytest.approx(7.32, abs=0.01)
    assert sent("zero1", 4) == pytest.approx(7 / 8 * (8 + 2) * p)
    assert sent("zero2", 5) - sent("zero2", 4) == pytest.approx(7 / 8 * 8 * p)
    third = sent("zero3", 5) - sent("zero3", 4)
    assert third == pytest.approx(7 / 8 * (2 * 2 + 4) * p, rel=1e-3)  # norms are not cut up


def test_what_is_faster_in_a_node_is_used_there() -> None:
    """64 ranks on eight nodes with eight cards each, or one: bytes by hand."""
    size = 1e9
    many = links.collective_seconds("all_reduce", size, 64, FABRICS["ib400"])
    assert many == pytest.approx(2 * 63 / 64 * size / 300e9, rel=0.35)
    one_card = links.collective_seconds("all_reduce", size, 64, FABRICS["eth25"])
    by_hand = 2 * 7 / 8 * size / 300e9 + 2 * 7 / 8 * size / 2.8e9  # inside, then through the card
    assert one_card == pytest.approx(by_hand, rel=1e-2)
    inside = [links.collective_seconds(k, size, 8, FABRICS["ib400"]) for k in KINDS]
    assert inside == [links.collective_seconds(k, size, 8, FABRICS["eth25"]) for k in KINDS]


@pytest.mark.parametrize(
    ("workers", "said"),
    [
        (8, "1.40 GB sent per worker and step; 8 workers keep {} of their speed over NVLink; each "
            "in a machine of its own, {} over InfiniBand 400G, {} over Ethernet 25G"),
        (64, "1.57 GB sent per worker and step; 64 workers in machines of 8 keep {} of their speed "
             "over InfiniBand 400G, {} over Ethernet 25G"),
    ],
)  # fmt: skip
def test_a_plan_says_what_networks_leave(workers: int, said: str) -> None:
    """Seconds by hand, without latencies, which are below three thousandths here."""
    recipe, counts = case("train.accumulation=4", f"run.workers={workers}")
    found = links.shares(recipe, counts, work=1.82)
    assert found is not None
    p = counts.trained
    sent = (workers - 1) / workers * 10 * p
    times = [sent / 300e9, sent / 45e9, sent / 2.8e9]
    if workers == 64:  # seven eighths inside and seven eighths of eight nodes' parts across
        times = [sent / 300e9, 7 / 8 * 10 * p / 300e9 + 7 / 8 * 10 * p / 2.8e9]
    by_hand = [1.82 / (1.82 + seconds) for seconds in times]
    assert list(found.kept.values()) == pytest.approx(by_hand, abs=3e-3)
    assert found.line(workers) == said.format(*(f"{share:.1%}" for share in found.kept.values()))
    assert links.shares(case("run.workers=1")[0], counts, work=1.82) is None
