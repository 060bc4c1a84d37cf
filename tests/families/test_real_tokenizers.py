"""Five steps per family with the original's own tokenizer file and its whole vocabulary.

The files are other people's, so they are not here: RAYTUNE_TEST_TOKENIZERS names a folder with
`internlm/tokenizer.model`, `llama2/...`, `mistral/...`, `chatglm/...` and `qwen/qwen.tiktoken`.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from raytune_ft import export
from raytune_ft.data.places import iter_packs
from raytune_ft.model.adapter import load_adapter
from raytune_ft.training.run_folder import read_jsonl
from tests.families import short_run
from tests.families.checkpoints import make
from tests.families.loaded import TOLERANCE, difference, load, logits, random_ids

FILES = Path(os.environ.get("RAYTUNE_TEST_TOKENIZERS", "/nowhere"))

pytestmark = [
    pytest.mark.families,
    pytest.mark.slow,
    pytest.mark.skipif(not FILES.is_dir(), reason="RAYTUNE_TEST_TOKENIZERS names no folder"),
]

# family -> (file, its field, words of the original, ids that its template must give)
CASES: dict[str, tuple[str, str, int, set[int]]] = {
    "internlm_7b": ("internlm/tokenizer.model", "vocab_size", 103168, {1, 103027, 2}),
    "llama2": ("llama2/tokenizer.model", "vocab_size", 32000, {1, 2}),
    "zephyr": ("mistral/tokenizer.model", "vocab_size", 32000, {1, 2}),
    "chatglm2": ("chatglm/tokenizer.model", "padded_vocab_size", 65024, {64790, 64792, 2}),
    "chatglm3": (
        "chatglm/tokenizer.model", "padded_vocab_size", 65024, {64790, 64792, 64795, 64796, 2}
    ),
    "qwen": ("qwen/qwen.tiktoken", "vocab_size", 151936, {151644, 151645}),
}  # fmt: skip


@pytest.mark.parametrize("family", CASES)
def test_five_steps_with_the_original_tokenizer(family: str, tmp_path: Path) -> None:
    file, field, words, wanted = CASES[family]
    base = make(family, tmp_path / "model", shards=2, **{field: words})
    shutil.copyfile(FILES / file, base / Path(file).name)
    (base / "generation_config.json").unlink(missing_ok=True)  # its ids are the tiny one's
    run, prepared = short_run.train(short_run.recipe_of(family, base, tmp_path))

    seen: set[int] = set()
    for placed in iter_packs(prepared.train.feed, epochs=1):
        seen |= set(placed.pack.input_ids.tolist())
    assert wanted <= seen
    losses = [line["loss"] for line in read_jsonl(run.metrics)]
    assert len(losses) == short_run.STEPS
    assert losses[-1] < losses[0] - 0.1

    merged = export.merge(str(run.path))
    ids = random_ids(words, 17)
    trained = logits(load_adapter(load(base, quantization="nf4"), run.adapter), ids)
    assert difference(logits(load(merged), ids), trained) <= 2 * TOLERANCE
