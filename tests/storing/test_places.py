"""Places: files go to a real S3 server and come back; what goes wrong is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from raytune_ft.errors import CheckpointError, RecipeError
from raytune_ft.storing.places import BLOCK_BYTES, Place, is_elsewhere, local_copy, split_run


def test_files_come_back_as_they_went(bucket: str, tmp_path: Path) -> None:
    place = Place(f"{bucket}/runs/")
    place.check()
    large = tmp_path / "weights"
    large.write_bytes(bytes(range(256)) * (BLOCK_BYTES // 128))  # two blocks
    seen: list[int] = []
    place.send(large, "a/step_000001/weights", seen.append)
    place.write("a/run.json", b"{}")
    place.write("ab/run.json", b"[]")
    assert sum(seen) == large.stat().st_size
    assert place.names() == ["a/run.json", "a/step_000001/weights", "ab/run.json"]
    assert place.names("a") == ["a/run.json", "a/step_000001/weights"], "a folder, no beginning"
    place.fetch("a/step_000001/weights", tmp_path / "back/weights")
    assert (tmp_path / "back/weights").read_bytes() == large.read_bytes()
    assert (place / "a").read("run.json") == b"{}"
    place.write("a/run.json", b"new")
    assert place.read("a/run.json") == b"new"


def test_deleted_files_are_gone_and_others_stay(bucket: str) -> None:
    place = Place(f"{bucket}/runs")
    for name in ("a/x", "a/b/y", "ax"):
        place.write(name, b"1")
    place.delete("a")
    place.delete("none")
    assert place.names() == ["ax"]
    with pytest.raises(FileNotFoundError):
        place.read("a/x")
    place.delete("ax")
    assert place.names() == []


def test_what_stops_a_transfer_is_what_it_raises(bucket: str, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"1")

    def stop(_size: int) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError):
        Place(bucket).send(file, "file", stop)
    with pytest.raises(FileNotFoundError):
        Place(bucket).send(tmp_path / "none", "file")


def test_a_missing_bucket_is_named(bucket: str) -> None:
    nowhere = Place("s3://no-such-bucket/runs")
    with pytest.raises(CheckpointError, match=r"^s3://no-such-bucket/runs: no such bucket; make"):
        nowhere.check()
    with pytest.raises(CheckpointError, match=r"^s3://no-such-bucket/runs: no such bucket$"):
        nowhere.write("a", b"1")


def test_no_connection_is_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"^s3://some/runs: no connection to the server$"):
        Place("s3://some/runs").names()


def test_no_rights_are_one_line(bucket: str) -> None:
    """The server, a thread of this process, looks at keys as soon as it is asked to."""
    from moto.core import set_initial_no_auth_action_count

    @set_initial_no_auth_action_count(0)
    def write() -> None:
        Place(bucket).write("a", b"1")

    with pytest.raises(CheckpointError, match=r": no rights there with the credentials"):
        write()


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("ftp://host/runs", r"^run.storage: 'ftp' is no scheme that runs are kept under; use a"),
        ("s3:///runs", r"'' cannot be a bucket's name"),
        ("s3://A b/runs", r"'A b' cannot be a bucket's name"),
        ("runs", r"'runs' is a folder of this machine"),
    ],
)
def test_other_addresses_are_refused(address: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        Place(address)


def test_folders_of_this_machine_are_here() -> None:
    assert not any(is_elsewhere(path) for path in ("runs", "./a", "/a/b", "~/x", "file:///a"))
    assert is_elsewhere("s3://b/x") and is_elsewhere("gs://b/x")


def test_each_address_has_a_copy_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path))
    one, same, other = (local_copy(f"s3://b/{where}", "a") for where in ("runs", "runs/", "others"))
    assert one == same != other and one.is_relative_to(tmp_path) and one.name == "a"
    assert split_run("s3://b/runs/a/") == ("s3://b/runs", "a")
    with pytest.raises(RecipeError, match="names no run"):
        split_run("s3://b")
