"""Exported and merged folders: what other tools, in a process of their own, make of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_ft import durable, export
from raytune_ft.chat.model import open_chat
from raytune_ft.config.schema import ModelSection
from raytune_ft.data.encode import encode_prompt
from raytune_ft.data.templating.templates import get_template
from raytune_ft.exporting import beside
from raytune_ft.model import writing
from raytune_ft.model.adapter import load_adapter
from raytune_ft.model.loading import load_model
from raytune_ft.model.writing import new_folder
from tests.cli.conftest import Command, call  # noqa: F401  a fixture
from tests.conftest import ROOT
from tests.exporting.conftest import Made, content_of, made

PROMPTS = 200
MESSAGES = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "what is red?"},
    {"role": "assistant", "content": "a stone"},
    {"role": "user", "content": "and blue?"},
]

FRESH = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import AutoPeftModelForCausalLM
asked = json.loads(sys.stdin.read())
said = {}
for name, folder in asked["folders"].items():
    kind = AutoPeftModelForCausalLM if name.startswith("adapter") else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        tops = [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in asked["prompts"]]
    render = tokenizer.apply_chat_template
    text = render(asked["messages"], tokenize=False, add_generation_prompt=True)
    said[name] = {
        "tops": tops, "text": text,
        "ids": tokenizer(text, add_special_tokens=False).input_ids,
        "ends": getattr(model, "generation_config", None) and model.generation_config.eos_token_id,
    }
print(json.dumps(said))
"""


def prompts(rows: int, count: int = PROMPTS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(9)
    lengths = torch.randint(4, 24, (count,), generator=generator).tolist()
    return [torch.randint(2, rows, (n,), generator=generator).tolist() for n in lengths]


def tops_of(model: Any, asked: list[list[int]]) -> list[int]:
    with torch.no_grad():
        return [int(model(torch.tensor([ids])).logits[0, -1].argmax()) for ids in asked]


def fresh(folders: dict[str, str], asked: list[list[int]]) -> dict[str, Any]:
    """Ask plain transformers and peft in a process without anything of ours."""
    content = json.dumps({"folders": folders, "prompts": asked, "messages": MESSAGES})
    done = subprocess.run(
        [sys.executable, "-c", FRESH], input=content, capture_output=True, text=True, check=False,
        cwd="/", env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout))


def agreement(one: list[int], other: list[int]) -> float:
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def test_a_fresh_process_answers_as_the_live_adapter(
    plain: Made, on_nf4: Made, tmp_path: Path
) -> None:
    """Plain peft and transformers, with the template of training: C10, G11."""
    live, folders, asked = {}, {}, prompts(297)
    for name, run in (("plain", plain), ("nf4", on_nf4)):
        section = ModelSection(path="x", quantization="nf4" if name == "nf4" else "none")
        base = load_model(run.base, section, torch.device("cpu"))
        live[name] = tops_of(load_adapter(base, run.run.adapter), asked)
        folders[f"adapter {name}"] = str(export.export(run.words, str(tmp_path / f"a_{name}")))
        folders[f"merged {name}"] = str(export.merge(run.words, str(tmp_path / f"m_{name}")))
    assert len(set(live["plain"])) > 5
    said = fresh(folders, asked)
    for name, run in (("plain", plain), ("nf4", on_nf4)):
        tokenizer = beside.tokenizer_of(run.run)
        template = get_template(run.run.info()["template"], tokenizer)
        ids = encode_prompt(MESSAGES, template, tokenizer)
        for kind in ("adapter", "merged"):
            told = said[f"{kind} {name}"]
            if (kind, name) != ("adapter", "nf4"):  # that one is on the base as it is in its files
                assert agreement(told["tops"], live[name]) >= 0.995, (kind, name)
            assert told["ids"] == ids, (kind, name)
            assert tokenizer.decode(ids, skip_special_tokens=False) == told["text"]
    assert said["merged nf4"]["ends"] == 1
    chat = open_chat(folders["merged nf4"])
    assert chat.encode(MESSAGES) == said["merged nf4"]["ids"]


