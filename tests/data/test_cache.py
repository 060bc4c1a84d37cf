"""Token cache: the same windows with it and without, whatever became of its files."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import signal
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc

from raytune_ft.data.cache import shard as shards
from raytune_ft.data.cache import tokens
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, Window
from raytune_ft.errors import DataError
from tests.data.conftest import chat, write_jsonl
from tests.data.feeds import LONG_ROWS, PACKINGS, content, feed_of

SMALL = {"window": 7, "shuffle_rows": 15, "on_error": "skip"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache folder's part for tokens."""
    monkeypatch.setenv("RAYTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


@pytest.fixture(scope="module")
def rows(varied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of all lengths, some without an answer, some that cannot be used."""
    lines = varied.read_text(encoding="utf-8").splitlines()
    lines[3::9] = [json.dumps({"messages": chat("Q", " ")})] * len(lines[3::9])
    lines[5::9] = ["{broken"] * len(lines[5::9])
    path = tmp_path_factory.mktemp("cached") / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def value(window: Window) -> tuple[object, ...]:
    packs = [content(pack) for pack in window.packs]
    return json.dumps(window.report, sort_keys=True), window.first, window.last, *packs


def all_values(feed: Feed, epochs: int = 2) -> dict[tuple[int, int], tuple[object, ...]]:
    return {
        (epoch, number): value(feed.window(epoch, number))
        for epoch in range(epochs)
        for number in range(feed.n_windows)
    }


def refuse(*_: Any) -> Any:
    raise AssertionError("a row was tokenised again")


def flip(path: Path, place: int, bits: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= bits
    path.write_bytes(raw)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "missing": lambda path, _: path.unlink(),
    "empty": lambda path, _: path.write_bytes(b""),
    "cut": lambda path, draw: os.truncate(path, draw.randrange(path.stat().st_size)),
    "longer": lambda path, draw: path.write_bytes(path.read_bytes() + draw.randbytes(9)),
    "flipped": lambda path, draw: flip(
        path, draw.randrange(path.stat().st_size), draw.randrange(1, 256)
    ),
    "another": lambda path, _: path.write_bytes(min(path.parent.glob("*.arrow")).read_bytes()),
    "noise": lambda path, draw: path.write_bytes(draw.randbytes(path.stat().st_size)),
}


@given(data=st.data(), packing=st.sampled_from(PACKINGS), over=st.sampled_from(LONG_ROWS))
@settings(max_examples=40)
def test_windows_are_the_same_with_a_cache_in_any_state(
    data: st.DataObject,
    packing: str,
    over: str,
    rows: Path,
    tokenizer: TextTokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    recipe = {**SMALL, "pack": packing, "over_length": over, "shuffle_before_pack": data.draw(
        st.booleans()
    )}  # fmt: skip
    plain = feed_of(rows, tokenizer, **recipe)
    visits = st.tuples(st.integers(0, 3), st.integers(0, plain.n_windows - 1))
    steps = st.lists(st.one_of(visits, st.sampled_from(sorted(DAMAGES))), max_size=12)
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("RAYTUNE_CACHE", str(folder))
        cached = feed_of(rows, tokenizer, cache=True, **recipe)
        for number in data.draw(st.sets(st.integers(0, plain.n_windows - 1))):
            cached.window(0, number)
        draw = data.draw(st.randoms(use_true_random=False))
        for step in data.draw(steps):
            files = [one for one in sorted(folder.glob("tokens/*/*.arrow")) if one.stat().st_size]
            if isinstance(step, tuple):
                assert value(cached.window(*step)) == value(plain.window(*step))
            elif files:
                DAMAGES[step](draw.choice(files), draw)


def test_later_epochs_and_other_runs_tokenise_nothing(
    varied: Path, tokenizer: TextTokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = all_values(feed_of(varied, tokenizer, **SMALL), epochs=3)
    first = feed_of(varied, tokenizer, cache=True, **SMALL)
    assert all_values(first, epochs=1).items() <= wanted.items()
    monkeypatch.setattr(tokens, "encode_rows", refuse)
    again = feed_of(varied, tokenizer, cache=True, **{**SMALL, "pack": True, "over_length": "drop"})
    assert again.cache is not None
    assert first.cache is not None
    assert again.cache.key == first.cache.key
    assert all_values(pickle.loads(pickle.dumps(first)), epochs=3) == wanted


def test_without_the_field_nothing_is_written(
    varied: Path, tokenizer: TextTokenizer, folder: Path
) -> None:
    all_values(feed_of(varied, tokenizer, **SMALL))
    assert feed_of(varied, tokenizer, cache=True, compat="xtuner-0.1.9").cache is None
    assert not folder.exists()


def test_a_bad_row_is_named_by_the_file_as_it_lies_now(
    rows: Path, tokenizer: TextTokenizer, folder: Path, tmp_path: Path
) -> None:
    all_values(feed_of(rows, tokenizer, cache=True, **SMALL))
    written = len(list(folder.glob("*/*.arrow")))
    moved = tmp_path / "moved.jsonl"
    moved.write_bytes(rows.read_bytes())
    again = feed_of(moved, tokenizer, cache=True, **SMALL)
    assert all_values(again) == all_values(feed_of(moved, tokenizer, **SMALL))
    assert len(list(folder.glob("*/*.arrow"))) == written == again.n_windows
    places = [line for n in range(again.n_windows) for line in _named(again.window(0, n))]
    assert places
    assert all(place.startswith(str(moved)) for place in places)
    with pytest.raises(DataError, match=r"moved\.jsonl:\d+: "):
        all_values(feed_of(moved, tokenizer, cache=True, **{**SMALL, "on_error": "stop"}))


def _named(window: Window) -> list[str]:
    return [place for places in window.report["places"].values() for place in places]


def test_any_flipped_byte_is_noticed_named_and_the_shard_made_again(
    varied: Path, tokenizer: TextTokenizer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = {**SMALL, "max_length": 16}
    wanted = value(feed_of(varied, tokenizer, **recipe).window(0, 2))
    cached = feed_of(varied, tokenizer, cache=True, **recipe)
    cached.window(0, 2)
    (path,) = folder.glob("*/*.arrow")
    good = path.read_bytes()
    draw = random.Random(3)
    # every byte of what stands at the end, and a thousand of all
    places = [*range(len(good) - 60, len(good)), *draw.choices(range(len(good)), k=1000)]
    for place in places:
        caplog.clear()
        flip(path, place, 1 << draw.randrange(8))
        assert value(cached.window(0, 2)) == wanted
        assert [str(path) in line for line in caplog.messages] == [True], place
        assert path.read_bytes() == good
    assert value(cached.window(0, 2)) == wanted
    assert len(caplog.messages) == 1


def test_a_later_epoch_makes_a_damaged_shard_again(
    varied: Path, tokenizer: TextTokenizer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cached = feed_of(varied, tokenizer, cache=True, **SMALL)
    all_values(cached, epochs=1)
    path = sorted(folder.glob("*/*.arrow"))[1]
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    plain = feed_of(varied, tokenizer, **SMALL)
    for number in range(cached.n_windows):
        assert value(cached.window(1, number)) == value(plain.window(1, number))
    assert path.read_bytes() == good
    assert [str(path) in line for line in caplog.messages] == [True]


def test_a_file_that_verifies_is_still_not_believed(
    varied: Path, tokenizer: TextTokenizer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Other rows, or a schema with extension types, under digests that are right."""
    cached = feed_of(varied, tokenizer, cache=True, **SMALL)
    assert cached.cache is not None
    cached.window(0, 0)
    (path,) = folder.glob("*/*.arrow")
    good = path.read_bytes()
    numbers = cached.order.window_rows(0, 0)
    outcomes = tokens.encode_rows(cached.source, cached.encoder, numbers)
    other = shards.shard_bytes(f"{cached.cache.key}/0", numbers[::-1], outcomes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "_HEAD", bytes(pa.schema([("a", pa.uuid())]).serialize()))
        hostile = shards.shard_bytes(f"{cached.cache.key}/0", numbers, outcomes)
    misplaced = shards.shard_bytes(f"{cached.cache.key}/1", numbers, outcomes)
    for bad in (other, hostile, misplaced):
        path.write_bytes(bad)
        cached.window(0, 0)
        assert path.read_bytes() == good
    reasons = ("belongs", "columns", "not that of this window")
    assert all(why in line for why, line in zip(reasons, caplog.messages, strict=True))


def test_a_shard_is_an_arrow_stream_and_its_bytes_are_a_function_of_its_rows(
    varied: Path, tokenizer: TextTokenizer, folder: Path
) -> None:
    cached = feed_of(varied, tokenizer, cache=True, **SMALL)
    cached.window(0, 0)
    (path,) = folder.glob("*/*.arrow")
    with pa.OSFile(str(path)) as file, ipc.open_stream(file) as stream:
        table = stream.read_all()
    numbers = cached.order.window_rows(0, 0)
    assert table["row"].to_pylist() == numbers.tolist()
    outcomes = tokens.encode_rows(cached.source, cached.encoder, numbers)
    assert table["ids"].to_pylist() == [one.input_ids.tolist() for one in outcomes]
    assert cached.cache is not None
    again = shards.shard_bytes(f"{cached.cache.key}/0", numbers, outcomes)
    assert again == path.read_bytes()


def test_tokens_of_a_file_that_changes_meanwhile_are_not_kept(
    tmp_path: Path, tokenizer: TextTokenizer, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": chat("river", "stone")}] * 9)
    cached = feed_of(path, tokenizer, cache=True, **SMALL)
    encode = tokens.encode_rows

    def change_behind(*args: Any) -> Any:
        found = encode(*args)
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("stone", "green"), encoding="utf-8")
        os.utime(path, ns=(1, 1))
        return found

    monkeypatch.setattr(tokens, "encode_rows", change_behind)
    with pytest.raises(DataError, match="changed since the run began"):
        cached.window(0, 0)
    assert list(folder.glob("*/*.arrow")) == []


def test_an_example_whose_labels_are_other_ids_is_not_kept() -> None:
    ids = np.arange(5, dtype=np.int32)
    odd = shards.Example(ids, ids + 1, 5)
    content_ = shards.shard_bytes("key/0", np.arange(2), [odd, shards.Example(ids, ids, 7)])
    with ipc.open_stream(content_) as stream:
        assert stream.read_all()["kind"].to_pylist() == [shards.NOT_KEPT, shards.EXAMPLE]


def forked(work: Callable[[], None]) -> int:
    """Run something in a copy of this process; return its id. It exits with 1 if that fails."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        work()
        status = 0
    finally:
        os._exit(status)


def again_and_again(feed: Feed, folder: Path) -> None:
    """Write the shards of epoch 0 over and over, after taking them away."""
    while True:
        for number in range(feed.n_windows):
            for path in folder.glob("*/*.arrow"):
                path.unlink(missing_ok=True)
            feed.window(0, number)


def test_a_writer_killed_at_any_instant_leaves_no_wrong_row(
    varied: Path, tokenizer: TextTokenizer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = {**SMALL, "max_length": 32}
    wanted = all_values(feed_of(varied, tokenizer, **recipe))
    cached = feed_of(varied, tokenizer, cache=True, **recipe)
    draw = random.Random(8)
    for _ in range(50):
        child = forked(lambda: again_and_again(cached, folder))
        time.sleep(draw.random() * 0.04)
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        visits = draw.sample(sorted(wanted), 3)
        assert [value(cached.window(*visit)) for visit in visits] == [wanted[v] for v in visits]
    assert all_values(cached) == wanted
    assert caplog.messages == []


@pytest.mark.parametrize("step", ["mkstemp", "write", "fsync", "replace", "unlink"])
def test_a_writer_killed_at_a_step_leaves_no_wrong_row(
    step: str, varied: Path, tokenizer: TextTokenizer, folder: Path
) -> None:
    cached = feed_of(varied, tokenizer, cache=True, **SMALL)
    wanted = value(feed_of(varied, tokenizer, **SMALL).window(0, 1))

    def die(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        if step == "write":
            os.fdopen = DyingFile  # type: ignore[assignment]
        else:
            setattr({"mkstemp": tempfile, "fsync": os}.get(step, Path), step, die)
        cached.window(0, 1)

    child = forked(work)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    kept = list(folder.glob("*/*.arrow"))
    assert len(kept) == (step == "unlink")
    assert value(cached.window(0, 1)) == wanted
    assert len(list(folder.glob("*/*.arrow"))) == 1


class DyingFile(io.FileIO):
    """Writes a half, and the process is gone."""

    def write(self, content: Any, /) -> int:
        super().write(content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
        return 0


def test_processes_write_read_and_damage_at_once(
    varied: Path, tokenizer: TextTokenizer, folder: Path
) -> None:
    recipe = {**SMALL, "max_length": 32}
    wanted = all_values(feed_of(varied, tokenizer, **recipe))
    cached = feed_of(varied, tokenizer, cache=True, **recipe)

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(150):
            visit = draw.choice(sorted(wanted))
            assert value(cached.window(*visit)) == wanted[visit]
            files = list(folder.glob("*/*.arrow"))
            if files and draw.random() < 0.2:
                damage(draw.choice(files), draw)

    children = [forked(lambda seed=seed: work(seed)) for seed in range(4)]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    assert all_values(cached) == wanted


def damage(path: Path, draw: random.Random) -> None:
    # another process may have taken it away, or be damaging it too
    with suppress(FileNotFoundError, IndexError):
        flip(path, draw.randrange(60), 4)
