"""Commands of the terminal chat, two sides, and rows that training takes back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.chat import ChatModel, Sampling, open_chat
from raytune_ft.chat.commands import COMMANDS, PARAMS
from raytune_ft.chat.feedback import Feedback
from raytune_ft.chat.sides import Side, in_turn, without_adapter
from raytune_ft.chat.terminal import Conversation, run_chat
from raytune_ft.config.schema import DataSection
from raytune_ft.data.encode import encode_prompt
from raytune_ft.data.rows.formats import to_conversation, to_pair
from raytune_ft.data.sources import open_sources
from raytune_ft.errors import RecipeError

SAMPLING = Sampling(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=8, seed=1)
Type = Callable[..., str]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatModel:
    return open_chat(str(tiny_model), device="cpu")


@pytest.fixture
def talk(chat: ChatModel, tmp_path: Path) -> Conversation:
    return Conversation([Side(chat.name, chat)], SAMPLING, Feedback(tmp_path / "rows"))


@pytest.fixture
def say(talk: Conversation, capsys: pytest.CaptureFixture[str]) -> Type:
    """Type lines one after the other; returns what was said beside the answers."""

    def typed(*lines: str, to: Conversation = talk) -> str:
        rest = iter(lines)
        capsys.readouterr()

        def read() -> str:
            line = next(rest, None)
            if line is None:
                raise EOFError
            return line

        to.run(read)
        return capsys.readouterr().err

    return typed


def test_retry_draws_another_answer_to_the_same_messages(talk: Conversation, say: Type) -> None:
    say("one", "two")
    first = list(talk.messages)
    say("/retry")
    assert talk.messages[:-1] == first[:-1]
    assert talk.messages[-1] != first[-1]


def test_retry_of_the_same_seed_is_the_same_answer(talk: Conversation, say: Type) -> None:
    say("one")
    answer = talk.messages[-1]
    say("/params seed=0", "/retry")  # the second answer has the next seed, which is 1 again
    assert talk.messages[-1] == answer


def test_undo_goes_back_turn_by_turn(talk: Conversation, say: Type) -> None:
    say("one", "two")
    assert "forgotten: two" in say("/undo")
    assert [m["content"] for m in talk.messages[::2]] == ["one"]
    assert "forgotten: one" in say("/undo")
    assert "nothing was asked yet" in say("/undo")


def test_system_text(talk: Conversation, say: Type) -> None:
    assert "system text: Be kind." in say("/system Be kind.", "one")
    assert talk.sides[0].chat.with_system(talk.messages)[0]["content"] == "Be kind."
    assert "no system text" in say("/system -")


def test_params(talk: Conversation, say: Type) -> None:
    said = say("/params temperature=0.5 top_k=7", "/params")
    assert "temperature=0.5  top_p=1.0  top_k=7" in said
    assert (talk.sampling.temperature, talk.sampling.top_k) == (0.5, 7)


@pytest.mark.parametrize(
    "wrong", ["heat=1", "temperature=hot", "temperature=-1", "top_p=nan", "seed=1.5", "seed"]
)
def test_wrong_params_change_nothing(talk: Conversation, say: Type, wrong: str) -> None:
    assert f"/params {wrong}: " in say(f"/params top_k=9 {wrong}")
    assert talk.sampling == SAMPLING


def test_a_saved_conversation_goes_on_elsewhere(
    talk: Conversation, say: Type, chat: ChatModel, tmp_path: Path
) -> None:
    path = tmp_path / "my talk.json"
    assert f"saved: {path}" in say("/system S", "/params top_k=3", "one", f"/save '{path}'")
    other = Conversation([Side("other", chat)], Sampling())
    assert "1 turns, of " in say(f"/load '{path}'", to=other)
    assert other.messages == talk.messages
    assert other.sampling.top_k == 3 and other.sides[0].chat.system == "S"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{}", "no saved conversation"), ("not json", "no saved conversation"),
        ('{"kind": "raytune_ft chat", "model": "m", "system": "", "params": {}, '
         '"messages": [{"role": "tool", "content": "x"}]}', "damaged"),
        ('{"kind": "raytune_ft chat", "model": "m", "system": "", "params": {"heat": 1}, '
         '"messages": []}', "/params heat=1"),
    ],
)  # fmt: skip
def test_a_file_of_another_kind_is_refused(
    talk: Conversation, say: Type, tmp_path: Path, content: str, problem: str
) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    say("one")
    before = list(talk.messages)
    assert problem in say(f"/load {path}")
    assert talk.messages == before


def test_save_never_takes_the_place_of_another_file(say: Type, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: {}")
    assert "is no saved conversation" in say("one", f"/save {path}")
    assert path.read_text() == "model: {}"


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_kept_answers_are_rows_that_training_reads(
    talk: Conversation, say: Type, chat: ChatModel, tmp_path: Path
) -> None:
    say("/system S", "one", "/good", "two", "/bad It is 4, not 5.", "three")
    good, pairs = tmp_path / "rows" / "good.jsonl", tmp_path / "rows" / "pairs.jsonl"
    assert len(rows(good)) == 2 and len(rows(pairs)) == 1
    # the conversation goes on from the right answer
    assert talk.messages[3] == {"role": "assistant", "content": "It is 4, not 5."}

    data = DataSection.model_validate({"sources": [{"path": str(good)}]})
    (source,) = data.sources
    assert len(open_sources(data, 0)) == 2
    conversation = to_conversation(rows(good)[1], source, data)
    assert conversation is not None and conversation.loss == "last"
    assert [m["role"] for m in conversation.messages] == [
        "system", "user", "assistant", "user", "assistant"
    ]  # fmt: skip
    # what was asked is what is learned, token for token
    asked = encode_prompt(conversation.messages[:-1], chat.template, chat.tokenizer)
    assert asked == talk.sides[0].chat.encode(talk.messages[:3])

    pair = to_pair(rows(pairs)[0], source, data, "x")
    assert pair is not None
    assert pair[0].messages[-1]["content"] == "It is 4, not 5."
    assert pair[0].messages[:-1] == pair[1].messages[:-1] == conversation.messages[:-1]


def test_judging_needs_an_answer_and_a_correction(say: Type) -> None:
    assert "nothing was asked yet" in say("/good")
    assert "/bad TEXT" in say("one", "/bad")
    assert "/good takes nothing" in say("/good 1")


def test_every_command_is_explained(say: Type) -> None:
    said = say("/help")
    assert all(name in said for name in COMMANDS)
    assert all(hasattr(SAMPLING, name) for name in PARAMS)


@pytest.fixture(scope="module")
def adapted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that says something else than its base."""
    import torch
    from peft import LoraConfig, get_peft_model

    base: Any = open_chat(str(tiny_model), device="cpu").model
    model: Any = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=4.0)
    folder = tmp_path_factory.mktemp("adapted") / "ada"
    model.save_pretrained(folder)
    (folder / "raytune_ft.json").write_text(json.dumps({"base": str(tiny_model)}))
    return folder