@pytest.mark.exact
def test_the_default_model_merged_agrees_with_its_live_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantised to NF4, as QLoRA trains it; its figure is printed."""
    from raytune_ft.config.schema import LoraSection
    from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
    from raytune_ft.model.adapter import attach, save_adapter
    from raytune_ft.model.loading import prepare_folder
    from raytune_ft.model.merge import merge_to

    base = prepare_folder("smollm2-135m-instruct")
    text = (ROOT / "README.md").read_text(encoding="utf-8").split()
    tokenizer = TextTokenizer.from_folder(base)
    asked = [tokenizer.encode(" ".join(text[i : i + 12])) for i in range(0, PROMPTS * 2, 2)]
    section = ModelSection(path="x", quantization="nf4")
    model = attach(load_model(base, section, torch.device("cpu")), LoraSection(r=16), 1).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    save_adapter(model, tmp_path / "adapter", str(base))
    live = tops_of(model, asked)
    merge_to(base, tmp_path / "adapter", tmp_path / "m", base="dequantized", section=section)
    merge_to(base, tmp_path / "adapter", tmp_path / "o", base="original", section=section)
    said = fresh({"merged": str(tmp_path / "m"), "original": str(tmp_path / "o")}, asked)
    found = {name: agreement(told["tops"], live) for name, told in said.items()}
    with capsys.disabled():
        print(f"\ntop-1 agreement over {len(asked)} prompts: {found}")
    assert found["merged"] >= 0.995
    assert found["original"] < found["merged"]


def test_a_merge_says_what_it_did(on_nf4: Made, tmp_path: Path, call: Command) -> None:  # noqa: F811
    said = call("merge", on_nf4.words, "--out", str(tmp_path / "m"), "--max-shard-size", "200KB")
    assert (said.code, said.out) == (0, f"{tmp_path / 'm'}\n")
    lines = said.err.splitlines()
    assert lines[0].startswith("merging into the dequantised NF4 weights, which training saw")
    assert lines[1].startswith("held-out loss by base: dequantized ")
    assert lines[2].startswith("|dW|: how far the adapter moves a weight W; lost: ")
    assert lines[3].split() == ["layers", "number", "|dW|/|W|", "lost/|dW|", "at", "most"]
    assert lines[4].split()[:2] == ["down_proj", "2"]
    report = content_of(tmp_path / "m/merge_report.json")
    assert report["base"] == "dequantized"
    assert set(report["held_out"]) == {"original", "dequantized"}
    assert report["held_out"]["original"] != report["held_out"]["dequantized"]
    assert len(report["layers"]) == 14
    assert all(0 < layer["lost_over_moved"] < 10 for layer in report["layers"])
    assert len(list((tmp_path / "m").glob("model-*.safetensors"))) > 1
    card = (tmp_path / "m/README.md").read_text()
    for word in ("lora.r | 4", "rows.jsonl", "Prompt template: `internlm_chat`", "dequantised"):
        assert word in card
    assert str(on_nf4.base.parent) not in card
    marker = content_of(tmp_path / "m/raytune_ft.json")
    assert (marker["merged_into"], marker["template"]) == ("dequantized", "internlm_chat")


def test_held_out_loss_is_that_of_the_folders(on_nf4: Made, tmp_path: Path) -> None:
    """Measured on the other base's own merge as well: what a merge into it reports."""
    losses = []
    for base in ("original", "dequantized"):
        out = export.merge(on_nf4.words, str(tmp_path / base), base=base)
        losses.append(content_of(out / "merge_report.json")["held_out"])
    assert losses[0] == losses[1]
    trained = [json.loads(line) for line in on_nf4.run.metrics.read_text().splitlines()][-1]
    assert abs(losses[0]["dequantized"] - trained["loss"]) < 1.0
    quiet = export.merge(on_nf4.words, str(tmp_path / "quiet"), held_out=False)
    assert content_of(quiet / "merge_report.json")["held_out"] == {}


def test_a_default_export_stays_in_the_run_and_can_be_done_again(plain: Made) -> None:
    before = (plain.run.adapter / "adapter_model.safetensors").read_bytes()
    for _ in range(2):
        assert export.export(plain.words) == plain.run.adapter
        assert export.merge(plain.words) == plain.run.merged
    assert (plain.run.adapter / "adapter_model.safetensors").read_bytes() == before
    assert (plain.run.adapter / "tokenizer.json").is_file()
    names = {path.name for path in plain.run.path.iterdir()}
    assert not [name for name in names if name.startswith((".writing", ".former", ".other"))]


