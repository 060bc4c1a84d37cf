"""MMLU: each figure computed again the plain way, with a tiny model and by hand."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console

from raytune_ft import survey
from raytune_ft.config import loader
from raytune_ft.config.schema import DataSection, ModelSection, Recipe
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import DataError, RecipeError
from raytune_ft.model import loading
from raytune_ft.screen import Screen
from raytune_ft.training.evaluating import mmlu
from raytune_ft.training.run_folder import RunFolder, read_jsonl
from raytune_ft.training.watching.recording import RunWriter
from raytune_ft.training.watching.reporting.tables import mmlu_table
from tests.conftest import WORDS
from tests.data.conftest import write_jsonl
from tests.ranks import run_ranks

CPU = torch.device("cpu")
DATA = DataSection.model_validate({"sources": [{"path": "x"}], "max_length": 24})


def rows() -> list[dict[str, str]]:
    """Forty-one questions of five subjects, in four subcategories and three categories."""
    subjects = ("astronomy", "college_physics", "virology", "marketing", "sociology")
    return [
        {
            "input": f"Question {i}: {' '.join(WORDS[(i + k) % 10] for k in range(3 + i % 9))}?"
            "\nA. red\nB. blue\nC. stone\nD. river\nAnswer:",
            "output": "ABCD"[(i * 7) % 4],
            "subject": subjects[(i * i + i // 7) % 5],
        }
        for i in range(41)
    ]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mmlu") / "five_shot_mmlu_val.json"
    path.write_text(json.dumps(rows()))
    return path


def load(folder: Path) -> tuple[torch.nn.Module, TextTokenizer]:
    model = loading.load_model(folder, ModelSection(path=str(folder)), CPU)
    return model, TextTokenizer.from_folder(folder)


def answered(folder: Path, file: Path, data: DataSection = DATA) -> dict[str, Any]:
    model, tokenizer = load(folder)
    benchmark = mmlu.read_benchmark(str(file))
    return mmlu.evaluate(model, tokenizer, benchmark, data, CPU, lambda done, total: None)


def by_transformers(folder: Path) -> list[bool]:
    """Answer each question with transformers alone: whole logits, its own tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    letters = [tokenizer.encode(letter, add_special_tokens=False)[0] for letter in "ABCD"]
    right = []
    for row in rows():
        ids = [tokenizer.bos_token_id, *tokenizer.encode(row["input"], add_special_tokens=False)]
        with torch.no_grad():
            last = model(torch.tensor([ids])).logits[0, len(ids) - 1]
        scores = {letter: float(last[id_]) for letter, id_ in zip("ABCD", letters, strict=True)}
        right.append(max(scores, key=lambda letter: scores[letter]) == row["output"])
    return right


def percent(rights: list[bool]) -> float:
    return 100 * sum(rights) / len(rights)


def test_accuracies_equal_those_of_an_independent_computation(
    tiny_model: Path, questions: Path
) -> None:
    right = by_transformers(tiny_model)
    assert 0 < sum(right) < len(right)
    got = answered(tiny_model, questions)

    def of(*subjects: str) -> float:
        pairs = zip(rows(), right, strict=True)
        return percent([hit for row, hit in pairs if row["subject"] in subjects])

    asked = sorted({row["subject"] for row in rows()})
    assert got["subjects"] == {subject: of(subject) for subject in asked}
    assert got["average"] == pytest.approx(sum(map(of, asked)) / len(asked), rel=1e-12)
    places = {subject: mmlu.PLACES[subject] for subject in asked}
    for level, part in ((0, "categories"), (1, "subcategories")):
        names = {place[level] for place in places.values()}
        assert got[part] == {
            name: of(*[subject for subject in asked if places[subject][level] == name])
            for name in names
        }
    assert (got["questions"], got["cut"]) == (41, 0)


def test_subjects_pool_by_their_questions_and_the_average_is_of_subjects() -> None:
    got = mmlu.figures({"astronomy": (1, 4), "college_physics": (6, 6), "virology": (0, 2)})
    assert got["subjects"] == {"astronomy": 25.0, "college_physics": 100.0, "virology": 0.0}
    assert got["subcategories"] == {"physics": 70.0, "health": 0.0}
    assert got["categories"] == {"STEM": 70.0, "other": 0.0}
    assert got["average"] == pytest.approx(125 / 3)


