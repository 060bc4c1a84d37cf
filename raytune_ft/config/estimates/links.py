"""Links: payloads of collectives and a network in, seconds and shares of a step out. No torch.

Every message costs a latency and its bytes over a bandwidth (Hockney 1994). In a ring all ranks
pass parts on at the same time (Patarasuk and Yuan 2009); in two levels the GPUs of a node first
share the work out among themselves, so that only a part of it goes over each rank's share of the
network; in two trees at once (Sanders, Speck and Traeff 2009) latency grows by the logarithm of the
nodes. The fastest of these is taken, as NCCL chooses by a table of its own.

Units: bytes, seconds, bytes per second; a link carries its bandwidth in both directions at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from raytune_ft.config.estimates.footprint import Counts
from raytune_ft.config.estimates.traffic import ROUNDS, Exchange, exchange
from raytune_ft.config.schema import Recipe


@dataclass(frozen=True)
class Link:
    """A way between two ranks."""

    bandwidth: float
    """Bytes per second."""
    latency: float
    """Seconds of a message without bytes."""


@dataclass(frozen=True)
class Fabric:
    """A cluster's network: GPUs in nodes, nodes by network cards."""

    name: str
    inside: Link
    """Between GPUs of a node."""
    across: Link
    """Of one network card."""
    per_node: int
    """GPUs of a node."""
    cards: int = 1
    """Network cards of a node, which its GPUs share."""

    def nodes(self, ranks: int) -> int:
        """Return how many nodes so many ranks fill."""
        return -(-ranks // self.per_node)

    @property
    def out(self) -> float:
        """Bytes per second that all ranks of a node send to other nodes together."""
        return self.cards * self.across.bandwidth


IN_A_NODE = 8
"""GPUs that NVLink joins in most machines."""
NVLINK = Link(300e9, 3.4e-6)
"""As NCCL's own tests measured it on nodes of four and eight; latency of its tuning table."""
INFINIBAND = Link(45e9, 14e-6)
"""400 Gbit/s less what headers take; latency of NCCL's tuning table."""
ETHERNET = Link(2.8e9, 50e-6)
"""25 Gbit/s by TCP; latency assumed."""
FABRICS = {
    "nvlink": Fabric("NVLink", NVLINK, NVLINK, per_node=1, cards=1),
    "ib400": Fabric("InfiniBand 400G", NVLINK, INFINIBAND, IN_A_NODE, cards=8),
    "eth25": Fabric("Ethernet 25G", NVLINK, ETHERNET, IN_A_NODE, cards=1),
    "ib400-single": Fabric("InfiniBand 400G", INFINIBAND, INFINIBAND, per_node=1),
    "eth25-single": Fabric("Ethernet 25G", ETHERNET, ETHERNET, per_node=1),
}
"""NVLink is one domain of all ranks. The next two are nodes of eight GPUs by NVLink, with a card
for each GPU or one for all; the last two have one GPU per node."""


def ring_seconds(kind: str, size: float, ranks: int, link: Link) -> float:
    """Return the seconds of a collective in a ring whose links are all alike.

    Args:
        kind: of `traffic.ROUNDS`.
        size: its payload.
        ranks: in the ring; one sends nothing.
        link: between neighbours.
    """
    steps = ROUNDS[kind] * (ranks - 1)
    return steps * (link.latency + size / ranks / link.bandwidth)


def flat_seconds(kind: str, size: float, ranks: int, fabric: Fabric) -> float:
    """Return the seconds of rings through all ranks, one ring through each network card."""
    if fabric.nodes(ranks) == 1:
        return ring_seconds(kind, size, ranks, fabric.inside)
    slowest = Link(
        min(fabric.inside.bandwidth, fabric.out),
        max(fabric.inside.latency, fabric.across.latency),
    )
    return ring_seconds(kind, size, ranks, slowest)


def hierarchical_seconds(kind: str, size: float, ranks: int, fabric: Fabric) -> float:
    """Return the seconds of rings in every node and, of each GPU's part, across nodes.

    A sum is scattered in the node, summed across, and gathered in the node; a gathering or a
    scattering takes the two levels one after the other.
    """
    nodes, own = fabric.nodes(ranks), min(ranks, fabric.per_node)
    share = Link(fabric.out / own, fabric.across.latency)
    inner = "reduce_scatter" if kind == "all_reduce" else kind
    levels = 2 if kind == "all_reduce" else 1
    inside = levels * ring_seconds(inner, size, own, fabric.inside)
    return inside + ring_seconds(kind, size / own, nodes, share)


def tree_seconds(size: float, ranks: int, fabric: Fabric) -> float:
    """Return the seconds of a sum up and down two trees of nodes at once, chains in every node."""
    nodes, own = fabric.nodes(ranks), min(ranks, fabric.per_node)
    if ranks == 1:
        return 0.0
    depth = math.ceil(math.log2(nodes))
    slowest = fabric.inside.bandwidth if nodes == 1 else min(fabric.inside.bandwidth, fabric.out)
    hops = depth * fabric.across.latency + (own - 1) * fabric.inside.latency
    return 2 * hops + 2 * size / slowest


def collective_seconds(kind: str, size: float, ranks: int, fabric: Fabric) -> float:
    """Return the seconds of a collective by the fastest of these ways."""
    found = [
        flat_seconds(kind, size, ranks, fabric),
        hierarchical_seconds(kind, size, ranks, fabric),
    ]
    if kind == "all_reduce":
        found.append(tree_seconds(size, ranks, fabric))
    return min(found)


def exchange_seconds(found: Exchange, ranks: int, fabric: Fabric) -> float:
    """Return the seconds of a step's collectives, one after the other; each kind in equal parts."""
    return sum(
        found.calls[kind] * collective_seconds(kind, size / found.calls[kind], ranks, fabric)
        for kind, size in found.payloads.items()
    )


def efficiency(work: float, found: Exchange, ranks: int, fabric: Fabric) -> float:
    """Return the share of a step in which ranks work, if nothing travels beside the work.

    Args:
        work: seconds of a rank's passes and update.
        found: what is exchanged.
        ranks: of the run.
        fabric: between them.
    """
    return work / (work + exchange_seconds(found, ranks, fabric))


@dataclass(frozen=True)
class Shares:
    """What networks leave of the speed of a recipe's workers."""

    sent: float
    """Bytes that each worker sends in an optimizer step."""
    kept: dict[str, float]
    """Name of a network -> share of the time that is work."""

    def line(self, workers: int) -> str:
        """Say it in one line."""
        first, *others = (f"{share:.1%} {{}}over {name}" for name, share in self.kept.items())
        where = "" if workers <= IN_A_NODE else f" in machines of {IN_A_NODE}"
        apart = "; each in a machine of its own, " if workers <= IN_A_NODE else ", "
        rest = ", ".join(one.format("") for one in others)
        return (
            f"{self.sent / 1e9:.2f} GB sent per worker and step; {workers} workers{where} keep "
            f"{first.format('of their speed ')}{apart}{rest}"
        )


def shares(recipe: Recipe, counts: Counts, work: float) -> Shares | None:
    """Predict what networks leave of the speed of a recipe's workers; None for one worker.

    Args:
        recipe: in its layout.
        counts: of its model.
        work: seconds of a step's passes and update.
    """
    workers = recipe.run.workers
    if workers == 1:
        return None
    found = exchange(recipe, counts)
    together = workers <= IN_A_NODE
    names = ["nvlink", "ib400-single", "eth25-single"] if together else ["ib400", "eth25"]
    kept = {FABRICS[n].name: efficiency(work, found, workers, FABRICS[n]) for n in names}
    return Shares(found.sent(workers), kept)
