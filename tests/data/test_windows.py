"""Windows: what is counted, what is dropped and why, and one pack sequence from any position."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raytune_ft.config.schema import DataSection
from raytune_ft.data.encode import IGNORE_INDEX
from raytune_ft.data.packing import Pack, Plan, Position
from raytune_ft.data.sources import RowSource, open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import (
    Encoder,
    Measurement,
    add_report,
    iter_packs,
    make_plan,
    measure_rows,
    new_report,
)
from raytune_ft.errors import DataError
from tests.conftest import ROOT, write_chats
from tests.data.conftest import chat, write_jsonl

COMPAT = "xtuner-0.1.9"
REAL = ROOT.parent / "shared" / "data" / "openassistant-guanaco"


def open_rows(
    path: Path, tokenizer: TextTokenizer, **data: Any
) -> tuple[RowSource, Encoder, DataSection]:
    source = {"path": str(path), **data.pop("source", {})}
    section = DataSection.model_validate({"sources": [source], "max_length": 128, **data})
    return open_sources(section, 1), Encoder(tokenizer, "tokenizer", section), section


def measured(source: RowSource, encoder: Encoder) -> Measurement:
    return measure_rows(source, encoder, np.arange(len(source)))


def fingerprint(item: tuple[Position, Pack]) -> tuple[object, ...]:
    """Compare packs by all their values."""
    position, pack = item
    arrays = (pack.input_ids, pack.labels, pack.position_ids, pack.cu_seqlens, pack.row_ids)
    return (position, *(array.tobytes() for array in arrays))


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Rows of every fate."""
    long_question, long_answer = "stone " * 160, "river " * 160
    rows: list[dict[str, Any]] = [
        {"messages": chat("Q", "A")},
        {"messages": chat("Q", " ")},
        {"messages": chat(long_question, "A")},
        {"messages": chat("Q", long_answer)},
        {"messages": chat("Q")},
        {"texts": "x"},
    ]
    return write_jsonl(tmp_path / "mixed.jsonl", rows * 7)


def test_every_row_is_used_or_counted_with_its_reason(
    mixed: Path, tokenizer: TextTokenizer
) -> None:
    source, encoder, _ = open_rows(mixed, tokenizer, on_error="skip")
    got = measured(source, encoder)
    used = [True, False, False, True, False, False]
    assert (got.lengths > 0).tolist() == used * 7
    assert (got.lengths[3], got.lengths.max()) == (128, 128)
    report = got.report
    assert report["dropped"] == {"empty": 7, "without a trained token": 7, "unusable": 14}
    assert (report["rows"], report["used"], report["cut"]) == (42, 14, 7)
    assert report["used"] + sum(report["dropped"].values()) == report["rows"]
    assert report["tokens"] == got.lengths.sum()
    assert report["targets"] == got.targets.sum()
    assert report["places"]["empty"] == [f"{mixed}:{line}" for line in (2, 8, 14, 20, 26)]
    assert report["places"]["unusable"][0].startswith(f"{mixed}:5: ")


def test_reports_of_parts_add_up_to_that_of_the_whole(
    mixed: Path, tokenizer: TextTokenizer
) -> None:
    source, encoder, _ = open_rows(mixed, tokenizer, on_error="skip")
    total = new_report()
    for rows in np.array_split(np.arange(42), 5):
        add_report(total, measure_rows(source, encoder, rows).report)
    assert total == measured(source, encoder).report


def test_long_rows_are_dropped_or_refused_as_asked(mixed: Path, tokenizer: TextTokenizer) -> None:
    source, encoder, _ = open_rows(mixed, tokenizer, on_error="skip", over_length="drop")
    assert measured(source, encoder).report["dropped"]["over max_length"] == 14
    source, encoder, _ = open_rows(mixed, tokenizer, on_error="skip", over_length="error")
    with pytest.raises(DataError, match=r"mixed\.jsonl:3: \d+ tokens, data\.max_length is 128"):
        measured(source, encoder)


def test_the_first_bad_row_stops_by_default(mixed: Path, tokenizer: TextTokenizer) -> None:
    source, encoder, _ = open_rows(mixed, tokenizer)
    with pytest.raises(DataError, match=r"mixed\.jsonl:5: column 'messages' ends with role 'user'"):
        measured(source, encoder)


@pytest.mark.parametrize("changes", [{}, {"pack": False}, {"shuffle_before_pack": False}])
def test_two_epochs_hold_every_row_twice_with_its_own_tokens(
    chats: Path, tokenizer: TextTokenizer, changes: dict[str, Any]
) -> None:
    source, encoder, section = open_rows(chats, tokenizer, window=16, **changes)
    plan = Plan(measured(source, encoder).lengths, section, 5)
    packs = [pack for _, pack in iter_packs(source, encoder, plan, epochs=2)]
    assert len(packs) == plan.total_packs(2)
    seen = Counter(int(row) for pack in packs for row in pack.row_ids)
    assert seen == dict.fromkeys(range(40), 2)
    for pack in packs:
        for sample, row in enumerate(pack.row_ids):
            start, end = pack.cu_seqlens[sample : sample + 2]
            alone = encoder.encode(source.rows([row])[0], source.source_of(row), "row")
            assert alone is not None
            assert pack.input_ids[start:end].tolist() == alone.input_ids.tolist()
            assert pack.labels[start:end].tolist() == alone.labels.tolist()
            assert pack.labels[start] == IGNORE_INDEX