def test_the_table_has_the_benchmark_s_57_subjects() -> None:
    counts: dict[str, int] = {}
    for category, _ in mmlu.PLACES.values():
        counts[category] = counts.get(category, 0) + 1
    assert counts == {"STEM": 18, "humanities": 13, "social sciences": 12, "other": 14}
    assert len({part for _, part in mmlu.PLACES.values()}) == 17


def test_a_long_prompt_loses_its_beginning_and_under_compat_its_end(tiny_model: Path) -> None:
    _, tokenizer = load(tiny_model)
    text = rows()[5]["input"]
    ids = tokenizer.encode(text)
    start = list(tokenizer.bos_ids)
    assert mmlu.prompt_ids(text, tokenizer, DATA, None) == ([*start, *ids], False)
    whole = len(start) + len(ids)
    assert mmlu.prompt_ids(text, tokenizer, DATA, whole) == ([*start, *ids], False)
    assert mmlu.prompt_ids(text, tokenizer, DATA, 20) == ([*start, *ids[-19:]], True)
    compat = DATA.model_copy(update={"compat": "xtuner-0.1.9"})
    assert mmlu.prompt_ids(text, tokenizer, compat, 20) == ([*start, *ids[:23]], True)


def test_a_special_token_in_a_question_stays_text(tiny_model: Path) -> None:
    _, tokenizer = load(tiny_model)
    ids, _ = mmlu.prompt_ids("a<|im_end|>b", tokenizer, DATA, None)
    assert tokenizer.token_id("<|im_end|>") not in ids
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == "a<|im_end|>b"


def test_cut_prompts_are_counted(tiny_model: Path, questions: Path) -> None:
    compat = DATA.model_copy(update={"compat": "xtuner-0.1.9"})
    assert answered(tiny_model, questions, compat)["cut"] == 41


def test_the_model_that_is_trained_is_left_as_it_was_but_for_its_mode(
    tiny_model: Path, questions: Path
) -> None:
    model, tokenizer = load(tiny_model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    benchmark = mmlu.read_benchmark(str(questions))
    seen: list[tuple[int, int]] = []
    mmlu.evaluate(model, tokenizer, benchmark, DATA, CPU, lambda *pair: seen.append(pair))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert seen[0] == (0, 41)


class Spaced:
    """A tokenizer that puts the same space token before every letter."""

    def encode(self, text: str) -> list[int]:
        return [9, ord(text)]


def test_letters_are_told_apart_where_all_begin_with_a_space() -> None:
    assert mmlu.letter_ids(Spaced()) == [65, 66, 67, 68]  # type: ignore[arg-type]


def _rank(number: int, world: int, model: Path, file: Path, out: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{out}/store"
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=world)
    (out / f"rank_{number}.json").write_text(json.dumps(answered(model, file)))
    dist.barrier()
    # one time in ten the interpreter's own end aborts over a thread of the C++ libraries
    os._exit(0)


def test_ranks_that_share_the_questions_find_the_same_figures(
    tiny_model: Path, questions: Path, tmp_path: Path
) -> None:
    """An odd number of questions: the last round repeats one, which counts once."""
    run_ranks(_rank, (2, tiny_model, questions, tmp_path), 2)
    alone = answered(tiny_model, questions)
    for number in range(2):
        assert json.loads((tmp_path / f"rank_{number}.json").read_text()) == alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output": "E"}, ":2: 'output' is 'E', not A, B, C or D"),
        ({"subject": "astronomie"}, ":2: no MMLU subject 'astronomie'; did you mean 'astronomy'?"),
        ({"input": None}, ":2: no text in column 'input'"),
    ],
)
def test_a_row_that_is_no_question_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write_jsonl(tmp_path / "mmlu.jsonl", [rows()[0], {**rows()[1], **change}])
    with pytest.raises(DataError) as caught:
        mmlu.read_benchmark(str(path))
    assert f"{path}{message}" in str(caught.value)


def test_a_file_that_is_not_here_is_one_line() -> None:
    with pytest.raises(RecipeError, match=r"^chat_eval\.mmlu\[0\]: no file no/such\.json; "):
        mmlu.absolute(["no/such.json"])


