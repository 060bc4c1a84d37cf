"""Claim: what a run asks of a cluster that others may use as well, and whether it can have it.

In: a recipe, and a Ray that was joined. Out: whether workers are on GPUs; one line where they have
to wait; a refusal where they would wait for ever, or where a node has other versions. The cluster
is asked, never this process's own devices: a driver may be on a head without a GPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raytune_ft import resources
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError, TrainingError
from raytune_ft.waiting import NOISE, room_for

PATIENCE_S = 60.0
"""For a node's answer; one that gives none in this time is not asked again."""
STATUS_KEY = b"__autoscaling_status"
"""Where Ray's monitor writes what it sees, every five seconds (ray_constants)."""
LISTED = "node_"
"""How names of node types begin where nothing starts nodes (util.format_readonly_node_type)."""

Node = Mapping[str, Any]
"""One of `ray.nodes()`."""


def lines(recipe: Recipe) -> Iterator[str]:
    """Look at the cluster that was joined; yield what a person should know before workers start.

    Nothing is yielded, and nothing asked, where Ray was started by this process.

    Raises:
        RecipeError: there will never be room for the workers.
        TrainingError: a node that may train has other versions than this process.
    """
    if not os.environ.get("RAY_ADDRESS"):
        return
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    scaled = is_scaled(_node_types())
    gpu = _on_gpu(nodes, scaled=scaled)
    yield from check_room(recipe, nodes, ray.available_resources(), gpu=gpu, scaled=scaled)
    some = {"GPU": 1.0} if gpu else {"CPU": NOISE}
    yield from _check_versions([node for node in nodes if room_for([node], some)])


def on_gpu() -> bool:
    """Tell whether workers are to have a GPU each: there is one, or nodes that have will come."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    joined = bool(os.environ.get("RAY_ADDRESS"))
    return _on_gpu(nodes, scaled=joined and is_scaled(_node_types()))


def check_room(
    recipe: Recipe,
    nodes: Sequence[Node],
    free: Mapping[str, float],
    *,
    gpu: bool,
    scaled: bool,
) -> Iterator[str]:
    """Yield a line if workers have to wait; RecipeError if that would be for ever.

    Args:
        recipe: names the workers.
        nodes: that are there.
        free: what nobody has taken just now, of all nodes together.
        gpu: whether a worker needs a GPU.
        scaled: whether an autoscaler starts nodes.
    """
    workers = recipe.run.workers
    cores = sum(node["Resources"].get("CPU", 0.0) for node in nodes)
    each = {"CPU": resources.cpus_per_worker(workers, cores), "GPU": 1.0 if gpu else 0.0}
    there = room_for(nodes, each)
    need = f"{workers} workers need {'a GPU each' if gpu else 'cores'}"
    if there < (recipe.run.min_workers or workers):
        on = f"{len(nodes)} node" if len(nodes) == 1 else f"{len(nodes)} nodes"
        has = f"the cluster has room for {there} on {on}"
        if scaled:
            yield f"waiting for nodes: {need}, {has}; its autoscaler starts more"
            return
        others = "start nodes that have GPUs" if gpu else "start nodes that have cores"
        fewer = f"set {resources.same_steps(recipe, there)}, or " if there else ""
        raise RecipeError(f"run.workers: {need}, {has} and no autoscaler; {fewer}{others}")
    kind = "GPU" if gpu else "CPU"
    now = int(free.get(kind, 0.0) / each[kind] + NOISE)
    if now < workers:
        yield f"waiting for room: {need}, {now} find it now; others use the rest"


def is_scaled(node_types: Sequence[str]) -> bool:
    """Tell whether an autoscaler gave these names of node types; without one they are numbers."""
    return any(not name.startswith(LISTED) for name in node_types)


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Name what a node has otherwise than this process: `torch 2.12.0, not 2.13.0`."""
    return [
        f"{name} {theirs.get(name) or 'missing'}, not {version}"
        for name, version in ours.items()
        if theirs.get(name) != version
    ]


def _on_gpu(nodes: Sequence[Node], *, scaled: bool) -> bool:
    if any(node["Resources"].get("GPU", 0.0) >= 1 for node in nodes):
        return True
    return scaled and not any(node["Resources"].get("CPU", 0.0) > 0 for node in nodes)


def _node_types() -> list[str]:
    """List the names of types under which Ray's monitor counts the nodes."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.experimental.internal_kv import _internal_kv_get

    if is_autoscaler_v2(fetch_from_server=True):
        status = get_cluster_status(ray.get_runtime_context().gcs_address)
        return [node.ray_node_type_name for node in status.active_nodes + status.idle_nodes]
    told = _internal_kv_get(STATUS_KEY)
    report = json.loads(told).get("autoscaler_report") if told else None
    return list((report or {}).get("active_nodes") or {})


def _check_versions(nodes: Sequence[Node]) -> Iterator[str]:
    """Ask every node for its versions; yield where files differ under the same version."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = _asking()
    ours, files = ask()
    task = ray.remote(num_cpus=0, max_retries=0)(ask)
    asked = {
        task.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        ).remote(): node
        for node in nodes
    }
    answered, _ = ray.wait(list(asked), num_returns=len(asked), timeout=PATIENCE_S)
    for ref in answered:
        where = f"node {asked[ref]['NodeManagerAddress']}"
        try:
            theirs, their_files = ray.get(ref)
        except ray.exceptions.RayError as error:
            raise TrainingError(
                f"{where}: no task can run there: {str(error).strip().splitlines()[-1]}"
            ) from None
        if found := differences(ours, theirs):
            raise TrainingError(
                f"{where}: has {'; '.join(found)} as this driver; install the same on all nodes"
            )
        if files != their_files:
            yield f"{where}: its files of raytune_ft are other ones than this driver's"


def _asking() -> Any:
    """Return the function that asks; made here, so that it travels whole to where we are not."""

    def ask() -> tuple[dict[str, str], str]:
        import contextlib
        import hashlib
        import platform
        from importlib import metadata
        from pathlib import Path

        found, digest = {"python": platform.python_version()}, hashlib.sha256()
        for name in ("ray", "torch"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(name)
        with contextlib.suppress(ImportError):
            import raytune_ft  # from working_dir it has no metadata

            found["raytune_ft"] = raytune_ft.__version__
            root = Path(raytune_ft.__file__).parent
            for path in sorted(root.rglob("*.py")):
                digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
        return found, digest.hexdigest()

    return ask
