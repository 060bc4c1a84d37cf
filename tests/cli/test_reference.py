"""XTuner's spellings at the command line, and the import of configurations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raytune_ft import preprocess
from raytune_ft.cli import spelling
from raytune_ft.config.loader import load_recipe
from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.errors import RecipeError
from tests.cli.conftest import Command, Said
from tests.conftest import ROOT
from tests.importers.test_yaml import AXOLOTL
from tests.importers.written import config_of

NAME = "internlm_7b_qlora_oasst1_e3"
RECIPE = "model: {{path: {model}}}\ndata: {{sources: [{{path: {data}}}], max_length: 96}}\n"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, chats: Path) -> Path:
    """An empty current folder with `tiny.yaml` in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(RECIPE.format(model=tiny_model, data=chats))
    return tmp_path


def one_line(said: Said, code: int, says: str) -> None:
    assert (said.code, said.out) == (code, "")
    assert says in said.err
    assert len(said.err.splitlines()) == 1


def plan(call: Command, *words: str) -> dict[str, object]:
    said = call("train", *words, "--dry-run", "--json")
    assert said.code == 0, said.err
    return dict(json.loads(said.out))


def test_import_writes_a_recipe_and_lists_the_rest(call: Command, work: Path) -> None:
    (work / "my.py").write_text(config_of(NAME) + "spare = 3\n", encoding="utf-8")
    said = call("import", "my.py")
    assert (said.code, said.out) == (0, "my_recipe.yaml\n")
    assert "my.py:" in said.err
    assert "spare = 3 is left out" in said.err
    assert load_recipe("my_recipe.yaml") == load_recipe(NAME)
    head = (work / "my_recipe.yaml").read_text(encoding="utf-8").partition("\nmodel:")[0]
    assert head.startswith("# From XTuner's my.py")
    assert "spare = 3" in head
    assert all(row.startswith("#") and len(row) <= 100 for row in head.splitlines() if row)


def test_import_prints_and_writes_where_asked(call: Command, work: Path) -> None:
    (work / "a.yml").write_text(AXOLOTL, encoding="utf-8")
    printed = call("import", "a.yml", "--stdout")
    assert yaml.safe_load(printed.out)["lora"]["r"] == 32
    assert not (work / "a_recipe.yaml").exists()
    assert call("import", "a.yml", "--out", "new/b.yaml").out == "new/b.yaml\n"
    assert (work / "new/b.yaml").read_text(encoding="utf-8") == printed.out
    one = call("import", "a.yml", "--out", "new/b.yaml")
    assert one.code == 2
    assert "new/b.yaml: exists" in one.err


ROWS = {
    "a.json": '[{"q": "hi", "ctx": "there", "ans": "red", "sys": "be kind"}]',
    "b.jsonl": '{"turns": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]}',
}
INFO = {
    "a": {"file_name": "a.json", "columns": {
        "prompt": "q", "query": "ctx", "response": "ans", "system": "sys"}},
    "b": {"file_name": "b.jsonl", "formatting": "sharegpt", "columns": {"messages": "turns"}},
}  # fmt: skip
FACTORY = "model_name_or_path: {model}\nstage: sft\ndataset: a,b\ntemplate: qwen\n"
AXOLOTL_ROWS = """\
base_model: {model}
learning_rate: 1e-4
datasets:
  - path: data/a.json
    type: {{field_instruction: q, field_input: ctx, field_output: ans, field_system: sys}}
  - path: data/b.jsonl
    type: chat_template
    field_messages: turns
    message_property_mappings: {{role: from, content: value}}
"""


