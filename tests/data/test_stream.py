"""Stream: with Ray the packs are those that a plain loop makes, however the work is cut."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest

from raytune_ft.data.packing import Plan, Position
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_plan
from raytune_ft.errors import DataError
from tests.conftest import write_chats
from tests.data.feeds import COMPAT, fingerprint, measured, open_rows

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    from raytune_ft.cluster import ray_session

    with ray_session():
        yield


@pytest.mark.slow
@pytest.mark.parametrize("compat", [None, COMPAT])
@pytest.mark.usefixtures("ray")
def test_packs_are_the_same_however_the_work_is_cut(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch, compat: str | None
) -> None:
    from raytune_ft.data import stream

    path = write_chats(tmp_path / "a.jsonl", 300)
    source, encoder, section = open_rows(path, tokenizer, window=64, compat=compat)
    expected = measured(source, encoder)
    monkeypatch.setattr(stream, "IN_PROCESS_ROWS", 0)
    for rows_per_task in (300, 70):
        monkeypatch.setattr(stream, "ROWS_PER_TASK", rows_per_task)
        done: list[tuple[int, int]] = []
        got = stream.measure(source, encoder, lambda *pair, done=done: done.append(pair))
        assert got.lengths.tolist() == expected.lengths.tolist()
        assert got.targets.tolist() == expected.targets.tolist()
        assert got.sets.tolist() == expected.sets.tolist()
        assert got.report == expected.report
        assert done[-1] == (300, 300)

    plan = make_plan(expected, section, 5)
    whole = [fingerprint(item) for item in stream.iter_packs(source, encoder, plan, epochs=2)]
    for per_run, tasks in ((1, 1), (4, 3), (16, 2)):
        monkeypatch.setattr(stream, "WINDOWS_PER_RUN", per_run)
        monkeypatch.setattr(stream, "WINDOW_TASKS", tasks)
        got_packs = [fingerprint(item) for item in stream.packs(source, encoder, plan, epochs=2)]
        assert got_packs == whole
    done_packs = len(whole) // 2 + 1
    position = whole[done_packs - 1][0]
    assert isinstance(position, Position)
    rest = stream.packs(source, encoder, plan, position, epochs=2)
    assert [fingerprint(item) for item in rest] == whole[done_packs:]


@pytest.mark.usefixtures("ray")
def test_an_endless_stream_can_be_closed(chats: Path, tokenizer: TextTokenizer) -> None:
    import ray as ray_library

    from raytune_ft.data import stream

    source, encoder, section = open_rows(chats, tokenizer, window=16)
    plan = Plan(measured(source, encoder).lengths, section, 5)
    endless = stream.packs(source, encoder, plan)
    assert len(list(islice(endless, plan.n_packs(0) + 1))) == plan.n_packs(0) + 1
    endless.close()
    whole = ray_library.cluster_resources()["CPU"]
    for _ in range(100):  # freed CPUs are reported with a delay
        if ray_library.available_resources().get("CPU") == whole:
            break
        time.sleep(0.1)
    assert ray_library.available_resources()["CPU"] == whole


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("ray")
def test_half_a_free_core_is_enough(
    chats: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training workers hold the rest; a task that wants a whole core would wait for ever."""
    import ray as ray_library

    from raytune_ft.data import stream

    @ray_library.remote(num_cpus=ray_library.cluster_resources()["CPU"] - 0.5)  # type: ignore[untyped-decorator]
    class Worker:
        def ready(self) -> bool:
            return True

    worker = Worker.remote()
    assert ray_library.get(worker.ready.remote())
    source, encoder, section = open_rows(chats, tokenizer, window=16)
    monkeypatch.setattr(stream, "IN_PROCESS_ROWS", 0)
    counted = stream.measure(source, encoder)
    plan = Plan(counted.lengths, section, 5)
    assert len(list(stream.packs(source, encoder, plan, epochs=1))) == plan.n_packs(0)
    ray_library.kill(worker)


@pytest.mark.usefixtures("ray")
def test_the_first_bad_row_comes_back_as_it_was_raised(
    tmp_path: Path, tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raytune_ft.data import stream

    path = write_chats(tmp_path / "a.jsonl", 60)
    lines = path.read_text().splitlines()
    lines[33] = lines[50] = "{broken"
    path.write_text("\n".join(lines))
    source, encoder, _ = open_rows(path, tokenizer)
    monkeypatch.setattr(stream, "IN_PROCESS_ROWS", 0)
    monkeypatch.setattr(stream, "ROWS_PER_TASK", 10)
    with pytest.raises(DataError, match=r"^\S+a\.jsonl:34: not valid JSON") as caught:
        stream.measure(source, encoder)
    assert type(caught.value) is DataError


def test_few_rows_are_counted_without_ray(chats: Path, tokenizer: TextTokenizer) -> None:
    from raytune_ft.data import stream

    source, encoder, _ = open_rows(chats, tokenizer)
    assert stream.measure(source, encoder).report == measured(source, encoder).report
