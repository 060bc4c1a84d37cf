"""What is shipped for clusters is read as those read it who will: Ray, Kubernetes, SkyPilot."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from raytune_ft.config import loader
from raytune_ft.serving.arguments import ServeArgs
from raytune_ft.wish import GRACE_S
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
KUBERAY = json.loads((ROOT / "tests/golden/kuberay.json").read_text())
SKYPILOT = json.loads((ROOT / "tests/golden/skypilot.json").read_text())
CLUSTERS = ["cluster.yaml", "deploy/ray-gcp.yaml", "deploy/ray-on-premise.yaml"]
MANIFESTS = ["raycluster", "rayjob", "rayservice"]
SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
GPU = "nvidia.com/gpu"
WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Read by Ray's job supervisor where it runs; three seconds otherwise."""


def manifest(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / f"kuberay/{name}.yaml").read_text())
    return loaded


def cluster_of(found: dict[str, Any]) -> dict[str, Any]:
    """Return the cluster's part of a manifest."""
    spec: dict[str, Any] = found["spec"]
    cluster: dict[str, Any] = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return cluster


def containers(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        yield from group["template"]["spec"]["containers"]


def recipe_of(command: str) -> Any:
    """Resolve the recipe that a command line trains."""
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "raytune_ft.train", "--config"]
    return loader.load_recipe(words[4], words[5:])


@pytest.mark.parametrize("path", CLUSTERS)
def test_ray_up_takes_it(path: str) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / path).read_text()))
    validate_config({**config, "cluster_synced_files": []})
    types = config["available_node_types"]
    assert sum(each["max_workers"] for each in types.values()) >= config["max_workers"] > 0
    head, worker = config["head_start_ray_commands"], config["worker_start_ray_commands"]
    assert any("--head" in line and "--dashboard-host=127.0.0.1" in line for line in head)
    assert any("--address=$RAY_HEAD_IP:6379" in line for line in worker)
    assert any(f"{WAIT}=60 " in line and "--head" in line for line in head)
    assert any(".venv" in each for each in config["rsync_exclude"])


def test_ray_up_refuses_a_misspelt_field() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text()))
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout"):
        validate_config({**config, "cluster_synced_files": [], "idle_timeout": 10})


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_takes_it(name: str) -> None:
    found = manifest(name)
    jsonschema.validate(found, KUBERAY["schemas"][found["kind"]])


@pytest.mark.parametrize("name", MANIFESTS)
def test_kuberay_refuses_a_misspelt_field(name: str) -> None:
    found = manifest(name)
    next(containers(cluster_of(found)))["imagePolicy"] = "Always"
    with pytest.raises(jsonschema.ValidationError, match="imagePolicy"):
        jsonschema.validate(found, KUBERAY["schemas"][found["kind"]])


@pytest.mark.parametrize("name", MANIFESTS)
def test_the_head_has_no_gpu_and_trains_nothing(name: str) -> None:
    cluster = cluster_of(manifest(name))
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    head, *workers = containers(cluster)
    assert GPU not in head["resources"]["limits"]
    assert workers and all(worker["resources"]["limits"][GPU] >= 1 for worker in workers)


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_secret_stands_in_a_manifest(name: str) -> None:
    variables = [each for found in containers(cluster_of(manifest(name))) for each in found["env"]]
    secret = [each for each in variables if any(word in each["name"] for word in SECRET)]
    assert secret
    for each in secret:
        assert set(each) == {"name", "valueFrom"} and set(each["valueFrom"]) == {"secretKeyRef"}


@pytest.mark.parametrize("name", MANIFESTS)
def test_all_nodes_have_one_image_of_the_pinned_ray(name: str) -> None:
    cluster = cluster_of(manifest(name))
    assert len({each["image"] for each in containers(cluster)}) == 1
    pinned = f"ray=={cluster['rayVersion']}"
    assert any(line.startswith(pinned) for line in (ROOT / "requirements.lock").read_text().split())
    assert f"rayproject/ray:{cluster['rayVersion']}-" in (DEPLOY / "Dockerfile").read_text()


def test_the_job_asks_for_the_gpus_of_its_cluster() -> None:
    found = manifest("rayjob")
    recipe = recipe_of(found["spec"]["entrypoint"])
    (group,) = cluster_of(found)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert recipe.run.workers == group["replicas"] * limits[GPU]
    alone = loader.load_recipe("internlm_chat_7b_qlora_oasst1_e3")
    assert recipe.global_batch_size == alone.global_batch_size
    assert recipe.run.name and recipe.run.storage.startswith("s3://")
    assert "runtimeEnvYAML" not in found["spec"]


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_a_stopped_job_may_write_its_checkpoint(name: str) -> None:
    head = next(containers(cluster_of(manifest(name))))
    assert {"name": WAIT, "value": "60"} in head["env"]
    assert GRACE_S < 60


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_keys_of_the_storage_are_the_drivers_alone(name: str) -> None:
    head, *workers = containers(cluster_of(manifest(name)))
    assert any(each["name"].startswith("AWS_") for each in head["env"])
    assert not any(each["name"].startswith("AWS_") for node in workers for each in node["env"])


def test_the_service_is_the_shipped_application() -> None:
    service = yaml.safe_load(manifest("rayservice")["spec"]["serveConfigV2"])
    (ours,) = service["applications"]
    (shipped,) = yaml.safe_load((ROOT / "serve/chat.yaml").read_text())["applications"]
    for key in ("name", "route_prefix", "import_path"):
        assert ours[key] == shipped[key]
    ServeArgs.model_validate(ours["args"])


def test_skypilot_takes_it() -> None:
    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    jsonschema.validate(task, SKYPILOT["task"])
    assert set(task["secrets"].values()) == {None}
    with pytest.raises(jsonschema.ValidationError, match="node_count"):
        jsonschema.validate({**task, "node_count": 2}, SKYPILOT["task"])


def test_skypilots_commands_are_shell_and_its_recipe_is_shipped(tmp_path: Path) -> None:
    import subprocess

    task = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    for part in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[part]], check=True)
    *_, line = task["run"].strip().splitlines()
    gpus = int(task["resources"]["accelerators"].partition(":")[2]) * task["num_nodes"]
    command = line.removeprefix("exec ").partition("run.workers=$")[0]
    values = {**task["envs"], "WORKERS": gpus}
    filled = command.replace("$RUN", values["RUN"]).replace("$STORAGE", values["STORAGE"])
    recipe = recipe_of(f"{filled} run.workers={gpus} {line.split()[-1]}")
    alone = loader.load_recipe("internlm_chat_7b_qlora_oasst1_e3")
    assert recipe.global_batch_size == alone.global_batch_size
