"""Adapters by name on one base: each answers as it does alone; names and files are not trusted."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.chat import ChatModel, Piece, Sampling, open_chat
from raytune_ft.config.schema import LoraSection, ModelSection
from raytune_ft.errors import CheckpointError, ServeError
from raytune_ft.model.adapter import attach, save_adapter
from raytune_ft.model.loading import load_model
from raytune_ft.serving.engine import ChatEngine
from raytune_ft.serving.engines.batched import BatchedEngine

HOW = Sampling(temperature=0.0, max_new_tokens=8)
PROMPTS = [[5, 6, 7], [90] * 11, [40, 41]]
CHAT = [{"role": "user", "content": "red river?"}]


def write_adapter(folder: Path, base: Path, seed: int, **lora: Any) -> Path:
    """Write an adapter that changes answers."""
    model = attach(
        load_model(base, ModelSection(path=str(base)), torch.device("cpu")),
        LoraSection(r=4, **lora),
        seed=seed,
    )
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    save_adapter(model, folder, str(base))
    return folder


@pytest.fixture(scope="module")
def root(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three adapter folders, one of them inside a run's folder and with a system text."""
    root = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(("ada", "bob-2.1", "cleo")):
        write_adapter(root / name, tiny_model, seed)
    (root / "ada").rename(root / "moved")
    (root / "ada").mkdir()
    (root / "moved").rename(root / "ada" / "adapter")
    record = {"base": str(tiny_model), "system": "Be Ada."}
    (root / "ada" / "adapter" / "raytune_ft.json").write_text(json.dumps(record))
    return root


@pytest.fixture(scope="module")
def alone(tiny_model: Path, root: Path) -> dict[str, list[list[Piece]]]:
    """What each model answers when it is opened on its own."""
    paths = {"base": tiny_model, **{name: root / name for name in ("bob-2.1", "cleo")}}
    paths["ada"] = root / "ada" / "adapter"
    return {
        name: [
            list(without_end(open_chat(str(path), device="cpu")).pieces(ids, HOW))
            for ids in PROMPTS
        ]
        for name, path in paths.items()
    }


class Endless(ChatModel):
    stop_ids = frozenset()  # type: ignore[assignment]


def without_end(chat: ChatModel) -> ChatModel:
    return Endless(**vars(chat))


@pytest.fixture
def engine(tiny_model: Path, root: Path) -> Iterator[BatchedEngine]:
    chat = without_end(open_chat(str(tiny_model), device="cpu"))
    engine = BatchedEngine(chat, 64, adapters=str(root), max_adapters=2)
    yield engine
    engine.close()


async def collect(pieces: Any) -> list[tuple[str, int, str | None]]:
    return [(piece.text, piece.n_tokens, piece.finish) async for piece in pieces]


def ask(engine: ChatEngine, models: list[str | None]) -> list[Any]:
    async def together() -> list[Any]:
        streams = [
            collect(engine.submit(ids, HOW, model=model)) for model in models for ids in PROMPTS
        ]
        return await asyncio.gather(*streams, return_exceptions=True)

    found = asyncio.run(together())
    return [found[i : i + len(PROMPTS)] for i in range(0, len(found), len(PROMPTS))]


def told(answers: list[list[Piece]]) -> list[list[tuple[str, int, str | None]]]:
    return [[(p.text, p.n_tokens, p.finish) for p in pieces] for pieces in answers]


def test_adapters_answer_side_by_side_as_each_does_alone(
    engine: BatchedEngine, alone: dict[str, Any], tiny_model: Path
) -> None:
    """Three of them where two fit: the third waits until one is not in use, and takes its place."""
    assert engine.models() == (tiny_model.name, "ada", "bob-2.1", "cleo")
    names: list[str | None] = [None, "ada", "bob-2.1", "cleo", "ada"]
    found = ask(engine, names)
    for name, answers in zip(names, found, strict=True):
        assert answers == told(alone[name or "base"]), name
    assert len({str(answers) for answers in found}) == 4
    assert len(engine._models._loaded) == 2
    assert set(engine._models.model.peft_config) == set(engine._models._loaded.values())


def test_a_runs_adapter_is_first_and_its_base_is_there_too(
    root: Path, alone: dict[str, Any]
) -> None:
    chat = without_end(open_chat(str(root / "cleo"), device="cpu"))
    engine = BatchedEngine(chat, 64, adapters=str(root), max_adapters=1)
    try:
        assert engine.models() == ("cleo", "base", "ada", "bob-2.1")
        for name, answers in zip(
            ("cleo", "base", "bob-2.1", "cleo", "ada"),
            ask(engine, ["cleo", "base", "bob-2.1", None, "ada"]),
            strict=True,
        ):
            assert answers == told(alone[name]), name
    finally:
        engine.close()


