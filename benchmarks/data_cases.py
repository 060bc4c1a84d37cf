"""One case of the benchmark of the data stream, in a process of its own.

In: the folder that `data_rows` has written, the name of a case and of its rows. Out: one JSON line
on standard output; cases that make ids leave two numbers per row, by which rows are compared.
Run: by benchmarks.data.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.data_rows import MAX_LENGTH

WINDOW = 1024
AT_ONCE = 2
PROCESSES = 2
UNCOUNTED_WINDOWS = 8
"""Some are made while the first one is waited for; behind them the reader waits for each."""
STREAM_EPOCHS = {"tokenizers": 2, "gigatoken": 8}
PACKED_ROWS = {"ours": 1_000_000, "wrapped": 200_000, "bfd": 50_000}

Result = dict[str, Any]


def _feed(folder: Path, rows: str) -> Any:
    from raytune_ft.config.schema import DataSection
    from raytune_ft.data.examples import Encoder
    from raytune_ft.data.sources import open_sources
    from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
    from raytune_ft.data.windows import make_feed

    data = DataSection.model_validate({
        "sources": [{"path": str(folder / f"{rows}.jsonl")}],
        "max_length": MAX_LENGTH, "window": WINDOW,
    })  # fmt: skip
    tokenizer = TextTokenizer.from_folder(folder / "model")
    return make_feed(open_sources(data, 1), Encoder(tokenizer, "tokenizer", data), 1)


def stream(folder: Path, rows: str) -> Result:
    """Ours as training has it: windows by Ray Data tasks, packs on the consumer."""
    from raytune_ft.cluster import ray_session
    from raytune_ft.data.feeder import Rows, feeding

    with ray_session():
        begun = time.perf_counter()
        feed = _feed(folder, rows)
        engine = feed.encoder.tokenizer.engine
        epochs = STREAM_EPOCHS[engine]
        first_s, counted_from = 0.0, 0.0
        uncounted = UNCOUNTED_WINDOWS if len(feed.source) > UNCOUNTED_WINDOWS * WINDOW else 1
        with feeding({"train": Rows(feed, epochs)}, at_once=AT_ONCE) as supply:
            for placed in supply.packs("train"):
                first_s = first_s or time.perf_counter() - begun
                if not counted_from and (placed.behind.epoch or placed.behind.window >= uncounted):
                    counted_from = time.perf_counter()
            ended = time.perf_counter()
    n_rows = epochs * len(feed.source) - min(uncounted * WINDOW, len(feed.source))
    return {"first_s": first_s, "rate": n_rows / (ended - counted_from), "engine": engine}


def in_process(folder: Path, rows: str) -> Result:
    """Ours without Ray: the function that a data task calls, window after window."""
    begun = time.perf_counter()
    feed = _feed(folder, rows)
    engine = feed.encoder.tokenizer.engine
    feed.window(0, 0)
    counted_from = time.perf_counter()
    for number in range(1, feed.n_windows):
        feed.window(0, number)
    took = time.perf_counter() - counted_from
    n_rows = len(feed.source) - WINDOW
    return {"first_s": counted_from - begun, "rate": n_rows / took, "engine": engine}


def bare(folder: Path, rows: str) -> Result:
    """The limit: the fast tokenizer's own batch call on its own threads, texts ready in memory."""
    os.environ.update(TOKENIZERS_PARALLELISM="true", RAYON_NUM_THREADS=str(PROCESSES))
    from tokenizers import Tokenizer

    feed = _feed(folder, rows)
    written = [
        feed.encoder.write(row, feed.source.source_of(0), "row")
        for row in feed.source.rows(range(len(feed.source)))
    ]
    texts = ["".join(segment.text for segment in row.segments) for row in written if row]
    tokenizer = Tokenizer.from_str(feed.encoder.tokenizer.spec.tokenizer_json)
    tokenizer.encode_batch_fast(texts[:WINDOW], add_special_tokens=False)
    begun = time.perf_counter()
    for start in range(0, len(texts), WINDOW):
        tokenizer.encode_batch_fast(texts[start : start + WINDOW], add_special_tokens=False)
    return {"rate": len(texts) / (time.perf_counter() - begun), "engine": "tokenizers"}


def ids(folder: Path, rows: str) -> Result:
    """Two numbers per row: of its ids and of its labels, uncut."""
    from raytune_ft.data.examples import encode_rows

    feed = _feed(folder, rows)
    data = feed.encoder.data.model_copy(update={"over_length": "split"})
    encoder = type(feed.encoder)(feed.encoder.tokenizer, feed.encoder.template, data)
    found: list[tuple[int, int]] = []
    for start in range(0, len(feed.source), WINDOW):
        numbers = range(start, min(start + WINDOW, len(feed.source)))
        found += [_sums(e.input_ids, e.labels) for e in encode_rows(feed.source, encoder, numbers)]
    engine = encoder.tokenizer.engine
    np.save(folder / f"ids-{rows}-{engine}.npy", np.array(found, np.int64))
    return {"rows": len(found), "engine": engine}


def _sums(input_ids: Iterable[int], labels: Iterable[int]) -> tuple[int, int]:
    """Checksums of ids, and of labels but the first, which nothing predicts."""
    sums = [zlib.crc32(np.asarray(values, np.int32).tobytes()) for values in (input_ids, labels)]
    shown = np.asarray(labels, np.int32).copy()
    shown[:1] = -100
    return sums[0], zlib.crc32(shown.tobytes())


