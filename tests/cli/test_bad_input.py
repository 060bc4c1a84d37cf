"""Ways to get a recipe, a data file or a path wrong: one line each, the right exit code, no rest.

Every case starts from a recipe that works (`test_the_good_recipe_works`) and breaks one thing.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cli.conftest import Command, Said, in_process_of_its_own
from tests.conftest import write_chats

GOOD = """\
model:
  path: model
  template: default
lora: {r: 4, alpha: 8}
data:
  sources:
    - path: chats.jsonl
  max_length: 128
train:
  epochs: 1
  accumulation: 2
run: {name: first}
"""
GOOD_ROW = {
    "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
}


@pytest.fixture
def work(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, rows and a good recipe, and the current one."""
    (tmp_path / "model").mkdir()
    for file in tiny_model.iterdir():
        shutil.copy(file, tmp_path / "model")
    write_chats(tmp_path / "chats.jsonl", 12)
    (tmp_path / "good.yaml").write_text(GOOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Broken:
    """One thing that is wrong, and what must be said about it."""

    name: str
    says: str
    """Stands in the message; `{config}` is the recipe's file."""
    text: str | None = None
    """The recipe; none: the good one."""
    change: tuple[str, str] | None = None
    """(old, new) in the good recipe."""
    words: list[str] = field(default_factory=list)
    """Further words of the command line."""
    code: int = 2


RECIPES = [
    Broken("typo in a key", "{config}:4: unknown key 'lora.aplha'; did you mean 'alpha'?",
           change=("alpha", "aplha")),
    Broken("typo in a section", "{config}:9: unknown key 'trian'; did you mean 'train'?",
           change=("train:", "trian:")),
    Broken("key in the wrong section",
           "{config}:4: unknown key 'lora.lr'; did you mean 'train.lr'?",
           change=("r: 4", "lr: 4")),
    Broken("a secret", "{config}:12: unknown key 'run.api_key'",
           change=("name: first", "api_key: x")),
    Broken("text for a number", "{config}:10: train.epochs: expected a whole number, got 'many'",
           change=("epochs: 1", "epochs: many")),
    Broken("number for text", "{config}:12: run.name: expected text, got 7; put it in quotes",
           change=("first", "7")),
    Broken("fraction for a count", "{config}:10: train.epochs: expected a whole number, got 1.5",
           change=("epochs: 1", "epochs: 1.5")),
    Broken("true for a count", "{config}:10: train.epochs: expected a whole number, got true",
           change=("epochs: 1", "epochs: yes")),
    Broken("zero epochs", "{config}:10: train.epochs: expected 1 or more, got 0",
           change=("epochs: 1", "epochs: 0")),
    Broken("negative lr", "{config}:10: train.lr: expected more than 0, got -0.1",
           change=("epochs: 1", "lr: -0.1")),
    Broken("infinite lr", "{config}:10: train.lr: expected a finite number, got inf",
           change=("epochs: 1", "lr: .inf")),
    Broken("unknown choice", "{config}:10: train.scheduler: expected 'cosine', 'linear' or",
           change=("epochs: 1", "scheduler: cosin")),
    Broken("choice of another", "did you mean 'bfloat16'?",
           change=("template: default", "dtype: bf16")),
    Broken("null section", "{config}:4: lora: expected a section of keys, got nothing",
           change=("lora: {r: 4, alpha: 8}", "lora:")),
    Broken("list for a section", "{config}:4: lora: expected a section of keys, got a list of 1",
           change=("{r: 4, alpha: 8}", "[r]")),
    Broken("text for a list", "{config}:6: data.sources: expected a list: [...], got 'chats.jsonl'",
           change=("sources:\n    - path: chats.jsonl", "sources: chats.jsonl")),
    Broken("no sources", "{config}:6: data.sources: expected at least 1 in the list",
           change=("sources:\n    - path: chats.jsonl", "sources: []")),
    Broken("no model", "{config}: 'model' is missing", text=GOOD[GOOD.index("lora") :]),
    Broken("same key twice", "{config}:11: 'train.epochs' stands in line 10 already; keep one",
           change=("epochs: 1\n", "epochs: 1\n  epochs: 2\n")),
    Broken("a tab", "{config}:2: a tab indents this line; use spaces",
           change=("  path: model", "\tpath: model")),
    Broken("bracket left open", "{config}:5: is not YAML", change=("alpha: 8}", "alpha: 8")),
    Broken("quote left open", "is not YAML", change=("path: model", "path: 'model")),
    Broken("an empty file", "{config}: is empty", text="# later\n"),
    Broken("a list", "{config}:1: expected sections such as 'model:', got a list of 1",
           text="- a\n"),
    Broken("two documents", "a second document starts here", text=GOOD + "---\n" + GOOD),
    Broken("an object tag", "{config}:2: the tag 'tag:yaml.org,2002:python/name:os.system' is not",
           change=("path: model", "path: !!python/name:os.system ''")),
    Broken("an alias", "an alias ('*') repeats a part",
           change=("alpha: 8}", "targets: &t [q_proj], modules_to_save: *t}")),
    Broken("full on nf4", "{config}:3: model.method 'full' cannot train nf4 weights",
           change=("template: default", "method: full\n  quantization: nf4")),
    Broken("min_lr above lr", "train.min_lr is above train.lr", change=("epochs: 1", "min_lr: 1")),
    Broken("a run name with a way out", "{config}:12: run.name: use 1 to 64 letters",
           change=("first", "../first")),
    Broken("base that is not there", "{config}:1: base 'no.yaml': no such file",
           text="base: no.yaml\n"),
    Broken("base of a base", "{config}:1: base 'internlm_oasst1.yaml' has a base itself",
           text="base: internlm_oasst1.yaml\n"),
    Broken("override without value", "argument: 'lora.r': the recipe is 'bad.yaml' already",
           words=["lora.r"]),
    Broken("override of nothing", "argument: unknown key 'train.lrr'; did you mean 'train.lr'?",
           words=["train.lrr=1"]),
    Broken("override with a wrong value", "argument: lora.r: expected a whole number, got 'big'",
           words=["lora.r=big"]),
    Broken("model that is not there", "model.path: no folder 'modle'",
           change=("path: model", "path: modle")),
    Broken("model that is a file", "model.path: chats.jsonl is a file",
           change=("path: model", "path: chats.jsonl")),
    Broken("model folder without config.json", ": no config.json",
           change=("path: model", "path: .")),
    Broken("unknown template", "no template 'defalt'; did you mean 'default'?",
           change=("template: default", "template: defalt")),
    Broken("unknown map function",
           "no format or map function 'alpaca_map'; did you mean 'alpaca_map_fn'?",
           change=("chats.jsonl\n", "chats.jsonl\n      map: alpaca_map\n")),
    Broken("data that is not there", "chat.jsonl does not exist; nearest there: chats.jsonl",
           change=("chats.jsonl", "chat.jsonl")),
    Broken("column of no format", "data.sources[0].columns: 'promt' is no column of alpaca",
           change=("chats.jsonl\n", "chats.jsonl\n      map: alpaca\n      columns: {promt: x}\n")),
    Broken("column that is not there", "no column 'msgs' in chats.jsonl; columns: messages",
           change=("chats.jsonl\n", "chats.jsonl\n      columns: {messages: msgs}\n")),
    Broken("pattern without files", "data.sources[0].path: no .jsonl",
           change=("chats.jsonl", "chats*.csv")),
    Broken("file of no kind", "good.yaml is no .jsonl", change=("chats.jsonl", "good.yaml")),
    Broken("URL of a scheme that is not fetched", "data.sources[0].path: 'ftp' is no scheme that",
           change=("chats.jsonl", "ftp://host/chats.jsonl")),
    Broken("password in a URL", "data.sources[0].path: https://host/a.jsonl is given with a user",
           change=("chats.jsonl", "https://me:word@host/a.jsonl")),
    Broken("data_dir that is not there", "data.sources[0].data_dir: no folder 'deep' in empty",
           change=("chats.jsonl\n", "empty\n      data_dir: deep\n")),
    Broken("data folder without data", "no .jsonl", change=("chats.jsonl", "empty")),
    Broken("validation leaves nothing", "leaves none to train on",
           change=("max_length: 128", "max_length: 128\n  validation: 1.0")),
    Broken("unknown DeepSpeed preset", "train.deepspeed: 'zero9' is neither a file nor one of",
           change=("epochs: 1", "deepspeed: zero9")),
]  # fmt: skip

ROWS = {
    "broken JSON": '{"messages": [',
    "not an object": "[1, 2]",
    "no known column": '{"prompt": "a", "completion": "b"}',
    "preferences": '{"prompt": "a", "chosen": "b", "rejected": "c"}',
    "a tool nobody called": '{"messages": [{"role": "tool", "content": "a"}]}',
    "unknown role": '{"messages": [{"role": "robot", "content": "a"}]}',
    "content is a number": '{"messages": [{"role": "user", "content": 3}]}',
    "messages is text": '{"messages": "hi"}',
    "message without content": '{"messages": [{"role": "user"}]}',
    "key twice": '{"messages": [], "messages": [{"role": "user", "content": "a"}]}',
    "half a character": '{"messages": [{"role": "user", "content": "\\ud83d"},'
    ' {"role": "assistant", "content": "b"}]}',
    "a picture": '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    "a NUL byte": '{"messages": "\0"}',
    "colours of a terminal": '{"messages": [{"role": "\\u001b[31m\\n", "content": "a"}]}',
    "100,000 brackets": "[" * 100_000,
    "only a system text": '{"messages": [{"role": "system", "content": "a"}]}',
    "a call without a name": '{"messages": [{"role": "user", "content": "a"},'
    ' {"role": "assistant", "tool_calls": [{}]}]}',
    "another format": '{"instruction": "a", "output": "b"}',
    "two questions": '{"messages": [{"role": "user", "content": "a"},'
    ' {"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}]}',
}


def assert_one_line(said: Said, code: int, says: str, work: Path) -> None:
    """Exit code, one marked line with the words, no traceback, nothing left behind."""
    assert said.code == code, said.err
    lines = said.err.strip().splitlines()
    assert len(lines) == 1, said.err
    assert lines[0].startswith("error: ")
    assert says in lines[0]
    assert "Traceback" not in said.err + said.out
    assert not (work / "runs").exists()


def test_the_good_recipe_works(call: Command, work: Path) -> None:
    said = call("train", "--config", "good.yaml", "--dry-run")
    assert (said.code, said.err) == (0, "")
    assert "12 used of 12" in said.out
    assert not (work / "runs").exists()


@pytest.mark.parametrize("broken", RECIPES, ids=lambda b: b.name)
def test_broken_recipe(call: Command, work: Path, broken: Broken) -> None:
    (work / "empty").mkdir()
    text = GOOD if broken.text is None else broken.text
    if broken.change is not None:
        assert broken.change[0] in text
        text = text.replace(*broken.change, 1)
    (work / "bad.yaml").write_text(text, encoding="utf-8")
    said = call("train", "--config", "bad.yaml", *broken.words, "--dry-run")
    assert_one_line(said, broken.code, broken.says.replace("{config}", "bad.yaml"), work)


@pytest.mark.parametrize("verb", [["inspect"], ["train", "--dry-run"], ["plan"]])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_broken_row_is_named(call: Command, work: Path, row: str, verb: list[str]) -> None:
    good = json.dumps(GOOD_ROW)
    (work / "chats.jsonl").write_text(f"{good}\n{row}\n{good}\n", encoding="utf-8")
    assert_one_line(call(*verb, "good.yaml"), 3, "chats.jsonl:2", work)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_broken_row_can_be_skipped_and_is_counted(call: Command, work: Path, row: str) -> None:
    good = json.dumps(GOOD_ROW)
    (work / "chats.jsonl").write_text(f"{good}\n{row}\n{good}\n", encoding="utf-8")
    said = call("plan", "good.yaml", "data.on_error=skip", "--json")
    assert said.code == 0, said.err
    rows = json.loads(said.out)["rows"]
    assert (rows["rows"], rows["used"], rows["dropped"]) == (3, 2, {"unusable": 1})
    assert "chats.jsonl:2" in rows["places"]["unusable"][0]


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", 3),
        (b"\n\n", 3),
        (b"\xff\xfe\x00\x01", 3),
        (b'{"messages": []}\n', 3),
        (b"\x1f\x8b\x08\x00", 3),
        (b"PK\x03\x04rows", 3),
        (b"PAR1\x15\x00", 3),
        (b"\0" * 512, 3),
        (b'{"messages": [{"role": "us', 3),
    ],
    ids=[
        "empty",
        "blank lines",
        "binary",
        "no messages",
        "gzip",
        "zip",
        "Parquet",
        "zeros",
        "cut off",
    ],
)
def test_broken_data_file(call: Command, work: Path, content: bytes, code: int) -> None:
    (work / "chats.jsonl").write_bytes(content)
    assert_one_line(call("train", "good.yaml", "--dry-run"), code, "chats.jsonl", work)