@pytest.mark.parametrize("text", [FACTORY, AXOLOTL_ROWS], ids=["factory", "axolotl"])
def test_rows_of_an_imported_recipe_are_read(
    call: Command, work: Path, tiny_model: Path, text: str
) -> None:
    (work / "data").mkdir()
    for name, content in ROWS.items():
        (work / "data" / name).write_text(content)
    (work / "data/dataset_info.json").write_text(json.dumps(INFO))
    (work / "f.yaml").write_text(text.format(model=tiny_model))
    assert call("import", "f.yaml").code == 0
    seen = call("inspect", "f_recipe.yaml")
    assert seen.code == 0, seen.err
    for part in ("system: be kind", "hi\nthere", "⟦red<|im_end|>⟧", "user: one", "⟦two<|im_end|>⟧"):
        assert part in seen.out


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.py", "x = (", "a.py:1: is not Python 3"),
        ("a.yaml", "a: 1", "a.yaml: neither base_model"),
        ("a.yaml", "base_model: m\nrl: kto\nmicro_batch_size: 1", "a.yaml:2: rl kto"),
        ("a.py", "\0", "a.py:1: is not Python 3"),
        ("b.py", "", "a.py: no such file"),
    ],
)
def test_nothing_is_written_when_it_cannot_be_valid(
    call: Command, work: Path, name: str, text: str, says: str
) -> None:
    (work / name).write_text(text)
    wanted = "a.py" if name == "b.py" else name
    one_line(call("import", wanted), 2, says)
    assert not list(work.glob("*_recipe.yaml"))


def test_train_options_of_xtuner(call: Command, work: Path) -> None:
    words = ["--deepspeed", "deepspeed_zero2_offload", "--work-dir", "wd/x", "--seed", "7"]
    assert plan(call, "tiny.yaml", *words, "--launcher", "none", "--local_rank", "0")
    assert spelling.train_words(
        deepspeed="deepspeed_zero2", work_dir="wd/x", seed=7, launcher="none", local_rank=0
    ) == ["train.deepspeed=zero2", "run.storage=wd", "run.name=x", "train.seed=7"]


def test_a_working_folder_may_be_an_address() -> None:
    words = spelling.train_words(
        deepspeed=None, work_dir="s3://bucket/runs/a/", seed=None, launcher="none", local_rank=0
    )
    assert words == ["run.storage=s3://bucket/runs", "run.name=a"]


def test_cfg_options_set_our_fields(call: Command, work: Path) -> None:
    options = ["optim_wrapper.optimizer.lr=1e-3", "train_cfg.max_epochs=2", "max_length=64"]
    plain = plan(call, "tiny.yaml", "train.epochs=2", "data.max_length=64")
    assert plan(call, "tiny.yaml", "--cfg-options", *options) == plain
    said = call("train", "tiny.yaml", "--cfg-options", "nothing.like=1", "--dry-run")
    one_line(said, 2, "unknown key 'nothing.like'")
    fields = {field for field in spelling.CONFIG_KEYS.values() if "sources" not in field}
    recipe = load_recipe("tiny.yaml").model_dump()
    assert all(field.split(".")[1] in recipe[field.split(".")[0]] for field in fields)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "tiny.yaml", "--launcher", "pytorch"], "set run.workers=N"),
        (["train", "tiny.yaml", "--launcher", "other"], "--launcher: expected none"),
        (["train", "tiny.yaml", "--local-rank", "1"], "--local_rank: Ray numbers"),
        (["train", "tiny.yaml", "--work-dir", "/"], "--work-dir: '/' names no folder"),
        (["train", "tiny.yaml", "--deepspeed", "deepspeed_zero9", "--dry-run"], "train.deepspeed"),
        (["train", "--resume", "nowhere/checkpoints/step_000001"], "nowhere: not a run folder"),
        (["test", "tiny.yaml"], "test tiny.yaml: rows are measured during training"),
        (["test", "tiny.yaml", "--checkpoint", "x"], "data.validation"),
        (["convert", "split", "a", "b"], "convert split a b: weights are read"),
        (["convert", "merge", "model", "nowhere", "out"], "nowhere: no adapter_config.json"),
        (["convert", "pth_to_hf", "tiny.yaml", "nowhere", "out"], "nowhere: not a run folder"),
        (["convert", "merge", "m", "a", "o", "--offload-folder", "x"], "not needed"),
        (["chat", "m", "--lagent"], "--lagent: tool use is not a part of chat"),
        (["chat", "m", "--no-streamer"], "answers are always streamed"),
        (["chat", "m", "--with-plugins", "solve"], "--with-plugins"),
        (["chat", "m", "--system", "a", "--system-template", "sql"], "not both"),
        (["chat", "m", "--system-template", "sqll"], "choose: moss_sft"),
        (["chat", "m", "--prompt-template", "internlm_cht"], "did you mean 'internlm_chat'?"),
        (["chat", "m", "--adapter", "nowhere"], "nowhere: no such folder"),
        (["mmbench", "x"], "images are not read"),
        (["preprocess", "arxiv", "none.jsonl", "o.json"], "none.jsonl: No such file"),
        (["preprocess", "arxiv", "a", "b", "c"], "'c': only SRC and DST"),
        (["preprocess", "arxiv", "tiny.yaml", "o.json", "--start-date", "soon"], "--start-date"),
        (["preprocess", "arxiv", "tiny.yaml", "tiny.yaml"], "is the source"),
        (["check-custom-dataset", "tiny.yaml", "none.jsonl"], "none.jsonl"),
    ],
    ids=" ".join,
)
def test_what_means_nothing_here_is_one_line(
    call: Command, work: Path, words: list[str], says: str
) -> None:
    one_line(call(*words), 2, says)


