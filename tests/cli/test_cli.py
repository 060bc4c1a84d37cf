"""What the verbs print when all is well, and how the process ends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raytune_ft import __version__
from raytune_ft.cli.runs import split_words
from raytune_ft.config import catalog
from raytune_ft.config.loader import load_recipe
from raytune_ft.entry import exit_code
from raytune_ft.errors import DataError, MemoryPlanError, RaytuneError, RecipeError
from tests.cli.conftest import Command, in_process_of_its_own
from tests.conftest import ROOT

NAME = "internlm_chat_7b_qlora_oasst1_e3"


def test_list_prints_all_names(call: Command) -> None:
    said = call("list")
    assert (said.code, said.err) == (0, "")
    assert said.out.split() == catalog.names()


def test_list_cfg_prints_the_reference_names(call: Command) -> None:
    golden = (ROOT / "tests/golden/names.txt").read_text(encoding="utf-8").split()
    assert call("list-cfg").out.split() == sorted(golden)


@pytest.mark.parametrize("words", [["list", "OASST1_512"], ["list-cfg", "-p", "oasst1_512"]])
def test_pattern_is_a_substring_in_any_case(call: Command, words: list[str]) -> None:
    found = call(*words).out.split()
    assert len(found) == 19
    assert all("oasst1_512" in name for name in found)


def test_nothing_found_is_1(call: Command) -> None:
    said = call("list", "gpt5")
    assert (said.code, said.out) == (1, "")
    assert "gpt5" in said.err


def test_show_json_is_the_whole_recipe(call: Command) -> None:
    shown = json.loads(call("show", NAME, "--json").out)
    assert shown == load_recipe(NAME).model_dump(mode="json")
    assert list(shown) == [
        "model", "lora", "data", "train", "chat_eval", "checkpoint", "run", "tune",
    ]  # fmt: skip


def test_show_takes_overrides(call: Command) -> None:
    shown = json.loads(call("show", NAME, "train.lr=1e-3", "--json").out)
    assert shown["train"]["lr"] == 1e-3


def test_shown_yaml_is_a_recipe(call: Command, tmp_path: Path) -> None:
    (tmp_path / "shown.yaml").write_text(call("show", NAME).out, encoding="utf-8")
    assert load_recipe(str(tmp_path / "shown.yaml")) == load_recipe(NAME)


@pytest.mark.parametrize("verb", ["copy", "copy-cfg"])
def test_copy_writes_a_standalone_file_once(call: Command, tmp_path: Path, verb: str) -> None:
    target = tmp_path / "new" / f"{NAME}_copy.yaml"
    said = call(verb, NAME, str(target.parent))
    assert (said.code, said.out) == (0, f"Copy to {target}\n")
    assert load_recipe(str(target)) == load_recipe(NAME)
    before = target.read_bytes()
    again = call(verb, NAME, str(target.parent))
    assert again.code == 2
    assert "exists" in again.err
    assert target.read_bytes() == before


def test_copy_of_a_preset_is_json(call: Command, tmp_path: Path) -> None:
    assert call("copy", "deepspeed_zero3", str(tmp_path)).code == 0
    copied = json.loads((tmp_path / "deepspeed_zero3_copy.json").read_text())
    assert copied == catalog.preset("deepspeed_zero3")


def test_version_and_help(call: Command) -> None:
    assert __version__ in call("version").out
    assert __version__ in call("--version").out
    for words in [[], ["--help"], ["-h"]]:
        said = call(*words)
        assert said.code == 0
        assert "inspect" in said.out
    assert "--resume" in call("train", "--help").out


def test_words_are_split() -> None:
    assert split_words(["name", "a.b=c d=e"], None) == ("name", ["a.b=c d=e"])
    assert split_words(["train.lr=1"], "f.yaml") == ("f.yaml", ["train.lr=1"])
    assert split_words(["dir=x/a.yaml"], "f.yaml") == ("f.yaml", ["dir=x/a.yaml"])
    assert split_words(["dir/x=1.yaml"], None) == ("dir/x=1.yaml", [])
    with pytest.raises(RecipeError, match="'b'"):
        split_words(["b"], "a")


@pytest.mark.parametrize("error", [RaytuneError, RecipeError, DataError, MemoryPlanError])
def test_error_becomes_its_exit_code(
    error: type[RaytuneError], capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error("one\ntwo")

    assert exit_code(work) == error.exit_code
    assert capsys.readouterr().err == "error: one\nerror: two\n"


def test_interrupt_is_130_and_a_missing_right_is_one_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    def denied() -> int:
        raise PermissionError(13, "Permission denied", "/x")

    def defect() -> int:
        raise ValueError("ours")

    assert exit_code(interrupted) == 130
    assert exit_code(denied) == 1
    assert capsys.readouterr().err == "error: interrupted\nerror: /x: Permission denied\n"
    with pytest.raises(ValueError, match="ours"):
        exit_code(defect)


def test_reader_that_goes_away_is_no_news() -> None:
    writer = subprocess.Popen(
        [sys.executable, "-m", "raytune_ft", "list"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT,
    )  # fmt: skip
    assert writer.stdout is not None and writer.stderr is not None
    writer.stdout.close()
    assert writer.stderr.read() == b""
    writer.stderr.close()
    assert writer.wait(timeout=30) == 141


def test_module_and_script_are_the_same(tmp_path: Path) -> None:
    said = in_process_of_its_own("--help", cwd=tmp_path, module="raytune_ft.train")
    assert said.code == 0
    assert "raytune-ft train" in said.out