def test_the_base_answers_as_if_there_were_no_adapter(adapted: Path, tiny_model: Path) -> None:
    chat, plain = open_chat(str(adapted), device="cpu"), open_chat(str(tiny_model), device="cpu")
    base = without_adapter(chat)
    ids = chat.encode([{"role": "user", "content": "red river?"}])
    greedy = Sampling(temperature=0, max_new_tokens=12)
    both = list(in_turn([chat.pieces(ids, greedy), base.pieces(ids, greedy)]))
    told = ["".join(piece.text for side, piece in both if side == n) for n in (0, 1)]
    alone = ["".join(piece.text for piece in model.pieces(ids, greedy)) for model in (chat, plain)]
    assert told == alone
    assert told[0] != told[1]


def test_two_sides_keep_their_own_conversations_until_one_is_better(
    adapted: Path, say: Type, tmp_path: Path
) -> None:
    chat = open_chat(str(adapted), device="cpu")
    base = without_adapter(chat)
    talk = Conversation(
        [Side(chat.name, chat), Side(base.name, base)],
        replace(SAMPLING, temperature=0.0),  # a hot draw from an untrained model hides the adapter
        Feedback(tmp_path / "r"),
    )
    assert "ada and base are ready" in say("one", "two", to=talk)
    left, right = (side.messages for side in talk.sides)
    assert left[::2] == right[::2] and left != right
    assert "/good 1 or /good 2" in say("/good", to=talk)
    say("/good 2", to=talk)
    (pair,) = rows(tmp_path / "r" / "pairs.jsonl")
    assert pair["chosen"] == right[-1:] and pair["rejected"][0] != right[-1]
    assert talk.sides[0].messages[-1] == talk.sides[1].messages[-1]


def test_comparing_on_the_command_line(
    adapted: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    greedy = {"temperature": 0.0, "max_new_tokens": 6}
    assert run_chat(str(adapted), ask=["who?"], compare="base", **greedy) == 0  # type: ignore[arg-type]
    beside = capsys.readouterr().out
    assert run_chat(str(adapted), ask=["who?"], compare=str(tiny_model), **greedy) == 0  # type: ignore[arg-type]
    other = capsys.readouterr().out
    assert beside.startswith("> who?\n[ada]\n")
    assert beside.split("[base]\n")[1] == other.split(f"[{tiny_model.name}]\n")[1]


def test_a_model_without_an_adapter_has_no_base_to_compare_with(tiny_model: Path) -> None:
    with pytest.raises(RecipeError, match="no adapter that could be taken off"):
        run_chat(str(tiny_model), ask=["x"], compare="base")