def test_a_name_brings_its_own_template_and_system_text(engine: BatchedEngine) -> None:
    texts = [
        engine._models.chat(None).tokenizer.decode(
            engine.encode(CHAT, model=name), skip_special_tokens=False
        )
        for name in (None, "ada", "cleo")
    ]
    assert "Be Ada." in texts[1]
    assert "Be Ada." not in texts[0] + texts[2]


def test_an_adapter_that_comes_while_the_engine_runs_is_served(
    engine: BatchedEngine, root: Path, tiny_model: Path
) -> None:
    folder = write_adapter(root / "late", tiny_model, 9)
    try:
        assert "late" in engine.models()
        expected = without_end(open_chat(str(folder), device="cpu")).pieces(PROMPTS[0], HOW)
        assert ask(engine, ["late"])[0][0] == told([list(expected)])[0]
    finally:
        shutil.rmtree(folder)


NAMES = [
    "..",
    ".",
    "",
    "../ada",
    "ada/..",
    "/etc",
    "a" * 65,
    "-x",
    "ada\x00",
    "ada\n",
    "é",
    "link",
    "deep",
]


@pytest.mark.parametrize("name", NAMES)
def test_names_lead_nowhere_outside_the_folder(
    engine: BatchedEngine, root: Path, tiny_model: Path, tmp_path: Path, name: str
) -> None:
    outside = write_adapter(tmp_path / "outside", tiny_model, 1)
    links = {"link": outside, "deep": None}
    if name == "link":
        (root / name).symlink_to(links[name])  # type: ignore[arg-type]
    if name == "deep":
        (root / name).mkdir()
        for file in outside.iterdir():
            (root / name / file.name).symlink_to(file)
    try:
        assert name not in engine.models()
        for call in (engine.encode, lambda _messages, model: engine._models.chat(model)):
            with pytest.raises(ServeError, match="does not exist"):
                call(CHAT, model=name)
    finally:
        for made in links:
            if (root / made).is_symlink():
                (root / made).unlink()
            elif (root / made).is_dir():
                shutil.rmtree(root / made)


def spoil(folder: Path, kind: str) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    if kind == "pickled":
        torch.save({}, folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").unlink()
    elif kind == "linked weights":
        (folder / "adapter_model.safetensors").rename(folder.parent.parent / "w")
        (folder / "adapter_model.safetensors").symlink_to(folder.parent.parent / "w")
    elif kind == "megatron":
        config |= {"megatron_config": {"x": 1}, "megatron_core": "evil.module"}
    elif kind == "another kind":
        config["peft_type"] = "IA3"
    elif kind == "another base":
        (folder / "base").mkdir()
        (folder / "base" / "config.json").write_text("{}")
        config["base_model_name_or_path"] = str(folder / "base")
    elif kind == "wider":
        config["r"] = 8
    elif kind == "biased":
        config["bias"] = "all"
    (folder / "adapter_config.json").write_text(json.dumps(config))


KINDS = {
    "pickled": "no adapter_model.safetensors", "linked weights": "no adapter_model.safetensors",
    "megatron": "'megatron_config' is not read", "another kind": "only LORA",
    "another base": "trained on", "wider": "differ", "biased": "biases",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_must_not_or_cannot_be_read_ends_its_request_alone(
    tiny_model: Path, tmp_path: Path, alone: dict[str, Any], kind: str
) -> None:
    root = tmp_path / "root"
    for name in ("good", "bad"):
        write_adapter(root / name, tiny_model, 2)
    spoil(root / "bad", kind)
    chat = without_end(open_chat(str(tiny_model), device="cpu"))
    engine = BatchedEngine(chat, 64, adapters=str(root))
    try:
        with pytest.raises((CheckpointError, ServeError), match=KINDS[kind]):
            engine.encode(CHAT, model="bad")
            bad = ask(engine, ["bad"])[0][0]
            raise bad
        good, base = ask(engine, ["good", None])
        assert good == told(alone["cleo"])
        assert base == told(alone["base"])
    finally:
        engine.close()


def test_a_folder_that_is_not_there_is_said_at_once(tiny_model: Path) -> None:
    chat = open_chat(str(tiny_model), device="cpu")
    with pytest.raises(ServeError, match="no such folder"):
        BatchedEngine(chat, adapters="nowhere/at/all")
