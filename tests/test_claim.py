"""What a run asks of a cluster that it joins, and what is said where it cannot have it."""

from __future__ import annotations

from typing import Any

import pytest

from raytune_ft import claim
from raytune_ft.cluster import ray_session
from raytune_ft.config.schema import Recipe
from raytune_ft.errors import RecipeError, TrainingError

HEAD = {"Alive": True, "Resources": {"CPU": 0.0, "memory": 1e9}}
"""As `deploy/` has it: it only schedules."""
OURS = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.13.0", "raytune_ft": "0.1.0"}


def recipe(workers: int, least: int | None = None, accumulation: int = 16) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "any"},
            "data": {"sources": [{"path": "rows.jsonl"}]},
            "train": {"accumulation": accumulation},
            "run": {"workers": workers, "min_workers": least},
        }
    )


def gpus(number: int, cores: float = 8.0) -> dict[str, Any]:
    return {"Alive": True, "Resources": {"CPU": cores, "GPU": float(number)}}


def test_gpus_that_no_node_will_bring_are_refused_with_what_takes_the_same_steps() -> None:
    nodes = [HEAD, gpus(2), gpus(2)]
    with pytest.raises(RecipeError) as told:
        list(claim.check_room(recipe(8), nodes, {"GPU": 4.0}, gpu=True, scaled=False))
    assert str(told.value) == (
        "run.workers: 8 workers need a GPU each, the cluster has room for 4 on 3 nodes and no "
        "autoscaler; set run.workers=4 train.accumulation=32, or start nodes that have GPUs"
    )


def test_gpus_that_an_autoscaler_brings_are_waited_for() -> None:
    (line,) = claim.check_room(recipe(8), [HEAD], {}, gpu=True, scaled=True)
    assert line == (
        "waiting for nodes: 8 workers need a GPU each, the cluster has room for 0 on 1 node; "
        "its autoscaler starts more"
    )


def test_gpus_that_others_use_are_waited_for() -> None:
    (line,) = claim.check_room(recipe(4), [HEAD, gpus(8)], {"GPU": 3.0}, gpu=True, scaled=False)
    assert line.startswith("waiting for room: 4 workers need a GPU each, 3 find it now")


def test_nothing_is_said_where_all_find_room() -> None:
    nodes = [HEAD, gpus(4), gpus(4)]
    assert not list(claim.check_room(recipe(8), nodes, {"GPU": 8.0}, gpu=True, scaled=False))
    cores = [HEAD, {"Alive": True, "Resources": {"CPU": 1.0}}]
    assert not list(claim.check_room(recipe(8), cores, {"CPU": 1.0}, gpu=False, scaled=False))


def test_fewer_than_all_are_enough_where_the_recipe_says_so() -> None:
    found = claim.check_room(recipe(8, least=2), [gpus(2)], {"GPU": 2.0}, gpu=True, scaled=False)
    assert "2 find it now" in next(found)
    with pytest.raises(RecipeError, match="room for 2"):
        list(claim.check_room(recipe(8, least=3), [gpus(2)], {}, gpu=True, scaled=False))


def test_a_gpu_without_a_core_beside_it_is_no_room() -> None:
    nodes = [gpus(8, cores=0.0), {"Alive": True, "Resources": {"CPU": 8.0}}]
    with pytest.raises(RecipeError, match="room for 0"):
        list(claim.check_room(recipe(2), nodes, {"GPU": 8.0}, gpu=True, scaled=False))


@pytest.mark.parametrize(
    ("nodes", "scaled", "expected"),
    [
        ([HEAD, gpus(1)], False, True),
        ([HEAD, gpus(0)], False, False),
        ([HEAD], True, True),  # nodes with GPUs will come; the head trains nothing
        ([HEAD], False, False),
        ([gpus(0)], True, False),  # a cluster of cores
    ],
)
def test_the_clusters_devices_decide(nodes: list[Any], scaled: bool, expected: bool) -> None:
    assert claim._on_gpu(nodes, scaled=scaled) is expected


@pytest.mark.parametrize(
    ("names", "scaled"),
    [
        ([], False),
        (["node_cf9fceeda3c3f198a731e99249fc2d7ea554c3070baa0e33cf33e576"], False),
        (["head"], True),
        (["headgroup", "gpu8"], True),
        (["local.cluster.node"], True),
    ],
)
def test_an_autoscaler_is_known_by_its_names_of_node_types(names: list[str], scaled: bool) -> None:
    assert claim.is_scaled(names) is scaled


def test_versions_are_named_where_they_differ() -> None:
    assert claim.differences(OURS, OURS) == []
    theirs = {"python": "3.11.7", "ray": "2.60.0", "torch": "2.12.0"}
    assert claim.differences(OURS, theirs) == [
        "torch 2.12.0, not 2.13.0",
        "raytune_ft missing, not 0.1.0",
    ]


def test_a_node_tells_what_this_process_has() -> None:
    import platform

    import torch

    from raytune_ft import __version__

    found, files = claim._asking()()
    assert found["python"] == platform.python_version()
    assert found["raytune_ft"] == __version__
    assert torch.__version__ == found["torch"]
    assert len(files) == 64


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "ray://127.0.0.1:10001"])
def test_an_address_for_other_programs_is_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(TrainingError, match="`ray job submit --address`"), ray_session():
        pass