def test_a_run_goes_on_only_under_its_own_recipe(work: Path) -> None:
    mine = load_recipe("tiny.yaml")
    spelling.check_same("tiny.yaml", mine, mine, "runs/x")
    other = load_recipe("tiny.yaml", ["lora.r=8"])
    with pytest.raises(RecipeError, match=r"lora.r is another one in tiny.yaml"):
        spelling.check_same("tiny.yaml", other, mine, "runs/x")


def test_check_and_log_dataset_are_inspect(call: Command, work: Path) -> None:
    looked = call("inspect", "tiny.yaml", "--rows", "10")
    assert call("check-custom-dataset", "tiny.yaml") == looked
    assert call("log-dataset", "tiny.yaml") == call("inspect", "tiny.yaml", "--rows", "1")
    (work / "mine.jsonl").write_text('{"instruction": "hello", "input": "", "output": "red"}\n')
    other = call("check-custom-dataset", "tiny.yaml", "mine.jsonl")
    assert other.code == 0
    assert "hello" in other.out


def test_merge_of_plain_folders(call: Command, work: Path, tiny_model: Path) -> None:
    """The merged weights are those of the base plus the adapter's update."""
    import torch
    from safetensors.torch import load_file

    from raytune_ft.model import adapter, loading

    base = loading.load_model(tiny_model, ModelSection(path=str(tiny_model)), torch.device("cpu"))
    model = adapter.attach(base, LoraSection(r=2, alpha=4, targets=["q_proj"]), seed=1)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapter.save_adapter(model, work / "hf", str(tiny_model))
    said = call("convert", "merge", str(tiny_model), "hf", "merged", "--max-shard-size", "100MB")
    assert (said.code, said.out) == (0, "merged\n")
    assert (work / "merged/tokenizer.json").is_file()
    before = load_file(tiny_model / "model.safetensors")
    after = load_file(work / "merged/model.safetensors")
    delta = load_file(work / "hf/adapter_model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    a, b = (delta[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
    expected = before[f"{layer}.weight"] + 2.0 * (b @ a)
    torch.testing.assert_close(after[f"{layer}.weight"], expected, rtol=1e-6, atol=1e-6)
    kept = f"{layer.replace('q_proj', 'k_proj')}.weight"
    assert torch.equal(after[kept], before[kept])


def test_chat_with_an_adapter_on_a_named_base(call: Command, work: Path, tiny_model: Path) -> None:
    import torch

    from raytune_ft.model import adapter, loading

    base = loading.load_model(tiny_model, ModelSection(path=str(tiny_model)), torch.device("cpu"))
    adapter.save_adapter(adapter.attach(base, LoraSection(r=2), seed=1), work / "hf", "elsewhere")
    words = ["--adapter", "hf", "--prompt-template", "default", "--system-template", "moss_sft"]
    said = call("chat", str(tiny_model), *words, "--ask", "what is red?", "--max-new-tokens", "3")
    assert said.code == 0, said.err
    assert said.out.startswith("> what is red?\n")


RECORDS = [
    {"title": "A", "abstract": "a", "categories": "cs.CL stat.ML", "update_date": "2021-05-01"},
    {"title": "B", "abstract": "b", "categories": "math.GT", "update_date": "2021-05-01"},
    {"title": "C", "abstract": "c", "categories": "cs.CV", "update_date": "2019-12-31"},
    {"title": "D", "abstract": "d", "categories": "cs.LG", "update_date": "2020-01-01"},
]


def test_arxiv_records_are_chosen_and_bad_lines_named(call: Command, work: Path) -> None:
    lines = [json.dumps(record) for record in RECORDS]
    lines[2:2] = ["not json", "", '{"title": "x"}']
    (work / "arxiv.jsonl").write_text("\n".join(lines))
    said = call("preprocess", "arxiv", "arxiv.jsonl", "out.json")
    assert said.out == "Save to out.json\n1 of 6 records\n"
    assert said.err == (
        "left out arxiv.jsonl:3: not JSON\nleft out arxiv.jsonl:5: no 'categories'\n"
    )
    assert json.loads((work / "out.json").read_text()) == [RECORDS[0]]
    words = ["--categories", "cs.CL", "cs.LG", "cs.CV", "--start-date", "2019-01-01"]
    assert call("preprocess", "arxiv", "arxiv.jsonl", "b.json", *words).code == 0
    assert [row["title"] for row in json.loads((work / "b.json").read_text())] == ["A", "C", "D"]


def test_no_record_at_all_is_an_error_and_writes_nothing(call: Command, work: Path) -> None:
    (work / "a.csv").write_text("id,title\n1,x\n")
    one_line(call("preprocess", "arxiv", "a.csv", "o.json"), 3, "a.csv:1: not JSON")
    assert not (work / "o.json").exists()
    assert not list(work.glob(".o.json*"))


record = st.fixed_dictionaries({
    "title": st.text(max_size=8),
    "categories": st.lists(st.sampled_from(["cs.AI", "math.GT"]), max_size=3).map(" ".join),
    "update_date": st.dates().map(str),
})  # fmt: skip


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(record, max_size=8), since=st.dates().map(str))
def test_chosen_records_are_the_wanted_ones_in_order(
    tmp_path: Path, records: list[dict[str, str]], since: str
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.json"
    source.write_text("".join(json.dumps(r) + "\n" for r in records))
    chosen = preprocess.arxiv(str(source), str(target), ["cs.AI"], since)
    wanted = [r for r in records if "cs.AI" in r["categories"] and r["update_date"] >= since]
    assert json.loads(target.read_text()) == wanted
    assert (chosen.rows, chosen.lines, chosen.n_bad) == (len(wanted), len(records), 0)


def test_help_and_version(call: Command) -> None:
    assert call("help").out == call("--help").out
    assert call("-v").out == call("version").out


def test_names_are_listed_without_the_importers() -> None:
    code = (
        "import sys; from raytune_ft.cli import dispatch; dispatch(['list']); "
        "heavy = ('torch', 'raytune_ft.importers', 'raytune_ft.model', 'raytune_ft.data'); "
        "sys.exit(str([m for m in sys.modules if m.startswith(heavy)] or '') or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
