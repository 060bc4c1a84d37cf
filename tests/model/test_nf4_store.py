"""Kept NF4 weights: the bytes of a fresh quantisation, or none at all, and never needed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from safetensors.torch import load_file, save_file

from raytune_ft.config import cache_room
from raytune_ft.config.schema import ModelSection
from raytune_ft.errors import RecipeError
from raytune_ft.model import nf4_store
from raytune_ft.model.loading import load_model
from raytune_ft.model.nf4_store import LIMIT, Kept
from tests.families import checkpoints
from tests.faults import shim
from tests.ranks import forks

CPU = torch.device("cpu")
IDS = torch.arange(3, 20).unsqueeze(0)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of this test; the store takes models of any size."""
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(LIMIT, raising=False)
    monkeypatch.setattr(nf4_store, "WORTH_BYTES", 0)
    return tmp_path / "cache" / "nf4"


def load(folder: Path, **section: Any) -> Any:
    values = {"path": str(folder), "quantization": "nf4", "dtype": "bfloat16", **section}
    return load_model(folder, ModelSection.model_validate(values), CPU)


def load_stored(folder: Path, **section: Any) -> Any:
    """Load where quantising fails, so that what comes was kept."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("quantised again")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitsandbytes.functional, "quantize_4bit", refuse)
        return load(folder, **section)


def state(model: Any) -> dict[str, torch.Tensor]:
    """Return parameters with bitsandbytes' scales, and all buffers, as they lie in memory."""
    return {**model.state_dict(), **dict(model.named_buffers())}


