"""`raytune-ft eval` on local tasks, offline, against a plain forward pass per text."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from raytune_ft.chat.model import ChatModel, load_source, open_chat
from raytune_ft.chat.source import find_source
from raytune_ft.cli import dispatch
from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.data.encode import encode_prompt
from raytune_ft.model.adapter import attach, save_adapter
from raytune_ft.model.generate import stream_ids
from raytune_ft.model.loading import load_model
from raytune_ft.model.scoring import Ending, score
from tests.conftest import WORDS, make_tiny_model

harness = pytest.importorskip("raytune_ft.evaluate.harness", reason="pip install '.[eval]'")

QUESTIONS = [
    {"question": f"what is {word}?", "choices": WORDS[i : i + 3], "answer": i % 3}
    for i, word in enumerate(WORDS[:6])
]
TEXTS = [" ".join(WORDS[i:] + WORDS[:i]) * (1 + 19 * (i % 2)) for i in range(4)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Multiple choice, free answers and perplexity, with rows in local files."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "questions.json").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (folder / "texts.json").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))

    def rows(name: str) -> dict[str, Any]:
        return {
            "dataset_path": "json", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(folder / name)}},
        }  # fmt: skip

    means = {"aggregation": "mean", "higher_is_better": True}
    written = {
        "tiny_choice": {
            **rows("questions.json"), "output_type": "multiple_choice",
            "doc_to_text": "Q: {{question}}\nA:", "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}", "target_delimiter": " ",
            "metric_list": [{"metric": "acc", **means}],
        },
        "tiny_write": {
            **rows("questions.json"), "output_type": "generate_until",
            "doc_to_text": "Q: {{question}}\nA:", "doc_to_target": "{{choices[answer]}}",
            "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 9},
            "metric_list": [{"metric": "exact_match", **means}],
        },
        "tiny_texts": {
            **rows("texts.json"), "output_type": "loglikelihood_rolling", "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    }  # fmt: skip
    for name, content in written.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **content}))
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context of 64 tokens, so that long texts are divided."""
    folder = tmp_path_factory.mktemp("tiny_64")
    make_tiny_model(folder, seed=4, max_position_embeddings=64)
    return folder


@pytest.fixture(scope="module")
def chat(model_folder: Path) -> ChatModel:
    return open_chat(str(model_folder), device="cpu")


def plain(chat: ChatModel, ids: Sequence[int], n_given: int) -> tuple[float, bool]:
    """One text alone through the network, every logit, in float64."""
    with torch.no_grad():
        logits = chat.model(torch.tensor([list(ids[:-1])])).logits[0].double()
    found = logits.log_softmax(-1)[n_given - 1 :]
    wanted = torch.tensor(list(ids[n_given:]))
    value = found.gather(1, wanted[:, None]).sum()
    return float(value), bool((found.argmax(-1) == wanted).all())


def request(*args: Any) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def model_of(chat: ChatModel) -> Any:
    return harness.HarnessModel(chat, lambda *_: None)


def test_scores_are_those_of_every_text_alone_in_rows_of_any_length(chat: ChatModel) -> None:
    generator = torch.Generator().manual_seed(2)
    endings = []
    for length, given in [(2, 1), (9, 3), (33, 32), (60, 1), (5, 4), (17, 9), (65, 64)]:
        ids = torch.randint(2, 250, (length,), generator=generator).tolist()
        endings.append(Ending(tuple(ids), given))
    expected = [plain(chat, ending.ids, ending.n_given) for ending in endings]
    likeliest = list(stream_ids(chat.model, [7, 8], stop_ids=(), max_new_tokens=3))
    endings.append(Ending((7, 8, *likeliest), 2))
    expected.append(plain(chat, endings[-1].ids, 2))
    for row_tokens in (1, 40, 1024):
        found = score(chat.model, endings, row_tokens)
        assert [s.log_prob for s in found] == pytest.approx([e[0] for e in expected], abs=1e-5)
        assert [s.greedy for s in found] == [e[1] for e in expected]
    assert expected[-1][1] and not expected[0][1]


