"""Every family trains: five QLoRA steps on its original checkpoint, merged and read back."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raytune_ft import export
from raytune_ft.config.loader import dump_yaml
from raytune_ft.data.places import iter_packs
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.model.adapter import load_adapter
from raytune_ft.preparation import prepare
from raytune_ft.training.run_folder import RunFolder, read_json, read_jsonl
from tests.families import short_run
from tests.families.checkpoints import SPECS, WITHOUT_NATIVE_FORM, weights_of
from tests.families.conftest import Checkpoint
from tests.families.loaded import (
    TOLERANCE,
    difference,
    load,
    logits,
    random_ids,
    read_folder,
    without_buffers,
)
from tests.families.oracles import logits_of

pytestmark = pytest.mark.families

FAMILIES = tuple(SPECS)
TEXTS = ("what is  the red stone?", " 你好吗 河边 🪨", "def answer(x):\n    return x + 17\n", "é\t")


@pytest.mark.parametrize("family", FAMILIES)
def test_five_steps_then_merged_and_read_back(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint(family, shards=2)
    run, _ = short_run.train(short_run.recipe_of(family, base, tmp_path))

    losses = [line["loss"] for line in read_jsonl(run.metrics)]
    assert len(losses) == short_run.STEPS
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0] - 0.1, "the same rows in each step"
    assert {line["when"] for line in read_jsonl(run.samples)} == {"before", "after"}
    assert read_json(run.path / "data.json")["used"] == len(short_run.ROWS)

    merged = export.merge(str(run.path))
    assert read_folder(merged).keys() == weights_of(family).keys()
    assert (merged / "config.json").read_bytes() == (base / "config.json").read_bytes()

    # merged into the NF4 weights that training saw: the same model, but for float32 rounding
    ids = random_ids(300, 17)
    trained = logits(load_adapter(load(base, quantization="nf4"), run.adapter), ids)[0]
    assert difference(logits(load(merged), ids)[0], trained) <= 2 * TOLERANCE
    independent = logits_of(family, SPECS[family].config, read_folder(merged), ids)
    assert difference(trained, independent) <= 2 * TOLERANCE
    assert torch.equal(trained.argmax(-1), independent.argmax(-1))
    assert difference(logits(load(base), ids)[0], trained) > 1e-2, "training changed the model"


@pytest.mark.parametrize("family", ["qwen", "chatglm3", "baichuan2_7b", "yi_first", "starcoder"])
def test_full_parameter_training_writes_the_original_layout(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    base = checkpoint(family, shards=2)
    recipe = short_run.recipe_of(family, base, tmp_path, quantization="none", method="full")
    run, _ = short_run.train(recipe)
    saved, before = read_folder(run.model), without_buffers(weights_of(family))
    assert saved.keys() == before.keys()
    assert all(saved[name].shape == before[name].shape for name in before)
    assert all((saved[name] != before[name]).any() for name in before), "every tensor is trained"
    ids = random_ids(300, 17)
    wanted = logits_of(family, SPECS[family].config, saved, ids)
    assert difference(logits(load(run.model), ids)[0], wanted) <= TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_tokenised_with_the_cards_template(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """What is trained is each answer and its end, nothing of the question."""
    recipe = short_run.recipe_of(family, checkpoint(family), tmp_path)
    prepared = prepare(recipe, RunFolder(tmp_path / "run"), "test", short_run.silent_screen())
    tokenizer = prepared.train.feed.encoder.tokenizer
    words = SPECS[family].config.get("padded_vocab_size") or SPECS[family].config["vocab_size"]
    seen: dict[str, str] = {}
    for placed in iter_packs(prepared.train.feed, epochs=1):
        pack = placed.pack
        assert pack.input_ids.max() < words
        for start, end in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True):
            ids, labels = pack.input_ids[start:end].tolist(), pack.labels[start:end].tolist()
            learned = [label for label in labels if label != -100]
            assert tokenizer.eos_id in learned or learned[-1] in tokenizer.extra_stop_ids
            seen[tokenizer.decode(learned).strip()] = tokenizer.decode(ids)
    assert set(seen) == {answer for _, answer in short_run.ROWS}
    for question, answer in short_run.ROWS:
        assert question in seen[answer]


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_are_those_of_the_files_own_library(family: str, checkpoint: Checkpoint) -> None:
    """sentencepiece or tiktoken read the very file that our tokenizer was built from."""
    folder = checkpoint(family)
    ours = TextTokenizer.from_folder(folder, "<|endoftext|>" if "qwen" in family else None)
    for text in TEXTS:
        assert ours.encode(text) == ids_by_the_library(folder, text), text
        assert ours.decode(ours.encode(text)) == text


def ids_by_the_library(folder: Path, text: str) -> list[int]:
    if (folder / "tokenizer.model").is_file():
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).encode(text)
    if (folder / "qwen.tiktoken").is_file():
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe

        pattern = (
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        ranks = load_tiktoken_bpe(str(folder / "qwen.tiktoken"))
        library = tiktoken.Encoding(
            "qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        return library.encode(text, disallowed_special=())
    from tokenizers import Tokenizer

    ids: list[int] = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    return ids


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in WITHOUT_NATIVE_FORM])
def test_a_native_export_brings_a_tokenizer_for_plain_transformers(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    base = checkpoint(family)
    recipe = short_run.recipe_of(family, base, tmp_path, quantization="none")
    run, prepared = short_run.train(
        recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": 1})})
    )
    native = export.merge(str(run.path), str(tmp_path / "native"), layout="native")
    theirs = AutoTokenizer.from_pretrained(native, trust_remote_code=False)
    ours = prepared.train.feed.encoder.tokenizer
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
    assert theirs.eos_token_id == ours.eos_id


def test_a_fresh_process_reads_an_original_checkpoint(checkpoint: Checkpoint) -> None:
    """Nothing but the import of the loader registers the families."""
    family, ids = "qwen_aug", random_ids(300, 9)
    program = (
        "import json, sys; from tests.families.loaded import load, logits; import torch;"
        "from pathlib import Path;"
        "ids = torch.tensor(json.loads(sys.argv[2]));"
        "print(json.dumps(logits(load(Path(sys.argv[1])), ids)[0, -1].tolist()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint(family)), json.dumps(ids.tolist())],
        capture_output=True, text=True, check=False, env=dict(os.environ),
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    wanted = logits_of(family, SPECS[family].config, weights_of(family), ids)[-1]
    assert difference(found, wanted) <= TOLERANCE


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.exact
@pytest.mark.parametrize("family", ["chatglm3", "baichuan_13b"])
def test_the_command_line_trains_and_merges(
    family: str, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Through Ray: its worker is a fresh process as well, and packs come from its data tasks."""
    base = checkpoint(family, fmt="bin", shards=2)
    recipe = short_run.recipe_of(family, base, tmp_path)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe), encoding="utf-8")
    command("train", "--config", str(tmp_path / "recipe.yaml"))
    run = RunFolder.existing(tmp_path / "runs" / family)
    assert len(list(read_jsonl(run.metrics))) == short_run.STEPS
    command("merge", str(run.path))
    merged = run.merged
    assert read_folder(merged).keys() == weights_of(family).keys()
    ids = random_ids(300, 17)
    trained = logits(load_adapter(load(base, quantization="nf4"), run.adapter), ids)[0]
    assert difference(logits(load(merged), ids)[0], trained) <= 2 * TOLERANCE
    adapter: dict[str, Any] = load_file(run.adapter / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())


def command(verb: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"raytune_ft.{verb}", *arguments],
        capture_output=True, text=True, check=False, env=dict(os.environ), timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
