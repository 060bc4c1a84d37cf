"""The published walk-through, point by point: copy, edit, train, convert, merge, chat.

Each point that needs no GPU and no hub runs its command. The run is the walk-through's own: a copy
of internlm_chat_7b_qlora_oasst1_e3 with two paths edited, on a random checkpoint in
InternLM's original layout and rows in oasst1's form.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import tomllib
import yaml
from safetensors.torch import load_file

from raytune_ft.cli import dispatch
from raytune_ft.config.loader import load_recipe
from raytune_ft.entry import exit_code
from tests.conftest import ROOT
from tests.test_recipes_run import make_internlm

NAME = "internlm_chat_7b_qlora_oasst1_e3"
GOLDEN = ROOT / "tests/golden"
CLI: dict[str, Any] = json.loads((GOLDEN / "xtuner_cli.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs/from-xtuner.md").read_text(encoding="utf-8")
NOTHING_TO_RUN = {
    8: "background",
    11: "the script of one cloud service",
    40: "kernels of a GPU",
}
PROMPTS = ["请给我介绍五个上海的景点", "Please tell me five scenic spots in Shanghai"]


@dataclass
class Walk:
    """A folder in which the walk-through is done, and the way to run its commands there."""

    folder: Path
    capsys: pytest.CaptureFixture[str] | None = None

    def say(self, *words: str) -> str:
        """Run `raytune-ft WORDS` in this process; return what it printed."""
        assert self.capsys is not None
        self.capsys.readouterr()
        code = exit_code(lambda: dispatch(list(words)))
        out, err = self.capsys.readouterr()
        assert code == 0, err
        return out

    @cached_property
    def config(self) -> Path:
        """The copied recipe with the model's and the data's path edited."""
        copied = self.folder / f"{NAME}_copy.yaml"
        content = yaml.safe_load(copied.read_text(encoding="utf-8"))
        content["model"]["path"] = "./internlm-chat-7b"
        content["data"]["sources"][0]["path"] = "./openassistant-guanaco"
        content["data"]["max_length"] = 256
        content["train"] |= {"accumulation": 2, "epochs": 2}
        content["chat_eval"]["max_new_tokens"] = 4
        copied.write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
        return copied

    @cached_property
    def run(self) -> Path:
        """The finished run, by the walk-through's command and with its environment variable."""
        words = [self.config.name, "--deepspeed", "deepspeed_zero2", "--work-dir", "work_dirs/x"]
        done = subprocess.run(
            [sys.executable, "-m", "raytune_ft", "train", *words, "--launcher", "none"],
            cwd=self.folder, capture_output=True, text=True, check=False,
            env={**os.environ, "MKL_SERVICE_FORCE_INTEL": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        self.printed = done.stderr
        return self.folder / "work_dirs/x"

    @cached_property
    def hf(self) -> Path:
        """The adapter in a folder that was made before."""
        out = self.folder / "hf"
        out.mkdir()
        self.say("convert", "pth_to_hf", self.config.name, str(self.run), "hf")
        return out

    @cached_property
    def merged(self) -> Path:
        """The merged model."""
        words = ["./internlm-chat-7b", str(self.hf), "merged", "--max-shard-size", "2GB"]
        self.say("convert", "merge", *words)
        return self.folder / "merged"

    def recipe(self) -> dict[str, Any]:
        """The run's resolved recipe."""
        return dict(yaml.safe_load((self.run / "recipe.yaml").read_text(encoding="utf-8")))


def write_rows(folder: Path) -> None:
    """Write forty rows in the form of openassistant-guanaco, train and test."""
    folder.mkdir()
    for split, count in (("train", 36), ("test", 4)):
        rows = [
            {"text": f"### Human: question {i} about a stone?### Assistant: a stone, {i} times"}
            for i in range(count)
        ]
        name = f"openassistant_best_replies_{split}.jsonl"
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    folder = tmp_path_factory.mktemp("ft-oasst1")
    (folder / "internlm-chat-7b").mkdir()
    make_internlm(folder / "internlm-chat-7b")
    write_rows(folder / "openassistant-guanaco")
    assert exit_code(lambda: dispatch(["copy-cfg", NAME, str(folder)])) == 0
    return Walk(folder)


@pytest.fixture
def walk(place: Walk, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Walk:
    monkeypatch.chdir(place.folder)
    place.capsys = capsys
    return place


Point = Callable[[Walk], None]
POINTS: dict[int, tuple[Point, bool]] = {}


def point(*numbers: int, trains: bool = False) -> Callable[[Point], Point]:
    """Register what shows some points; `trains`: it needs the finished run."""

    def register(check: Point) -> Point:
        POINTS.update(dict.fromkeys(numbers, (check, trains)))
        return check

    return register


@point(1)
def pretraining(walk: Walk) -> None:
    shown = json.loads(walk.say("show", "mistral_7b_qlora_skypile_pretrain_e1", "--json"))
    assert shown["data"]["sources"][0]["map"] == "pretrain_map_fn"
    (walk.folder / "book.jsonl").write_text('{"text": "a long river of seven stones"}\n')
    seen = walk.say("check-custom-dataset", walk.config.name, "book.jsonl")
    assert "river" in seen


@point(2, 26)
def instruction_tuning(walk: Walk) -> None:
    seen = walk.say("inspect", walk.config.name)
    assert "question 0 about a stone?" in seen
    assert "⟦" in seen  # what is trained
    assert re.search(r"⟦[^⟧]*0 times", seen)
    assert not re.search(r"⟦[^⟧]*question 0", seen)


@point(3, 38, 45, trains=True)
def samples(walk: Walk) -> None:
    rows = [json.loads(row) for row in (walk.run / "samples.jsonl").read_text().splitlines()]
    for when in ("before", "after"):
        assert [row["prompt"] for row in rows if row["when"] == when] == PROMPTS
    assert walk.recipe()["chat_eval"]["every"] == 500
    assert "raytune-ft chat" in walk.printed
    assert (walk.run / "report.html").is_file()


@point(4)
def methods(walk: Walk) -> None:
    shown = walk.say("list-cfg")
    for method in ("_full_", "_qlora_", "_int8_lora_"):
        assert method in shown
    for words in (["model.method=full", "model.quantization=none"], ["model.quantization=int8"]):
        assert load_recipe(NAME, words)


@point(5)
def families(walk: Walk) -> None:
    listed = walk.say("list", "--models")
    for model in ("internlm_7b", "llama2_7b", "chatglm3_6b", "qwen_7b", "baichuan2_13b_chat"):
        assert model in listed
    for model in ("zephyr_7b_beta", "mistral_7b", "starcoder", "yi_6b"):
        assert model in listed


@point(6, 20)
def one_command(walk: Walk) -> None:
    paths = ["model.path=./internlm-chat-7b", "data.sources.0.path=./openassistant-guanaco"]
    for words in ([NAME, *paths], [walk.config.name]):
        told = walk.say("train", *words, "--dry-run")
        assert "36 used of 36" in told
        assert "steps" in told


@point(7)
def small_gpu(walk: Walk) -> None:
    local = "data.sources.0.path=./openassistant-guanaco"
    said = json.loads(walk.say("plan", NAME, local, "--gpu-memory", "80GiB", "--json"))
    assert said["memory"]


@point(9, 10, 12, 13)
def install(walk: Walk) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["requires-python"] == ">=3.10"
    assert any(need.startswith("deepspeed") for need in project["dependencies"])
    for package in ("deepspeed", "bitsandbytes", "ray"):
        assert importlib.metadata.version(package)


@point(14)
def list_cfg(walk: Walk) -> None:
    golden = (GOLDEN / "names.txt").read_text(encoding="utf-8").split()
    assert walk.say("list-cfg").split() == sorted(golden)
    assert len(golden) == 301


@point(15)
def list_pattern(walk: Walk) -> None:
    found = walk.say("list-cfg", "-p", "INTERNLM").split()
    assert found
    assert all("internlm" in name for name in found)


@point(16)
def copy_cfg(walk: Walk) -> None:
    walk.say("copy-cfg", NAME, "fresh")
    assert load_recipe(f"fresh/{NAME}_copy.yaml") == load_recipe(NAME)


@point(17, 18, 19)
def edit_two_paths(walk: Walk) -> None:
    recipe = load_recipe(walk.config.name)
    assert recipe.model.path == "./internlm-chat-7b"
    assert recipe.data.sources[0].path == "./openassistant-guanaco"
    assert "36" in walk.say("plan", walk.config.name)


@point(21, 33, trains=True)
def deepspeed(walk: Walk) -> None:
    assert walk.recipe()["train"]["deepspeed"] == "zero2"
    preset = json.loads(walk.say("show", "deepspeed_zero2"))
    assert preset["bf16"]["enabled"] == "auto"
    assert preset["zero_optimization"]["stage"] == 2


@point(22, 23, 24, trains=True)
def environment(walk: Walk) -> None:
    told = json.loads((walk.run / "environment.json").read_text())
    assert {"python", "platform", "cuda", "gpus", "packages"} <= told.keys()
    assert load_recipe(str(walk.run / "recipe.yaml")).train.seed == 42


@point(25, trains=True)
def rows_are_counted(walk: Walk) -> None:
    data = json.loads((walk.run / "data.json").read_text())
    assert (data["rows"], data["used"]) == (36, 36)


@point(27, 28, 29, 30, 31, 32, 35, 37)
def values(walk: Walk) -> None:
    shown = json.loads(walk.say("show", NAME, "--json"))
    data, train, lora = shown["data"], shown["train"], shown["lora"]
    assert (data["max_length"], data["pack"], data["shuffle_before_pack"]) == (2048, True, True)
    assert (train["micro_batch_size"], train["accumulation"], train["epochs"]) == (1, 16, 3)
    assert (train["lr"], train["betas"], train["weight_decay"]) == (2e-4, [0.9, 0.999], 0.0)
    assert (train["max_norm"], train["optimizer"]) == (1.0, "paged_adamw_32bit")
    assert (train["scheduler"], train["min_lr"], train["warmup_ratio"]) == ("cosine", 0.0, 0.0)
    model = shown["model"]
    assert (model["quantization"], model["double_quant"]) == ("nf4", True)
    assert (lora["r"], lora["alpha"], lora["dropout"], lora["targets"]) == (
        64, 16, 0.1, "all-linear",
    )  # fmt: skip
    assert (model["template"], data["system"]) == ("internlm_chat", "")
    assert (train["log_every"], shown["checkpoint"]["every"]) == (10, "epoch")


@point(34, 39, 42, 47, trains=True)
def one_process(walk: Walk) -> None:
    """Offline, without launcher or MPI, with the environment variable set."""
    assert json.loads((walk.run / "run.json").read_text())["status"] == "done"
    assert "load model" in walk.printed


@point(36, trains=True)
def order_of_events(walk: Walk) -> None:
    stages = ["load model", "ask the sample prompts", "train", "write adapter", "write report"]
    lines = [re.sub(r"^\[.*?\]\s*", "", line) for line in walk.printed.splitlines()]
    places = [lines.index(stage) for stage in stages if stage in lines]
    assert len(places) >= 3
    assert places == sorted(places)


@point(41, trains=True)
def work_dir(walk: Walk) -> None:
    assert (walk.folder / "work_dirs/x/run.json").is_file()


@point(43, trains=True)
def resume(walk: Walk) -> None:
    step = sorted((walk.run / "checkpoints").iterdir())[-1]
    words = ["train", walk.config.name, "--deepspeed", "deepspeed_zero2", "--resume", str(step)]
    assert walk.say(*words, "--launcher", "none", "--dry-run")


@point(44, trains=True)
def checkpoints(walk: Walk) -> None:
    steps = [step.name for step in (walk.run / "checkpoints").iterdir()]
    assert len(steps) == 2  # one per epoch
    assert all(re.fullmatch(r"step_\d{6}", step) for step in steps)


@point(46, trains=True)
def pth_to_hf(walk: Walk) -> None:
    """From the run and from its last checkpoint: the same adapter."""
    from peft import PeftConfig

    assert PeftConfig.from_pretrained(str(walk.hf)).peft_type.value == "LORA"
    step = sorted((walk.run / "checkpoints").iterdir())[-1]
    walk.say("convert", "pth_to_hf", walk.config.name, str(step), "hf_of_step")
    one, other = (load_file(f"{f}/adapter_model.safetensors") for f in (walk.hf, "hf_of_step"))
    assert one.keys() == other.keys()
    assert all((one[name] == other[name]).all() for name in one)


@point(48, trains=True)
def folder_made_before(walk: Walk) -> None:
    """`mkdir hf` before, as the fixture does, or not."""
    walk.say("convert", "pth_to_hf", walk.config.name, str(walk.run), "hf_not_made")
    names = {file.name for file in walk.hf.iterdir()}
    assert names == {file.name for file in (walk.folder / "hf_not_made").iterdir()}


@point(49, trains=True)
def merge(walk: Walk) -> None:
    """The merged folder has the base's names, and other weights where LoRA was."""
    before = load_file(walk.folder / "internlm-chat-7b/model.safetensors")
    after: dict[str, Any] = {}
    for file in walk.merged.glob("*.safetensors"):
        assert file.stat().st_size <= 2 * 10**9
        after |= load_file(file)
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert (after[layer] != before[layer]).any()
    assert list(walk.merged.glob("tokenizer*"))


@point(50, trains=True)
def chat(walk: Walk) -> None:
    words = ["--prompt-template", "internlm_chat", "--max-new-tokens", "3", "--ask", "hello"]
    assert walk.say("chat", str(walk.merged), *words).startswith("> hello\n")


@point(52, trains=True)
def a_script_with_one_path(walk: Walk) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples/chat.py"), str(walk.merged)],
        input="hello\n\n", capture_output=True, text=True, check=False, cwd=walk.folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("> ")
    assert done.stdout.count("> ") >= 2, "it asks again after the answer"


@point(51, trains=True)
def chat_in_four_bits(walk: Walk) -> None:
    words = ["--bits", "4", "--max-new-tokens", "3", "--ask", "hello"]
    assert walk.say("chat", str(walk.merged), *words).startswith("> hello\n")


@point(53, trains=True)
def chat_with_adapter(walk: Walk) -> None:
    words = ["--adapter", str(walk.hf), "--max-new-tokens", "3", "--ask", "hello"]
    assert walk.say("chat", "./internlm-chat-7b", *words).startswith("> hello\n")


@point(54)
def homework(walk: Walk) -> None:
    """A set of one short row still makes a pack to train on."""
    row = {"conversation": [{"input": "Who are you?", "output": "I am your assistant."}]}
    (walk.folder / "mine.json").write_text(json.dumps([row]))
    told = walk.say("plan", walk.config.name, "data.sources=[{path: mine.json}]")
    assert "1 used of 1" in told
    assert "1 per epoch of 256 tokens" in told
    looked = walk.say(
        "check-custom-dataset",
        walk.config.name,
        "mine.json",
    )
    assert "I am your assistant." in looked


def marked(number: int) -> Any:
    trains = POINTS[number][1]
    return pytest.param(number, marks=[pytest.mark.ray, pytest.mark.slow] if trains else [])


@pytest.mark.parametrize("number", [marked(number) for number in sorted(POINTS)])
def test_point(walk: Walk, number: int) -> None:
    POINTS[number][0](walk)


def test_all_points_are_run_or_have_a_reason() -> None:
    assert sorted({*POINTS, *NOTHING_TO_RUN}) == list(range(1, CLI["points"] + 1))


def rows_under(title: str) -> list[list[str]]:
    """Return the cells of the table rows under a heading of the page."""
    part = PAGE.partition(f"\n{title}\n")[2].partition("\n## ")[0]
    return [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]


def test_page_has_every_point_with_what_shows_it() -> None:
    rows = [row for row in rows_under("## The walk-through, point by point") if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, CLI["points"] + 1))
    assert all(len(row) == 3 and row[2] for row in rows)


def test_page_has_every_defect() -> None:
    rows = [row for row in rows_under("## What v0.1.9 got wrong") if row[0].isdigit()]
    assert [int(row[0]) for row in rows] == list(range(1, CLI["defects"] + 1))


@pytest.mark.parametrize("command", CLI["commands"])
def test_page_has_every_command_and_option(command: str) -> None:
    section = commands_part(command)
    for word in [*command.split()[:1], *CLI["commands"][command]["positional"]]:
        assert f"`{word}" in section or f" {word}`" in section, word
    for option in CLI["commands"][command]["options"]:
        assert f"`{option}`" in section, option


def commands_part(command: str) -> str:
    """Return the section of the page whose heading names a command."""
    first = command.split(maxsplit=1)[0]
    parts = PAGE.split("\n### ")[1:]
    return next(part for part in parts if first in part.partition("\n")[0].split(", "))


@pytest.mark.parametrize("word", [*CLI["environment"], *CLI["hooks"], *CLI["python"]])
def test_page_names(word: str) -> None:
    assert f"`{word}`" in PAGE


@pytest.mark.parametrize("line", sorted(set(re.findall(r"`raytune-ft ([^`]+)`", PAGE))))
def test_every_command_of_the_page_has_a_verb_and_its_options(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = line.split()
    verb = words[:2] if words[0] in ("convert", "preprocess") else words[:1]
    assert exit_code(lambda: dispatch([*verb, "--help"])) == 0, line
    told = capsys.readouterr().out
    for option in re.findall(r"--[a-z][a-z-]+", line):
        assert option in told, option