def test_loglikelihoods_are_those_of_plain_passes(chat: ChatModel) -> None:
    model, tokenizer = model_of(chat), chat.tokenizer
    pairs = [
        ("Q: what is red?\nA:", " blue stone"),
        ("Q: what is red?\nA: ", "blue stone"),  # the space belongs to the continuation
        ("", "river cloud"),
        ("red " * 90, "seven"),  # longer than the context: its beginning goes
        ("night", " green" * 3),
    ]
    found = model.loglikelihood([request(*pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        start = tokenizer.text_start_ids if context else tokenizer.bos_ids[:1]
        given = [*start, *tokenizer.encode(context.rstrip())]
        ids = [*start, *tokenizer.encode(context + continuation)]
        n_wanted = len(ids) - len(given)
        ids = ids[-65:]
        expected = plain(chat, ids, len(ids) - n_wanted)
        assert value == pytest.approx(expected[0], abs=1e-5)
        assert greedy is expected[1]
    assert found[0] == found[1]


def test_a_long_text_is_scored_once_per_token_in_windows_of_the_context(chat: ChatModel) -> None:
    text = TEXTS[1]
    ids = list(chat.tokenizer.encode(text))
    assert len(ids) > 2 * 64
    expected = 0.0
    for start in range(0, len(ids), 64):
        wanted = ids[start : start + 64]
        # as many tokens before the wanted ones as the context holds, the last one not fed
        given = ids[max(0, start - 65 + len(wanted)) : start] or [chat.tokenizer.bos_ids[0]]
        expected += plain(chat, [*given, *wanted], len(given))[0]
    (found,) = model_of(chat).loglikelihood_rolling([request(text)])
    assert found == pytest.approx(expected, abs=1e-4)


def test_answers_end_before_the_first_stop_text(chat: ChatModel) -> None:
    contexts = ["Q: what is red?\nA:", "river", "cloud seven night"]
    wish = {"until": ["e", "\n"], "max_gen_toks": 12}
    found = model_of(chat).generate_until([request(text, wish) for text in contexts])
    for text, answer in zip(contexts, found, strict=True):
        ids = [*chat.tokenizer.text_start_ids, *chat.tokenizer.encode(text)]
        free = stream_ids(chat.model, ids, stop_ids=chat.stop_ids, max_new_tokens=12)
        whole = chat.tokenizer.decode(list(free))
        places = [whole.find(stop) for stop in ("e", "\n") if stop in whole]
        assert answer == (whole[: min(places)] if places else whole)


def test_conversations_have_the_ids_of_chat(chat: ChatModel) -> None:
    model = model_of(chat)
    history = [{"role": "user", "content": "red <|im_end|> river?"}]
    text = model.apply_chat_template(history)
    prompt = encode_prompt(history, chat.template, chat.tokenizer)
    assert model.tok_encode(text) == prompt
    (value, _) = model.loglikelihood([request(text, "blue")], disable_tqdm=True)[0]
    ids = [*prompt, *chat.tokenizer.encode("blue")]
    assert value == pytest.approx(plain(chat, ids, len(prompt))[0], abs=1e-5)
    begun = model.apply_chat_template(
        [*history, {"role": "assistant", "content": "blue"}], add_generation_prompt=False
    )
    assert model.tok_encode(begun) == ids


def run_of(base: Path, folder: Path) -> Path:
    """A finished run: an adapter that changes what the base says."""
    model: Any = load_model(base, ModelSection(path=str(base)), torch.device("cpu"))
    model = attach(model, LoraSection(r=4, alpha=8), 1)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    folder.mkdir(parents=True)
    save_adapter(model, folder / "adapter", str(base))
    (folder / "run.json").write_text(json.dumps({"name": "r", "model_folder": str(base)}))
    (folder / "recipe.yaml").write_text(yaml.safe_dump({"model": {"path": str(base)}}))
    return folder


def test_a_run_is_measured_by_local_tasks_and_the_figures_written_into_it(
    model_folder: Path, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(model_folder, tmp_path / "run")
    words = ["eval", str(run), "--include-path", str(tasks)]
    words += ["--tasks", "tiny_choice,tiny_write", "--tasks", "tiny_texts"]
    assert dispatch(words) == 0
    out, _ = capsys.readouterr()
    (file,) = (run / "evaluations").iterdir()
    assert str(file) in out and "tiny_choice" in out and "word_perplexity" in out
    record = json.loads(file.read_text())
    assert record["n-samples"]["tiny_choice"]["effective"] == len(QUESTIONS)

    adapted = load_source(find_source(str(run)), device="cpu")
    right = 0
    for row in QUESTIONS:
        text, start = f"Q: {row['question']}\nA:", adapted.tokenizer.text_start_ids
        given = len(start) + len(adapted.tokenizer.encode(text))
        values = [
            plain(adapted, [*start, *adapted.tokenizer.encode(f"{text} {choice}")], given)[0]
            for choice in row["choices"]
        ]
        right += values.index(max(values)) == row["answer"]
    assert record["results"]["tiny_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))

    rolling = model_of(adapted).loglikelihood_rolling([request(text) for text in TEXTS])
    words_in_all = sum(len(text.split()) for text in TEXTS)
    found = record["results"]["tiny_texts"]["word_perplexity,none"]
    assert found == pytest.approx(math.exp(-sum(rolling) / words_in_all), rel=1e-6)
    assert record["results"]["tiny_write"]["exact_match,none"] >= 0.0

    out_file = tmp_path / "base.json"
    words = ["eval", str(model_folder), "--include-path", str(tasks), "--tasks", "tiny_choice"]
    assert dispatch([*words, "--limit", "4", "--chat-template", "--out", str(out_file)]) == 0
    assert json.loads(out_file.read_text())["n-samples"]["tiny_choice"]["effective"] == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tasks", "tiny_choise"], "no task 'tiny_choise'"),
        (["--tasks", "x", "--include-path", "nowhere"], "--include-path: no folder nowhere"),
        (["--tasks", " , "], "--tasks: name at least one"),
        (["--tasks", "gone"], "rows cannot be read"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    model_folder: Path,
    tasks: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    told: str,
) -> None:
    content = yaml.safe_load((tasks / "tiny_texts.yaml").read_text())
    content |= {
        "task": "gone",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "no.json")}},
    }
    (tmp_path / "gone.yaml").write_text(yaml.safe_dump(content))
    folder = [] if "--include-path" in words else ["--include-path", str(tmp_path)]
    code = dispatch(["eval", str(model_folder), *words, *folder, "--out", str(tmp_path / "o.json")])
    _, err = capsys.readouterr()
    assert code in (2, 3)
    lines = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and told in lines[0], err
    assert "Traceback" not in err
    assert not (tmp_path / "o.json").exists()
