"""Pushing to a hub: a real client, a server of our own, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.exporting.conftest import Made
from tests.exporting.fake_hub import Hub, running


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as found:
        yield found


def call(hub: Hub, *words: str, token: str | None = "hf_good") -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(
        [sys.executable, "-m", "raytune_ft", *words], capture_output=True, text=True, check=False,
        env=environment, timeout=300,
    )  # fmt: skip


def test_an_adapter_arrives_whole_private_and_without_this_machine(
    hub: Hub, plain: Made, tmp_path: Path
) -> None:
    """An upload that is refused says one line; the next goes on; nothing holds the token."""
    words = ["export", plain.words, "--out", str(tmp_path / "out"), "--push-to-hub", "me/mine"]
    hub.fail_puts = 1
    failed = call(hub, *words)
    assert failed.returncode == 2
    (line,) = [row for row in failed.stderr.splitlines() if row.startswith("error: ")]
    assert line.startswith("error: --push-to-hub me/mine: the hub did not take it (")
    assert "out stands, and the same command goes on" in line
    assert not hub.commits

    arrived = call(hub, *words)
    assert arrived.returncode == 0, arrived.stderr
    assert arrived.stdout.splitlines() == [str(tmp_path / "out"), f"{hub.url}/me/mine"]
    assert hub.repositories["me/mine"]["private"] is True
    files, here = hub.files(), {path.name: path for path in (tmp_path / "out").iterdir()}
    assert files.keys() == here.keys()
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        assert files[name] == here[name].read_bytes()
    assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == plain.base.name
    assert 'from_pretrained("me/mine")' in files["README.md"].decode()
    everything = b"".join([*files.values(), *(path.read_bytes() for path in here.values())])
    assert str(plain.base.parent).encode() not in b"".join(files.values())
    for said in (everything, (failed.stderr + arrived.stderr).encode()):
        assert b"hf_good" not in said
    assert hub.tokens == {"Bearer hf_good"}


def test_mistakes_are_one_line_and_write_nothing(hub: Hub, plain: Made, tmp_path: Path) -> None:
    words = ["export", plain.words, "--out", str(tmp_path / "out"), "--push-to-hub"]
    for name, token, says in (
        ("me/mine", None, "no token; set HF_TOKEN"),
        ("../mine", "hf_good", "no name of a repository"),
    ):
        said = call(hub, *words, name, token=token)
        assert (said.returncode, said.stdout) == (2, "")
        assert says in said.stderr
        assert len(said.stderr.splitlines()) == 1
        assert not (tmp_path / "out").exists()
    refused = call(hub, *words, "me/mine", token="hf_bad")
    assert refused.returncode == 2
    assert "the hub did not take it (" in refused.stderr
    assert "hf_bad" not in refused.stderr