def test_figures_are_named_by_their_file() -> None:
    names = ["data/five_shot_mmlu_val.json", "five_shot_mmlu_test.json", "my_mmlu.jsonl"]
    assert list(map(mmlu.benchmark_name, names)) == ["mmlu_fs_val", "mmlu_fs_test", "my_mmlu"]


def test_the_recipe_asks_the_reference_s_two_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = loader.load_recipe("internlm_7b_qlora_oasst1_mmlu_e3")
    assert list(map(mmlu.benchmark_name, recipe.chat_eval.mmlu)) == ["mmlu_fs_val", "mmlu_fs_test"]
    notes = survey.survey(recipe).notes
    for path in recipe.chat_eval.mmlu:
        assert f"chat_eval.mmlu: {path} is not here; training needs it" in notes


def test_figures_are_written_and_printed_once_and_cut_off_at_a_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    console = Console(record=True, width=200)
    recipe = Recipe.model_validate({
        "model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}, "run": {"trackers": []},
    })  # fmt: skip
    writer = RunWriter(folder, recipe, Screen(1, console=console))
    found = {"questions": 40, "cut": 0, **mmlu.figures({"astronomy": (1, 4), "virology": (1, 3)})}
    for step in (5, 10):
        writer("mmlu", step=step, name="mmlu_fs_val", **found)
    lines = list(read_jsonl(folder.mmlu))
    assert lines[0] == {"step": 5, "name": "mmlu_fs_val", **found}
    printed = "mmlu_fs_val, step 5: average 29.17 % (STEM 25.00, other 33.33) of 40 questions"
    assert printed in console.export_text()
    table = mmlu_table(lines)
    assert "<tr><td>mmlu_fs_val</td><td>5</td><td>40</td><td>29.17</td><td>25.00</td>" in table
    assert table.count("<tr>") == 3 and mmlu_table([]) == ""
    folder.cut_after(5)
    assert [line["step"] for line in read_jsonl(folder.mmlu)] == [5]


def test_a_run_answers_after_every_epoch_and_at_its_end(
    tiny_model: Path, questions: Path, chats: Path, tmp_path: Path
) -> None:
    """Two epochs and a third cut short: the questions come back after each, in order."""
    from raytune_ft.data import sources
    from raytune_ft.data.counting import estimate
    from raytune_ft.data.examples import Encoder
    from raytune_ft.data.packing import Position
    from raytune_ft.data.places import iter_packs
    from raytune_ft.data.windows import make_feed, measure_rows
    from raytune_ft.training.worker import Job, run

    recipe = Recipe.model_validate({
        "model": {"path": str(tiny_model)},
        "lora": {"r": 4, "alpha": 8, "dropout": 0.0},
        "data": {"sources": [{"path": str(chats)}], "max_length": 96, "compat": "xtuner-0.1.9"},
        "train": {"epochs": 3, "accumulation": 4, "lr": 1e-2, "deepspeed": "none"},
        "chat_eval": {"every": None, "mmlu": [str(questions)]},
        "run": {"trackers": []},
    })  # fmt: skip
    source = sources.open_sources(recipe.data, 1)
    encoder = Encoder.of(recipe, TextTokenizer.from_folder(tiny_model))
    feed = make_feed(source, encoder, 1, measure_rows(source, encoder, range(40)))
    per_epoch = estimate(feed).steps(recipe) // 3
    total = 2 * per_epoch + 1
    train = recipe.train.model_copy(update={"max_steps": total})
    events: list[dict[str, Any]] = []
    job = Job(
        recipe.model_copy(update={"train": train}).model_dump(mode="json"),
        str(tmp_path), str(tiny_model), total, counted=True, sharing=64,
    )  # fmt: skip

    def packs(start: Position) -> Any:
        return iter_packs(feed, start)

    run(job, packs, None, events.append)
    lines = list(read_jsonl(RunFolder(tmp_path).mmlu))
    assert [line["step"] for line in lines] == [per_epoch, 2 * per_epoch, total]
    assert lines == [
        {key: value for key, value in event.items() if key != "kind"}
        for event in events
        if event["kind"] == "mmlu"
    ]
    assert all(line["questions"] == 41 and line["name"] == "mmlu_fs_val" for line in lines)
    steps = [event["step"] for event in events if event["kind"] == "step"]
    assert steps == list(range(1, total + 1))