def test_row_over_the_length_can_be_an_error(call: Command, work: Path) -> None:
    said = call("plan", "good.yaml", "data.max_length=8", "data.over_length=error")
    assert_one_line(said, 3, "chats.jsonl:1: ", work)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("god.yaml", "god.yaml: no such file; nearest: good.yaml"),
        ("internlm_7b_qlora_oast1_e3", "nearest: internlm_7b_qlora_oasst1_e3"),
        ("model", "model: is a folder; name a YAML file in it"),
        ("model/model.safetensors", "is not a text file"),
        ("nowhere/good.yaml", "nowhere/good.yaml: no such file"),
        ("a\0b.yaml", "no such file"),
        ("x" * 5000, "no recipe"),
        ("", "no recipe ''"),
    ],
    ids=["file", "name", "folder", "weights", "folder missing", "NUL", "long", "empty"],
)
def test_recipe_that_is_none(call: Command, work: Path, config: str, says: str) -> None:
    assert_one_line(call("train", "--config", config, "--dry-run"), 2, says, work)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--confg", "x"], "--config"),
        (["train"], "--config: name a recipe"),
        (["train", "good.yaml", "--json"], "--json"),
        (["train", "good.yaml", "--resume", "runs/x"], "runs/x: not a run folder"),
        (["train", "--resume", "nowhere"], "nowhere: not a run folder"),
        (["train", "--resume", "model"], "model: not a run folder"),
        (
            ["plan", "good.yaml", "--gpu-memory", "much"],
            "--gpu-memory: expected a size such as 8GiB",
        ),
        (["plan", "good.yaml", "--gpu-memory", "0"], "--gpu-memory: expected a size"),
        (["inspect", "good.yaml", "--rows", "0"], "--rows"),
        (["show"], "Missing argument"),
        (["copy", "internlm_7b_qlora_oasst1_e3", "good.yaml"], "good.yaml: is not a folder"),
        (["copy", "no_such_name", "."], "no recipe 'no_such_name'"),
        (["merge", "model", "--base", "other"], "--base: expected original or dequantized"),
        (["merge", "model", "--max-shard-size", "two"], "--max-shard-size"),
        (["merge", "nowhere"], "nowhere: not a run folder"),
        (["export", "nowhere"], "nowhere: not a run folder"),
        (["chat", "nowhere"], "nowhere"),
        (["chat", "model", "--temperature", "-1"], "--temperature"),
        (["serve", "model", "--port", "99999"], "--port"),
    ],
    ids=" ".join,
)
def test_wrong_words(call: Command, work: Path, words: list[str], says: str) -> None:
    assert_one_line(call(*words), 2, says, work)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        ("raytune_ft", ["train", "--config", "bad.yaml"]),
        ("raytune_ft", ["inspect", "bad.yaml"]),
        ("raytune_ft.train", ["--config", "bad.yaml", "--dry-run"]),
        ("raytune_ft.tune", ["--config", "bad.yaml"]),
    ],
    ids=["script", "inspect", "train module", "tune module"],
)
def test_broken_recipe_in_a_process_of_its_own(work: Path, module: str, words: list[str]) -> None:
    (work / "bad.yaml").write_text(GOOD.replace("alpha", "aplha"), encoding="utf-8")
    said = in_process_of_its_own(*words, cwd=work, module=module)
    assert_one_line(said, 2, "bad.yaml:4: unknown key 'lora.aplha'; did you mean 'alpha'?", work)
    assert said.out == ""


def test_several_problems_are_a_line_each(call: Command, work: Path) -> None:
    (work / "bad.yaml").write_text(
        GOOD.replace("alpha", "aplha").replace("epochs: 1", "epochs: 0"), encoding="utf-8"
    )
    said = call("inspect", "bad.yaml")
    assert said.code == 2
    lines = said.err.splitlines()
    assert [line.split(": ")[1] for line in lines] == ["bad.yaml:4", "bad.yaml:10"]
    assert all(line.startswith("error: ") for line in lines)
