"""Way: how workers find a run's folder; a folder in, plain values that travel to every node out.

Apart from `carriage`, which goes that way: Ray Train's controller unpacks these values as well, and
would import there what only workers need.
"""

from __future__ import annotations

import os
import uuid
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from raytune_ft.storing.home import Home
from raytune_ft.training.run_folder import RunFolder

NONCE = ".driver"
"""In the run's folder: which driver's it is."""
CALLS_AT_ONCE = 16


@dataclass(frozen=True)
class Way:
    """How workers find the run; travels to every node."""

    path: str
    """Of the run's folder, on the driver's node."""
    nonce: str
    home: Any
    """The actor; None where there is but this node."""


def way_of(run: RunFolder) -> Way:
    """Make what workers find the run by; the actor that holds it goes with this driver."""
    nonce = uuid.uuid4().hex
    (run.path / NONCE).write_text(nonce, encoding="utf-8")
    if len(ray.nodes()) == 1 and not os.environ.get("RAY_ADDRESS"):
        return Way(str(run.path), nonce, None)
    actor = ray.remote(num_cpus=0)(Home).options(
        scheduling_strategy=beside_driver(), max_concurrency=CALLS_AT_ONCE, max_restarts=-1
    )
    return Way(str(run.path), nonce, actor.remote(str(run.path)))


def beside_driver() -> NodeAffinitySchedulingStrategy:
    """Return the strategy for actors that have to be where the driver is."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