@pytest.mark.parametrize("compat", [None, COMPAT])
def test_any_position_goes_on_as_the_whole_would(
    chats: Path, tokenizer: TextTokenizer, compat: str | None
) -> None:
    source, encoder, section = open_rows(chats, tokenizer, window=16, compat=compat)
    plan = make_plan(measured(source, encoder), section, 5)
    whole = [fingerprint(item) for item in iter_packs(source, encoder, plan, epochs=3)]
    assert whole[-1][0] == Position(3, 0, 0)
    for done, (position, *_) in enumerate(whole, start=1):
        assert isinstance(position, Position)
        rest = iter_packs(source, encoder, plan, position, epochs=3)
        assert [fingerprint(item) for item in rest] == whole[done:]


def test_compat_packs_hold_the_rows_tokens_end_to_end_as_one_segment(
    chats: Path, tokenizer: TextTokenizer
) -> None:
    source, encoder, section = open_rows(
        chats, tokenizer, window=16, compat=COMPAT, shuffle_before_pack=False
    )
    plan = make_plan(measured(source, encoder), section, 5)
    alone = [encoder.encode(row, source.source_of(0), "row") for row in source.rows(range(40))]
    examples = [example for example in alone if example is not None]
    ids, labels = (
        np.concatenate([getattr(example, key) for example in examples])
        for key in ("input_ids", "labels")
    )
    packs = [pack for _, pack in iter_packs(source, encoder, plan, epochs=1)]
    packs.sort(key=lambda pack: int(pack.row_ids[0]))
    used = len(packs) * 128
    assert len(ids) - used == plan.lost_tokens < 128
    assert np.concatenate([pack.input_ids for pack in packs]).tolist() == ids[:used].tolist()
    assert np.concatenate([pack.labels for pack in packs]).tolist() == labels[:used].tolist()
    for pack in packs:
        assert pack.cu_seqlens.tolist() == [0, 128]
        assert pack.position_ids.tolist() == list(range(128))
    assert any(pack.input_ids[0] not in tokenizer.bos_ids for pack in packs)  # a row was cut


def test_under_compat_a_row_without_a_trained_token_stays_in_the_packs(
    mixed: Path, tokenizer: TextTokenizer
) -> None:
    source, encoder, _ = open_rows(mixed, tokenizer, on_error="skip", compat=COMPAT)
    got = measured(source, encoder)
    assert "without a trained token" not in got.report["dropped"]
    assert (got.lengths[2], got.targets[2]) == (128, 0)


def test_rows_know_their_data_set(chats: Path, tmp_path: Path, tokenizer: TextTokenizer) -> None:
    other = write_chats(tmp_path / "b.jsonl", 3)
    section = DataSection.model_validate(
        {"sources": [{"path": str(chats)}, {"path": str(other)}, {"path": str(other)}]}
    )
    source = open_sources(section, 1)
    got = measure_rows(source, Encoder(tokenizer, "tokenizer", section), np.arange(46))
    assert got.sets.tolist() == [0] * 40 + [1] * 3 + [2] * 3
    assert source.subset(np.array([45, 0, 41])).sets_of(range(3)).tolist() == [2, 0, 1]
    assert [source.source_of(row).path for row in (0, 41, 45)] == [str(chats), *[str(other)] * 2]


def test_a_source_s_own_system_text_goes_before_the_recipe_s(
    chats: Path, tokenizer: TextTokenizer
) -> None:
    systems = [{"path": str(chats), "system": text} for text in ("Be Ada.", None, "")]
    section = DataSection.model_validate({"sources": systems, "system": "Be Bob."})
    source, encoder = open_sources(section, 1), Encoder(tokenizer, "tokenizer", section)
    for row, said in ((0, "Be Ada."), (40, "Be Bob."), (80, None)):
        example = encoder.encode(source.rows([row])[0], source.source_of(row), "row")
        assert example is not None
        text = tokenizer.decode(example.input_ids.tolist(), skip_special_tokens=False)
        assert text.startswith("<|im_start|>system\n" + said if said else "<|im_start|>user")


def test_without_an_end_the_epochs_go_on(chats: Path, tokenizer: TextTokenizer) -> None:
    source, encoder, section = open_rows(chats, tokenizer)
    plan = Plan(measured(source, encoder).lengths, section, 5)
    count = plan.total_packs(4) + 1
    last = list(islice(iter_packs(source, encoder, plan), count))[-1]
    assert last[0].epoch == 4


def test_a_file_that_changed_since_it_was_counted_is_noticed(
    tmp_path: Path, tokenizer: TextTokenizer
) -> None:
    path = write_chats(tmp_path / "a.jsonl", 5)
    source, encoder, section = open_rows(path, tokenizer)
    plan = Plan(measured(source, encoder).lengths, section, 5)
    path.write_text(path.read_text().replace("red", "ten", 1).replace("question 0", "question"))
    with pytest.raises(DataError, match="changed since the rows were counted"):
        list(iter_packs(source, encoder, plan, epochs=1))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data set is not on this machine")
def test_real_dialogues_are_used_whole(tokenizer: TextTokenizer) -> None:
    source, encoder, section = open_rows(
        REAL, tokenizer, source={"map": "oasst1_map_fn", "limit": 200}, max_length=8192
    )
    got = measured(source, encoder)
    assert got.report["rows"] == 200
    assert got.report["used"] >= 198
    plan = Plan(got.lengths, section, 1)
    packed = [pack for _, pack in iter_packs(source, encoder, plan, epochs=1)]
    assert sum(len(pack.input_ids) for pack in packed) == got.report["tokens"]
