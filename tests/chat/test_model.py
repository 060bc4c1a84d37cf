"""Answers of a tiny real model: same ids as in training, whole characters, limits, seeds."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import raytune_ft.chat.model as chat_model
from raytune_ft.chat import ChatModel, Sampling, open_chat
from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.data.encode import IGNORE_INDEX, encode_conversation
from raytune_ft.data.segments import Conversation
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.model.adapter import attach, load_adapter, save_adapter
from raytune_ft.model.loading import load_model

CHAT = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "red river?"},
    {"role": "assistant", "content": "blue stone 好"},
    {"role": "user", "content": "and 你?"},
]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatModel:
    return open_chat(str(tiny_model), device="cpu")


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_prompt_ids_are_those_of_training(
    chat: ChatModel, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reaches the model is the training row up to where its labels begin."""
    seen: list[list[int]] = []
    real = chat_model.stream_ids

    def spy(model: object, prompt_ids: list[int], **options: object) -> object:
        seen.append(list(prompt_ids))
        return real(model, prompt_ids, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(chat_model, "stream_ids", spy)
    list(chat.reply(CHAT, max_new_tokens=2))
    tokenizer = TextTokenizer.from_folder(tiny_model)
    row = [*CHAT, {"role": "assistant", "content": "x"}]
    example = encode_conversation(
        Conversation(row), get_template("tokenizer", tokenizer), tokenizer
    )
    targets = (example.labels != IGNORE_INDEX).nonzero()[0]
    last_answer = targets[targets >= len(seen[0])]
    assert last_answer[0] == len(seen[0])
    assert seen == [example.input_ids[: len(seen[0])].tolist()]


def test_an_answer_in_pieces_is_the_greedy_continuation(chat: ChatModel) -> None:
    """Against a second way: full forward passes without a cache."""
    prompt = chat.encode(ask("seven?"))
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(20):
            best = int(chat.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if best in chat.stop_ids:
                break
            ids.append(best)
    pieces = list(chat.pieces(prompt, Sampling(temperature=0.0, max_new_tokens=20)))
    text = chat.tokenizer.decode(ids[len(prompt) :])
    joined = "".join(piece.text for piece in pieces)
    assert text.startswith(joined)
    assert len(text) - len(joined) <= 3
    assert pieces[-1].n_tokens == len(ids) - len(prompt)
    assert pieces[-1].finish in ("stop", "length")
    assert all(piece.finish is None for piece in pieces[:-1])


def test_the_same_seed_gives_the_same_answer(chat: ChatModel) -> None:
    def answer(seed: int) -> str:
        return "".join(
            chat.reply(ask("x"), temperature=2.0, top_p=1.0, top_k=0, max_new_tokens=30, seed=seed)
        )

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_the_limit_ends_an_answer(chat: ChatModel) -> None:
    pieces = list(chat.pieces(chat.encode(ask("x")), Sampling(2.0, 1.0, 0, 5, seed=3)))
    assert (pieces[-1].n_tokens, pieces[-1].finish) == (5, "length")


def test_the_context_ends_an_answer(chat: ChatModel) -> None:
    prompt = chat.encode(ask("red " * (chat.context - 40)))[: chat.context - 3]
    pieces = list(chat.pieces(prompt, Sampling(2.0, 1.0, 0, 50, seed=3)))
    assert pieces[-1].n_tokens <= 3
    full = list(chat.pieces([5] * chat.context, Sampling()))
    assert [(piece.text, piece.n_tokens, piece.finish) for piece in full] == [("", 0, "length")]


def test_a_stop_string_ends_an_answer(chat: ChatModel) -> None:
    def text(stop: tuple[str, ...] = ()) -> tuple[str, str | None]:
        sampling = Sampling(2.0, 1.0, 0, 40, seed=5, stop=stop)
        pieces = list(chat.pieces(chat.encode(ask("x")), sampling))
        return "".join(piece.text for piece in pieces), pieces[-1].finish

    whole, _ = text()
    stop = whole[10:12]
    assert text((stop,)) == (whole[: whole.find(stop)], "stop")


def test_a_cancelled_answer_ends_at_the_next_token(chat: ChatModel) -> None:
    asked = 0

    def cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked > 3

    pieces = list(chat.pieces(chat.encode(ask("x")), Sampling(2.0, 1.0, 0, 200, seed=5), cancelled))
    assert len(pieces) <= 4
    assert all(piece.finish is None for piece in pieces)


def test_the_trained_system_text_is_used_unless_one_is_given(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "merged"
    shutil.copytree(tiny_model, folder)
    record = {"template": "qwen_chat", "system": "Be Ada.", "base": str(tiny_model)}
    (folder / "raytune_ft.json").write_text(json.dumps(record))
    chat = open_chat(str(folder), device="cpu")
    assert "system\nBe Ada." in chat.tokenizer.decode(
        chat.encode(ask("x")), skip_special_tokens=False
    )
    own = chat.tokenizer.decode(chat.encode(CHAT[:2]), skip_special_tokens=False)
    assert "Be kind." in own
    assert "Ada" not in own


@pytest.fixture(scope="module")
def trained_run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on an nf4 base, with a real adapter that changes the answers."""
    run = tmp_path_factory.mktemp("runs") / "ada"
    run.mkdir()
    section = ModelSection(path=str(tiny_model), quantization="nf4")
    model = attach(load_model(tiny_model, section, torch.device("cpu")), LoraSection(r=4), seed=0)
    torch.manual_seed(0)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.5)
    save_adapter(model, run / "adapter", str(tiny_model))
    info = {"name": "ada", "status": "done", "model_folder": str(tiny_model), "system": ""}
    (run / "run.json").write_text(json.dumps(info))
    recipe = {"model": section.model_dump(), "data": {"sources": [{"path": "x.jsonl"}]}}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return run


def last_logits(chat: ChatModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = chat.model(
            input_ids=torch.tensor([chat.encode(ask("red?"))])
        ).logits[0, -1]
    return logits


def test_a_qlora_run_is_answered_on_the_weights_that_training_saw(
    trained_run: Path, tiny_model: Path
) -> None:
    """Its logits are base + adapter in nf4; 16 bits on request, and then others."""
    section = ModelSection(path=str(tiny_model), quantization="nf4")
    base = load_model(tiny_model, section, torch.device("cpu"))
    expected = load_adapter(base, trained_run / "adapter")
    expected.eval()
    chat, whole = open_chat(str(trained_run), device="cpu"), open_chat(str(trained_run), 16, "cpu")
    kinds = [{type(m).__name__ for m in model.model.modules()} for model in (chat, whole)]
    assert ["Linear4bit" in kind for kind in kinds] == [True, False]
    torch.testing.assert_close(last_logits(chat), last_logits(replace(chat, model=expected)))
    assert not torch.allclose(last_logits(chat), last_logits(whole), atol=1e-3)
    plain = open_chat(str(tiny_model), 4, "cpu")
    assert not torch.allclose(last_logits(chat), last_logits(plain), atol=1e-2)


def test_the_adapter_folder_of_a_run_is_the_run(trained_run: Path) -> None:
    run, adapter = (open_chat(str(p), device="cpu") for p in (trained_run, trained_run / "adapter"))
    assert torch.equal(last_logits(run), last_logits(adapter))


def test_trimming_leaves_room_for_an_answer(chat: ChatModel) -> None:
    long = [turn for _ in range(40) for turn in CHAT[1:3]] + CHAT[3:]
    kept = chat.trim(long, 100)
    assert kept == long[len(long) - len(kept) :]
    assert len(chat.encode(kept)) <= chat.context - 100 < len(chat.encode(long))
