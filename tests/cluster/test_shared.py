"""Several people's runs on one cluster: they do not meet, leave nothing, and give nothing away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.local import LocalCluster
from raytune_ft.training.run_folder import RunFolder
from tests.cluster import local_runs
from tests.runs import sha256

pytestmark = [pytest.mark.cluster, pytest.mark.ray, pytest.mark.slow]

SECRETS = {
    "HF_TOKEN": "hf_plantedAAAAAAAAAAAA",
    "WANDB_API_KEY": "wandbplantedBBBBBBBBBB",
    "AWS_ACCESS_KEY_ID": "AKIAPLANTEDCCCCC",
    "AWS_SECRET_ACCESS_KEY": "awsplantedDDDDDDDDDD",
}
OURS = ("Mailbox", "Feeder", "TrainController", "RayTrainWorker", "PlacementGroupCleaner")
"""Classes of the actors that a run has, by the names that Ray lists."""
LEFT = f"""
import json, time
from ray.util import placement_group_table
from ray.util.state import list_actors
end = time.monotonic() + 60
while True:
    alive = [a.class_name for a in list_actors(filters=[("state", "!=", "DEAD")], limit=1000)]
    ours = [name for name in alive if name.endswith({OURS!r})]
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    if not ours and not groups or time.monotonic() > end:
        break
    time.sleep(0.5)
print(json.dumps([ours, [g["name"] for g in groups], ray.available_resources().get("CPU")]))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with local_runs.cluster() as started:
        yield started


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "inputs"
    local_runs.make_inputs(folder)
    return folder


def ended(driver: subprocess.Popen[str], code: int = 0) -> str:
    said, _ = driver.communicate(timeout=local_runs.ENDS_IN_S)
    assert driver.returncode == code, said
    return said


def adapter(home: Path) -> str:
    return sha256(home / "runs/same/adapter/adapter_model.safetensors")


def nothing_is_left(cluster: LocalCluster) -> None:
    actors, groups, cpus = json.loads(local_runs.asked(cluster, LEFT))
    assert actors == [] and groups == []
    assert cpus == 4.0


def test_two_peoples_runs_of_one_name_do_not_meet(
    cluster: LocalCluster, inputs: Path, tmp_path: Path
) -> None:
    """Each is, to the byte, the run that it would be alone; keys of theirs are written nowhere."""
    recipes = {}
    for name, seed in (("ada", 7), ("bob", 8), ("ada_alone", 7), ("bob_alone", 8)):
        home = tmp_path / name
        home.mkdir()
        recipes[name] = local_runs.write_recipe(
            home / "same.yaml", inputs, seed=seed, name="same", storage=str(home / "runs")
        )
    drivers = [local_runs.start(recipes[n], cluster, extra=SECRETS) for n in ("ada", "bob")]
    said = [ended(driver) for driver in drivers]
    for name in ("ada_alone", "bob_alone"):
        ended(local_runs.start(recipes[name], cluster))
    hashes = {name: adapter(tmp_path / name) for name in recipes}
    assert hashes["ada"] == hashes["ada_alone"]
    assert hashes["bob"] == hashes["bob_alone"]
    assert hashes["ada"] != hashes["bob"]
    nothing_is_left(cluster)
    assert not written(SECRETS, [tmp_path, cluster.folder]), "a key stands in a file"
    assert not any(secret in text for text in said for secret in SECRETS.values())


def written(secrets: dict[str, str], folders: list[Path]) -> list[tuple[str, Path]]:
    """List which secret stands in which file."""
    files = [path for folder in folders for path in folder.rglob("*")]
    return [
        (name, path)
        for path in files
        if path.is_file() and not path.is_symlink()
        for name, value in secrets.items()
        if value.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended_leaves_nothing(
    cluster: LocalCluster, inputs: Path, tmp_path: Path, number: signal.Signals
) -> None:
    recipe = local_runs.write_recipe(
        tmp_path / "same.yaml", inputs, epochs=100, name="same", storage=str(tmp_path / "runs")
    )
    driver = local_runs.start(recipe, cluster)
    assert driver.stdout is not None
    for line in driver.stdout:
        if line.startswith("step "):
            break
    os.kill(driver.pid, number)
    ended(driver, 75 if number == signal.SIGTERM else -number)
    nothing_is_left(cluster)


def test_a_run_that_fails_leaves_nothing(
    cluster: LocalCluster, inputs: Path, tmp_path: Path
) -> None:
    recipe = local_runs.write_recipe(
        tmp_path / "same.yaml", inputs, name="same", storage=str(tmp_path / "runs")
    )
    said = ended(local_runs.start(recipe, cluster, "train.lr=1e30", "train.max_norm=1e30"), 5)
    assert "error: " in said and "Traceback" not in said
    nothing_is_left(cluster)


def test_cores_that_never_come_are_refused_at_once(inputs: Path, tmp_path: Path) -> None:
    """Nodes that say they have a GPU are believed; the driver has none."""
    recipe = local_runs.write_recipe(
        tmp_path / "same.yaml", inputs, name="same", storage=str(tmp_path / "runs")
    )
    with local_runs.cluster(gpus=1) as small:
        said = ended(local_runs.start(recipe, small, "run.workers=4"), 2)
    assert said.splitlines()[-1] == (
        "error: run.workers: 4 workers need a GPU each, the cluster has room for 2 on 3 nodes and "
        "no autoscaler; set run.workers=2 train.accumulation=2, or start nodes that have GPUs"
    )
    assert not (tmp_path / "runs").exists()


def test_a_node_with_another_torch_is_named(inputs: Path, tmp_path: Path) -> None:
    other = tmp_path / "other/torch-1.2.3.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.2.3\n")
    recipe = local_runs.write_recipe(
        tmp_path / "same.yaml", inputs, name="same", storage=str(tmp_path / "runs")
    )
    with local_runs.cluster(environment={"PYTHONPATH": str(other.parent)}) as odd:
        said = ended(local_runs.start(recipe, odd), 5)
    assert "has torch 1.2.3, not " in said.splitlines()[-1]
    assert RunFolder(tmp_path / "runs/same").path.exists() is False
    assert "Traceback" not in said


def test_another_clusters_ray_is_refused_in_a_line(inputs: Path, tmp_path: Path) -> None:
    recipe = local_runs.write_recipe(
        tmp_path / "same.yaml", inputs, name="same", storage=str(tmp_path / "runs")
    )
    driver = subprocess.Popen(
        [local_runs.BIN / "python", "-m", "raytune_ft.train", "--config", recipe],
        env={**os.environ, "RAY_ADDRESS": "http://127.0.0.1:8265"},
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    said = ended(driver, 5)
    assert "cannot be trained on from outside" in said.splitlines()[-1]
    assert not (tmp_path / "runs").exists()