def _theirs(folder: Path) -> tuple[Any, Any]:
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    datasets.disable_caching()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    return datasets, tokenizer


def trl(folder: Path, rows: str) -> Result:
    """TRL as its users have it: SFTTrainer's own preparation with packing; a loop over packs."""
    begun = time.perf_counter()
    datasets, tokenizer = _theirs(folder)
    from trl.trainer.sft_trainer import SFTTrainer

    data = datasets.load_dataset("json", data_files=str(folder / f"{rows}.jsonl"), split="train")
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False)
    args = SimpleNamespace(
        dataset_num_proc=PROCESSES, dataset_text_field="text", max_length=MAX_LENGTH,
        packing_strategy="bfd", shuffle_dataset=True, seed=1, truncation_mode="keep_start",
        assistant_only_loss=rows != "plain",
    )  # fmt: skip
    ready = time.perf_counter()
    packed = SFTTrainer._prepare_dataset(trainer, data, tokenizer, args, True, None, "train")
    return _read(packed, begun, ready, len(data))


def mapped(folder: Path, rows: str) -> Result:
    """The fewest steps of `datasets` and TRL: one batched map, and TRL's packing."""
    begun = time.perf_counter()
    datasets, tokenizer = _theirs(folder)
    from trl import pack_dataset

    data = datasets.load_dataset("json", data_files=str(folder / f"{rows}.jsonl"), split="train")
    ready = time.perf_counter()
    encoded = data.map(
        _map_function(rows), fn_kwargs={"tokenizer": tokenizer}, batched=True,
        num_proc=PROCESSES, remove_columns=data.column_names,
    )  # fmt: skip
    packed = pack_dataset(encoded, MAX_LENGTH, "bfd", {"num_proc": PROCESSES})
    result = _read(packed, begun, ready, len(data))
    sums = [_sums(*_to_last_label(row["input_ids"], row["labels"])) for row in encoded]
    np.save(folder / f"ids-{rows}-theirs.npy", np.array(sums, np.int64))
    return result


def _map_function(rows: str) -> Callable[..., Any]:
    return _encode_texts if rows == "plain" else _encode_chats


def _encode_texts(batch: Any, tokenizer: Any) -> Any:
    texts = [text + tokenizer.eos_token for text in batch["text"]]
    input_ids = tokenizer(texts, return_attention_mask=False)["input_ids"]
    return {"input_ids": input_ids, "labels": input_ids}


def _encode_chats(batch: Any, tokenizer: Any) -> Any:
    made = tokenizer.apply_chat_template(
        batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    labels = [
        np.where(np.array(mask, bool), np.array(row, np.int32), -100)
        for row, mask in zip(made["input_ids"], made["assistant_masks"], strict=True)
    ]
    return {"input_ids": made["input_ids"], "labels": labels}


def _to_last_label(input_ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Cut off what the template writes behind the last answer; ours does not train with it."""
    end = len(labels)
    while end and labels[end - 1] == -100:
        end -= 1
    return input_ids[:end], labels[:end]


def _read(packed: Any, begun: float, ready: float, n_rows: int) -> Result:
    """Read every pack as numbers."""
    first_s = 0.0
    for _ in packed.with_format("numpy"):
        first_s = first_s or time.perf_counter() - begun
    rate = n_rows / (time.perf_counter() - ready)
    return {"first_s": first_s, "rate": rate, "engine": "tokenizers"}


def packing(folder: Path, rows: str) -> Result:
    """Packing by lengths alone: ours window by window, TRL's two ways on the same lengths."""
    datasets, _ = _theirs(folder)
    from trl import pack_dataset

    from raytune_ft.data.packing import pack_lengths

    known = np.load(folder / "lengths.npy")
    chance = np.random.default_rng(3)
    rates: Result = {}
    lengths = chance.choice(known, PACKED_ROWS["ours"])
    begun = time.perf_counter()
    for start in range(0, len(lengths), WINDOW):
        pack_lengths(lengths[start : start + WINDOW], MAX_LENGTH)
    rates["ours"] = len(lengths) / (time.perf_counter() - begun)
    for strategy in ("bfd", "wrapped"):
        some = lengths[: PACKED_ROWS[strategy]]
        data = datasets.Dataset.from_dict({"input_ids": [np.zeros(n, np.int32) for n in some]})
        begun = time.perf_counter()
        pack_dataset(data, MAX_LENGTH, strategy)
        rates[strategy] = len(some) / (time.perf_counter() - begun)
    return rates


def lengths(folder: Path, rows: str) -> Result:
    """Keep the lengths of the chats for `packing`."""
    from raytune_ft.data.windows import measure_rows

    feed = _feed(folder, "chat")
    found = measure_rows(feed.source, feed.encoder, range(len(feed.source))).lengths
    np.save(folder / "lengths.npy", found[found > 0])
    return {"mean": float(found.mean())}


CASES = {
    case.__name__: case for case in (stream, in_process, bare, ids, trl, mapped, packing, lengths)
}

if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[2]](Path(sys.argv[1]), sys.argv[3])))
