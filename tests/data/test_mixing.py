"""Several data sets: which rows are whose, and weights, exact in every epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from raytune_ft.config.schema import DataSection
from raytune_ft.data.examples import Encoder
from raytune_ft.data.packing import Position
from raytune_ft.data.places import iter_packs
from raytune_ft.data.sources import open_sources
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import make_feed, measure_rows
from tests.conftest import write_chats


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


@pytest.mark.parametrize("weights", [(2.0, 0.5, 1.5), (0.25, 3.0, 1.0), (1.1, 0.01, 2.9)])
def test_weights_are_exact_in_every_epoch_and_over_a_resume(
    tmp_path: Path, tokenizer: TextTokenizer, weights: tuple[float, ...]
) -> None:
    """Each row floor(w) or ceil(w) times, and w * n in all, told by the file it lies in."""
    sizes = (40, 31, 17)
    paths = [write_chats(tmp_path / f"{n}.jsonl", size) for n, size in enumerate(sizes)]
    section = DataSection.model_validate({
        "max_length": 128, "window": 16, "shuffle_rows": 24,
        "sources": [{"path": str(path), "weight": weight}
                    for path, weight in zip(paths, weights, strict=True)],
    })  # fmt: skip
    source = open_sources(section, 1)
    feed = make_feed(source, Encoder(tokenizer, "tokenizer", section), 5)
    whole = list(iter_packs(feed, epochs=2))
    middle = whole[len(whole) // 3]
    stopped = [*whole[: len(whole) // 3 + 1], *iter_packs(feed, middle.behind, epochs=2)]
    for run in (whole, stopped):
        for epoch in range(2):
            seen = Counter(
                source.where(int(row))
                for one in run
                if one.behind.epoch - (one.behind == Position(one.behind.epoch)) == epoch
                for row in one.pack.row_ids
            )
            check_weights(seen, paths, sizes, weights)


def check_weights(
    seen: Counter[str], paths: list[Path], sizes: tuple[int, ...], weights: tuple[float, ...]
) -> None:
    for path, size, weight in zip(paths, sizes, weights, strict=True):
        times = [seen[f"{path}:{line}"] for line in range(1, size + 1)]
        assert set(times) <= {int(weight), int(np.ceil(weight))}
        assert abs(sum(times) - weight * size) <= 0.5