def test_mistakes_are_one_line_and_leave_nothing(
    plain: Made,
    tmp_path: Path,
    call: Command,  # noqa: F811
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    out = str(tmp_path / "out")
    for words, says in (
        (["merge", plain.words, "--base", "dequantized", "--out", out], "were not quantised"),
        (["merge", plain.words, "--out", str(tmp_path / "full")], "exists and is not empty"),
        (["export", plain.words, "--out", str(tmp_path / "full")], "exists and is not empty"),
        (["merge", plain.words, "--format", "gptq", "--out", out], "--format gptq: needs a cal"),
        (["merge", plain.words, "--max-shard-size", "2", "--out", out], "--max-shard-size"),
        (["merge", str(tmp_path), "--out", out], "not a run folder"),
        (["export", plain.words, "--out", "/proc/out"], "/proc/"),
        (["convert", "merge", str(plain.base), str(tmp_path), out], "no adapter_config.json"),
    ):
        said = call(*words)
        assert (said.code, said.out) == (2, ""), words
        assert says in said.err, said.err
        assert len(said.err.splitlines()) == 1, said.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_a_full_disk_is_seen_before_anything_is_written(
    plain: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Command,  # noqa: F811
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(writing.shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    for verb in (["merge"], ["export"], ["merge", "--format", "gguf-f16"]):
        said = call(*verb, plain.words, "--out", str(tmp_path / "out"))
        assert said.code == 2
        assert "needs 0.1 GiB, and its disk has 0.0 GiB free" in said.err
        assert not list(tmp_path.iterdir())


KILLED = """
import sys, time
from raytune_ft.model import merge
real = merge.ShardWriter.add
def slow(self, name, tensor):
    real(self, name, tensor)
    print("written", flush=True)
    time.sleep(60)
merge.ShardWriter.add = slow
from raytune_ft import export
export.merge(sys.argv[1], sys.argv[2])
"""


def test_a_merge_that_was_killed_leaves_nothing_for_long(plain: Made, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, plain.words, str(out)], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    with pytest.raises(export.RecipeError, match="is being written by another process"):
        export.merge(plain.words, str(out))
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(durable.WRITING)
    assert any(left.iterdir())
    assert export.merge(plain.words, str(out)) == out
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_target_is_replaced_when_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ZeroDivisionError), new_folder(out, replace=True) as folder:
        (folder / "a").write_text("2")
        assert (out / "a").read_text() == "1"
        raise ZeroDivisionError
    assert (out / "a").read_text() == "1"
    with new_folder(out, replace=True) as folder:
        (folder / "b").write_text("3")
    assert [path.name for path in out.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_parameter_run(tiny_model: Path, tmp_path: Path) -> None:
    """Exported it is a model folder; GGUF is made of it as of a merged one."""
    model = {"method": "full", "template": "qwen_chat"}
    full = made(tmp_path / "it", tiny_model, model=model)
    out = export.export(full.words, str(tmp_path / "out"))
    written = load_file(out / "model.safetensors")
    assert written.keys() == load_file(full.run.model / "model.safetensors").keys()
    assert "<|im_start|>user" in (out / "chat_template.jinja").read_text()
    gguf = export.merge(full.words, str(tmp_path / "gguf"), form="gguf-q8_0")
    assert sorted(path.name for path in gguf.iterdir()) == [
        "Modelfile", "README.md", "raytune_ft.json", "run-q8_0.gguf",
    ]  # fmt: skip
    with pytest.raises(export.RecipeError, match="full-parameter run has nothing to merge"):
        export.merge(full.words)


def test_three_steps_of_the_reference(
    on_nf4: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: Command,  # noqa: F811
) -> None:
    """pth_to_hf from a run, a checkpoint; merge; a .pth of the reference is never unpickled."""
    monkeypatch.chdir(tmp_path)
    step = on_nf4.run.checkpoints / "step_000004"
    recipe = str(on_nf4.run.recipe)
    for trained, out in ((on_nf4.words, "hf"), (str(step), "hf_step")):
        assert call("convert", "pth_to_hf", recipe, trained, out).out == f"{out}\n"
    one, other = (load_file(f"{f}/adapter_model.safetensors") for f in ("hf", "hf_step"))
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())
    said = call("convert", "merge", str(on_nf4.base), "hf", "merged", "--max-shard-size", "2GB")
    assert (said.code, said.out) == (0, "merged\n")
    assert "dequantised NF4 weights" in said.err
    ours = load_file(export.merge(on_nf4.words, str(tmp_path / "ours")) / "model.safetensors")
    theirs = load_file("merged/model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours.keys() | theirs.keys())
    assert {"tokenizer.json", "chat_template.jinja", "README.md"} <= {
        path.name for path in Path("merged").iterdir()
    }
    canary = tmp_path / "canary"
    pickled = f"import os\nos.system('touch {canary}')"
    Path("epoch_1.pth").write_bytes(b"cbuiltins\nexec\n(S" + repr(pickled).encode() + b"\ntR.")
    Path("epoch_2.pth").mkdir()
    (Path("epoch_2.pth") / "mp_rank_00_model_states.pt").write_bytes(b"x")
    for name in ("epoch_1.pth", "epoch_2.pth"):
        said = call("convert", "pth_to_hf", recipe, name, "out")
        assert (said.code, len(said.err.splitlines())) == (2, 1)
        assert f"{name}: a pickled checkpoint" in said.err
        assert not Path("out").exists()
    assert not canary.exists()