def assert_equal(found: Any, expected: Any) -> None:
    ours, theirs = state(found), state(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def kept(store: Path) -> list[Path]:
    return sorted(folder for folder in store.iterdir() if not folder.name.startswith("."))


FAMILIES = sorted(checkpoints.SPECS)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_second_load_is_the_first_bit_by_bit(family: str, tmp_path: Path, store: Path) -> None:
    """Names, types and bytes of all tensors and buffers; layers' classes; what PEFT reads."""
    folder = checkpoints.make(family, tmp_path / "model", shards=2)
    first = load(folder)
    assert len(kept(store)) == 1
    second = load_stored(folder)
    assert_equal(second, first)
    kinds = [type(module) for module in first.modules()]
    assert [type(module) for module in second.modules()] == kinds
    assert not any(parameter.requires_grad for parameter in second.parameters())
    assert second.config.to_dict() == first.config.to_dict()
    assert second.generation_config == first.generation_config
    assert second.name_or_path == first.name_or_path == str(folder)
    with torch.no_grad():
        assert torch.equal(second(IDS).logits, first(IDS).logits)
    assert [nf4_store._damage(place) for place in kept(store)] == [None]  # folding left the files


@pytest.mark.parametrize("double_quant", [False, True])
def test_quantisation_that_is_asked_for_otherwise_is_kept_apart(
    tiny_model: Path, store: Path, double_quant: bool
) -> None:
    section = {"double_quant": double_quant, "dtype": "float32"}
    first = load(tiny_model, **section)
    assert_equal(load_stored(tiny_model, **section), first)
    load(tiny_model, double_quant=not double_quant, dtype="float32")
    load(tiny_model, double_quant=double_quant)
    assert len(kept(store)) == 3


def test_a_changed_original_is_quantised_though_size_and_time_are_the_same(
    tmp_path: Path, store: Path
) -> None:
    folder = checkpoints.make("llama2", tmp_path / "model")
    file = folder / "model.safetensors"
    first, before = load(folder), file.stat()
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    second = load(folder)
    assert len(kept(store)) == 2
    assert not torch.equal(state(second)["lm_head.weight"], state(first)["lm_head.weight"])
    assert_equal(load_stored(folder), second)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


DAMAGES: list[tuple[str, Callable[[Path], object], str]] = [
    ("model-00001-of-00001.safetensors", flip, r"is not as it was written \(sha256\)"),
    ("model-00001-of-00001.safetensors", cut, r"has \d+ bytes, not \d+"),
    ("model-00001-of-00001.safetensors", Path.unlink, "cannot be read"),
    ("config.json", flip, r"is not as it was written \(sha256\)"),
    ("manifest.json", Path.unlink, "is missing or no manifest"),
    ("manifest.json", cut, "is missing or no manifest"),
    ("manifest.json", lambda file: file.write_text("[1]"), "is missing or no manifest"),
]


@pytest.mark.parametrize("name, damage, words", DAMAGES)
def test_what_is_not_as_it_was_written_is_named_and_made_again(
    name: str,
    damage: Callable[[Path], object],
    words: str,
    tiny_model: Path,
    store: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = load(tiny_model)
    damage(kept(store)[0] / name)
    assert_equal(load(tiny_model), first)
    (line,) = caplog.messages
    assert "\n" not in line
    assert str(kept(store)[0]) in line
    assert line.endswith("quantised again")
    assert re.search(f"{name} {words}", line)
    assert_equal(load_stored(tiny_model), first)


def test_weights_of_another_network_are_named_and_made_again(
    tiny_model: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole files that do not fit: what only a mistake in the key could bring about."""
    first = load(tiny_model)
    file = kept(store)[0] / "model-00001-of-00001.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file)
    manifest = json.loads((file.parent / "manifest.json").read_text())
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "sha256": sha256}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))
    assert_equal(load(tiny_model), first)
    (line,) = caplog.messages
    assert "1 missing tensors, first 'model.norm.weight'" in line
    assert line.count(str(file.parent)) == 1
    assert_equal(load_stored(tiny_model), first)


def place_of(folder: Path) -> Kept:
    section = ModelSection(path=str(folder), quantization="nf4", dtype="bfloat16")
    found = Kept.of(folder, [folder / "model.safetensors"], section, CPU)
    assert found is not None
    return found


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=() if way == "full" else pytest.mark.exact)
        for way in (*shim.RAISING, *shim.EXITING)
    ],
)
def test_writing_that_is_stopped_at_any_call_leaves_all_or_nothing(
    way: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full or fails, a process that is killed, power that is lost."""
    model = load(tiny_model)

    def at(k: int) -> Kept:
        monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / f"{way}_{k}"))
        return place_of(tiny_model)

    place = at(0)
    with shim.Shim().active() as counter:
        place.write(model)
    assert nf4_store._damage(place.folder) is None
    seen = set()
    for k in range(1, counter.count + 1):
        place = at(k)
        if way in shim.EXITING:
            shim.run_stopped(
                lambda place=place: place.write(model), tmp_path / f"{way}_{k}", way, k
            )
        else:
            with shim.Shim(way, k).active():
                place.write(model)
            left = [path.name for path in place.folder.parent.glob("*")]
            assert way == "dead" or left in ([], [place.folder.name])
        seen.add(place.folder.exists())
        assert not place.folder.exists() or nf4_store._damage(place.folder) is None
        if way != "dead":  # there the lock of this process could not even be closed
            place.write(model)
            assert nf4_store._damage(place.folder) is None
            assert [path.name for path in place.folder.parent.iterdir()] == [place.folder.name]
    assert False in seen


def _load_and_tell(folder: str, cache: str, pipe: Any) -> None:
    os.environ["RAYTUNE_CACHE"] = cache
    nf4_store.WORTH_BYTES = 0
    pipe.recv()
    model = load(Path(folder))
    content = b"".join(
        tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for _, tensor in sorted(state(model).items())
        if tensor.ndim
    )
    pipe.send(hashlib.sha256(content).hexdigest())


def test_two_that_start_at_once_load_the_same_and_leave_one(
    tmp_path: Path, tiny_model: Path
) -> None:
    context, others = forks(), []
    for _ in range(2):
        ours, theirs = context.Pipe()
        arguments = (str(tiny_model), str(tmp_path / "shared"), theirs)
        process = context.Process(target=_load_and_tell, args=arguments)
        process.start()
        others.append((process, ours))
    for _, pipe in others:
        pipe.send("go")
    found = {pipe.recv() for _, pipe in others}
    for process, _ in others:
        process.join()
        assert process.exitcode == 0
    assert len(found) == 1
    (folder,) = (tmp_path / "shared" / "nf4").iterdir()
    assert nf4_store._damage(folder) is None


def test_while_another_process_writes_weights_are_quantised_and_not_kept(
    tiny_model: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.mkdir(parents=True)
    handle = os.open(store, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    first = load(tiny_model)
    assert kept(store) == []
    os.close(handle)
    assert_equal(load(tiny_model), first)
    assert len(kept(store)) == 1
    assert caplog.messages == []


def test_models_used_longest_ago_make_room(
    tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tiny_model)
    size = sum(file.stat().st_size for file in kept(store)[0].iterdir())
    for age, name in enumerate(["young", "old", "oldest"], start=1):
        (store / name).mkdir()
        (store / name / "model.safetensors").write_bytes(b"x" * size)
        os.utime(store / name, (time.time() - 3600 * age,) * 2)
    monkeypatch.setenv(LIMIT, repr(3.5 * size / 2**30))
    load(tiny_model, double_quant=False)
    assert not (store / "oldest").exists() and not (store / "old").exists()
    assert (store / "young").exists() and len(kept(store)) == 3
    load_stored(tiny_model)


def test_a_model_larger_than_the_store_is_told_in_a_line(
    tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (store / "other").mkdir(parents=True)
    monkeypatch.setenv(LIMIT, repr(1000 / 2**30))
    load(tiny_model)
    assert [folder.name for folder in kept(store)] == ["other"]
    assert [LIMIT in line and "\n" not in line for line in caplog.messages] == [True]


def test_a_full_disk_is_told_and_ends_nothing(
    tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_room, "RESERVE_BYTES", 2**62)
    load(tiny_model)
    assert kept(store) == []
    assert ["GiB free; make room" in line for line in caplog.messages] == [True]


def test_a_folder_that_cannot_be_written_is_told_and_ends_nothing(
    tiny_model: Path, store: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.parent.mkdir()
    store.write_text("no folder")
    load(tiny_model)
    assert [f"{store}" in line and "cannot write" in line for line in caplog.messages] == [True]


def test_what_is_small_whole_or_not_wanted_is_not_kept(
    tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(tiny_model, quantization="none")
    load(tiny_model, quantization="int8")
    monkeypatch.setenv(LIMIT, "0")
    load(tiny_model)
    monkeypatch.delenv(LIMIT)
    monkeypatch.undo()
    monkeypatch.setenv("RAYTUNE_CACHE", str(store.parent))
    load(tiny_model)
    assert not store.exists()


def test_a_size_that_is_none_is_one_line(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT, "much")
    with pytest.raises(RecipeError, match=f"{LIMIT}: 'much' is no number of GiB; ") as caught:
        load(tiny_model)
    assert "\n" not in str(caught.value)
