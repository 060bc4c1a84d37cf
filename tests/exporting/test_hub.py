"""Pushing to a hub: a real client, a server of our own, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from raytune_ft.errors import RecipeError
from raytune_ft.exporting.hub import push
from tests.cli.conftest import Command, call  # noqa: F401  a fixture
from tests.conftest import ROOT
from tests.exporting.conftest import Made
from tests.exporting.fake_hub import Hub, running


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running() as found:
        yield found


def pushed(hub: Hub, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    environment |= {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"HF_TOKEN": "hf_good"}
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
    failed = pushed(hub, *words)
    assert failed.returncode == 2
    (line,) = [row for row in failed.stderr.splitlines() if row.startswith("error: ")]
    assert line.startswith("error: --push-to-hub me/mine: the hub did not take it (")
    assert "out stands, and the same command goes on" in line
    assert not hub.commits

    arrived = pushed(hub, *words)
    assert arrived.returncode == 0, arrived.stderr
    assert arrived.stdout.splitlines() == [str(tmp_path / "out"), f"{hub.url}/me/mine"]
    assert hub.repositories["me/mine"]["visibility"] == "private"
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


def test_mistakes_are_one_line_and_write_nothing(
    plain: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Command,  # noqa: F811
) -> None:
    for name, token, says in (
        ("me/mine", "", "no token; set HF_TOKEN"),
        ("../mine", "hf_good", "no name of a repository"),
        ("a/b/c", "hf_good", "no name of a repository"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        for verb in (["export"], ["merge"], ["merge", "--format", "fp8"]):
            words = [*verb, plain.words, "--out", str(tmp_path / "out"), "--push-to-hub", name]
            said = call(*words)
            assert (said.code, said.out) == (2, "")
            assert says in said.err
            assert len(said.err.splitlines()) == 1
            assert not (tmp_path / "out").exists()


def test_a_token_that_the_hub_refuses_is_not_said(
    hub: Hub, plain: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    monkeypatch.setattr(HfApi, "__init__", partialmethod(HfApi.__init__, endpoint=hub.url))
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    with pytest.raises(RecipeError, match=r"the hub did not take it \(") as caught:
        push(plain.run.adapter, "me/mine", lambda _line: None)
    assert "\n" not in str(caught.value)
    assert "Invalid token ***" in str(caught.value)
    assert "hf_bad" not in str(caught.value)
