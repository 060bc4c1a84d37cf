"""How full packs of real rows are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks.made_model import CHATML
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.data.windows import Feed, Window
from tests.conftest import ROOT
from tests.data.feeds import (
    content,
    feed_of,
)

REAL = ROOT.parent / "shared" / "data" / "openassistant-guanaco"


@pytest.fixture(scope="module")
def real_feed(tmp_path_factory: pytest.TempPathFactory) -> Feed:
    """Guanaco's 1,000 rows with a vocabulary of 8,000 trained on them; windows as by default."""
    if not REAL.is_dir():
        pytest.skip("the real data set is not on this machine")
    folder = tmp_path_factory.mktemp("real_tokenizer")
    train_tokenizer(folder)
    return feed_of(
        REAL / "*.jsonl",
        TextTokenizer.from_folder(folder),
        source={"map": "oasst1_map_fn"},
        max_length=2048,
    )


def train_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    lines = [line for path in sorted(REAL.glob("*.jsonl")) for line in path.open(encoding="utf-8")]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
              "pad_token": "<|im_end|>", "chat_template": CHATML}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_best_fit_fills_98_percent_of_real_packs_and_cuts_no_row_that_fits(
    real_feed: Feed,
) -> None:
    made = [real_feed.window(epoch, 0) for epoch in (0, 1)]
    assert real_feed.n_windows == 1
    for window in made:
        report = window.report
        density = report["tokens"] / (len(window.packs) * 2048)
        print(f"guanaco, 2,048: {len(window.packs)} packs, density {density:.2%}")
        assert density >= 0.98
        rows = Counter(int(row) for pack in window.packs for row in pack.row_ids)
        assert set(rows.values()) == {1}
        assert report["rows"] == 1000
        assert report["used"] == len(rows) == 1000 - sum(report["dropped"].values()) > 990
        longest = [size for pack in window.packs for size in np.diff(pack.cu_seqlens).tolist()]
        assert report["cut"] == sum(size == 2048 for size in longest) > 0
    assert [content(a) for a in made[0].packs] != [content(b) for b in made[1].packs]
    assert total_tokens(made[0]) == total_tokens(made[1])


def total_tokens(window: Window) -> int:
    return sum(len(pack.input_ids) for pack in window.packs)
