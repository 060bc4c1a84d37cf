"""What the verbs print when all is well, and how the process ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.cells import cell_len

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
    golden = set((ROOT / "tests/golden/names.txt").read_text(encoding="utf-8").split())
    assert golden | {"qwen3_8b_qlora_alpaca_e3", "smollm2_135m_lora_identity"} <= set(
        said.out.split()
    )


def test_list_cfg_prints_the_reference_names(call: Command) -> None:
    golden = (ROOT / "tests/golden/names.txt").read_text(encoding="utf-8")
    assert call("list-cfg").out == golden


def test_list_cfg_of_a_pattern(call: Command) -> None:
    found = call("list-cfg", "-p", "OASST1_512").out.split()
    assert len(found) == 19
    assert all("oasst1_512" in name for name in found)
    assert call("list-cfg", "-p", "qwen3").code == 1


@pytest.mark.parametrize("words", [["list", "OASST1_512"], ["list", "-p", "oasst1_512"]])
def test_pattern_is_a_substring_in_any_case(call: Command, words: list[str]) -> None:
    found = call(*words).out.split()
    assert found == [name for name in catalog.names() if "oasst1_512" in name]
    assert len(found) > 19


def test_parts_of_names_are_listed(call: Command) -> None:
    assert set(call("list", "--models").out.split()) == set(catalog.models())
    assert call("list", "--models", "-p", "LLAMA3_2_1").out.split() == [
        "llama3_2_1b", "llama3_2_1b_instruct",
    ]  # fmt: skip
    assert call("list", "--data", "oasst1_512").out.split() == ["qlora_oasst1_512_e3"]
    assert len(call("list", "--data").out.split()) == 35
    assert call("list", "--method").out.split() == ["qlora", "lora", "int8_lora", "full"]


def test_a_method_filters(call: Command) -> None:
    found = call("list", "--method", "int8_lora", "-p", "llama2_70b").out.split()
    assert found == [
        "llama2_70b_int8_lora_open_platypus_e1", "llama2_70b_int8_lora_open_platypus_e1_hf",
    ]  # fmt: skip
    assert call("list", "--method=int8_lora", "--data").out.split() == [
        "int8_lora_open_platypus_e1", "int8_lora_open_platypus_e1_hf",
    ]  # fmt: skip
    wrong = call("list", "--method", "lorra")
    assert wrong.code == 2
    assert "qlora, lora, int8_lora, full" in wrong.err


def test_list_json_has_the_parts_and_the_memory(call: Command) -> None:
    rows = json.loads(call("list", "qwen3_8b_qlora_alpaca_enzh_e3", "--json").out)
    assert [{k: row[k] for k in ("name", "model", "method", "data", "in_xtuner")} for row in rows]
    (row,) = rows
    assert (row["model"], row["method"], row["data"]) == ("qwen3_8b", "qlora", "alpaca_enzh")
    assert (row["family"], row["in_xtuner"]) == ("qwen3", False)
    assert 8 < row["memory_bytes"] / 2**30 < 16
    presets = json.loads(call("list", "deepspeed_zero1", "--json").out)
    assert [(p["name"], p["memory_bytes"]) for p in presets] == [("deepspeed_zero1", None)]
    cards = json.loads(call("list", "--models", "phi4", "--json").out)
    assert [card["path"] for card in cards] == ["microsoft/Phi-4-mini-instruct", "microsoft/phi-4"]


@pytest.mark.parametrize("words", [[], ["--models"], ["--data"], ["--json"]])
def test_nothing_found_is_1(call: Command, words: list[str]) -> None:
    said = call("list", "gpt5", *words)
    assert (said.code, said.out) == (1, "")
    assert said.err.count("\n") == 1
    assert "gpt5" in said.err


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["list"], ["InternLM\n", "internlm_7b_qlora_oasst1_e3 ", "qwen3_8b_…", "deepspeed_zero3"]),
        (["list", "qwen3_8b_qlora"], ["qwen3_8b_qlora_alpaca_enzh_oasst1_e3 ", " GiB\n"]),
        (["list", "--models"], ["Qwen/Qwen3-8B", "meta-llama/Llama-3.1-8B-Instruct"]),
        (["list", "--data"], ["Open-Orca/OpenOrca", "训练数据_带法律依据_92k.json"]),
        (
            ["show", NAME],
            ["timdettmers/openassistant-guanaco", "at their defaults", " GiB on each"],
        ),
    ],
)
def test_terminal_shows_columns_within_its_width(words: list[str], shown: list[str]) -> None:
    text = on_a_terminal(*words)
    assert all(part in text for part in shown), text
    assert max(cell_len(line) for line in text.splitlines()) <= 100


def on_a_terminal(*words: str) -> str:
    """Return what `raytune-ft WORDS` prints on a terminal of 100 columns, without its colours."""
    ours, theirs = os.openpty()
    size = {"COLUMNS": "100", "LINES": "50", "TERM": "xterm-256color"}
    done = subprocess.Popen(
        [sys.executable, "-m", "raytune_ft", *words],
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env={**os.environ, **size},
    )  # fmt: skip
    os.close(theirs)
    parts = []
    with contextlib.suppress(OSError):  # the end of a terminal is an error on Linux
        while part := os.read(ours, 1 << 16):
            parts.append(part)
    os.close(ours)
    assert done.wait(timeout=60) == 0
    text = b"".join(parts).decode().replace("\r\n", "\n")
    assert "\x1b[" in text
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_show_json_is_the_whole_recipe(call: Command) -> None:
    shown = json.loads(call("show", NAME, "--json").out)
    assert shown == load_recipe(NAME).model_dump(mode="json")
    assert list(shown) == [
        "model", "lora", "data", "train", "chat_eval", "eval", "checkpoint", "run", "tune",
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


def test_every_copy_is_the_recipe(call: Command, tmp_path: Path) -> None:
    names = [*catalog.reference_names(), "qwen3_8b_qlora_alpaca_e3", "smollm2_135m_full_identity"]
    for name in names:
        said = call("copy", name, str(tmp_path))
        copied = Path(said.out.removeprefix("Copy to ").strip())
        assert said.code == 0, said.err
        if name in catalog.PRESETS:
            assert json.loads(copied.read_text()) == catalog.preset(name)
        else:
            assert load_recipe(str(copied)) == load_recipe(name), name
            assert not re.search(r"^base:", copied.read_text(encoding="utf-8"), re.MULTILINE)


def test_schema_is_json_schema(call: Command) -> None:
    schema = json.loads(call("schema").out)
    assert {"base", "compat", "model", "data"} <= set(schema["properties"])


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("train.deepspeed=deepspeed_zero9", "neither a file nor one of"),
        ("model.template=internlm_chatt", "did you mean 'internlm_chat'"),
        ("data.sources.0.map=alpaca_map", "alpaca_map_fn"),
    ],
)
def test_a_wrong_name_does_not_wait_for_ray(
    call: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, words: str
) -> None:
    def no_ray() -> None:
        raise AssertionError("Ray was started for a recipe that cannot run")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("raytune_ft.train.ray_beside", no_ray)
    said = call("train", "quickstart.yaml", change)
    assert said.code == 2
    assert words in said.err
    assert list(tmp_path.iterdir()) == []
