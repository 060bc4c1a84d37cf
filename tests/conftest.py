"""Shared parts of the tests: a tiny real model with a real tokenizer, and small data files."""

from __future__ import annotations

import functools
import gc
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.made_model import write_tokenizer

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # what a shell starts in the background ignores Ctrl-C, and so would all that tests start
    signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = ("exact", "cluster")
"""Marks of tests that run only where `-m` names them."""
ROOT = Path(__file__).resolve().parent.parent
ONE_AT_A_TIME = re.compile(r"\bmark\.(ray|demo|cluster|soak)\b|\b(browser|open_page): Any\b")
"""What stands in a test file that starts Ray or a browser."""
TIMED = "tests/faults/"
"""Where ranks that stand still for seconds are taken for hung ones."""
WORDS = ["red", "blue", "stone", "river", "cloud", "seven", "night", "green", "song", "glass"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--faults", type=int, default=1, help="kills per fault test")
    parser.addoption("--plain-faults", type=int, default=8, help="kills of a worker without Ray")
    parser.addoption("--ray-faults", type=int, default=2, help="kills of runs through Ray Train")
    parser.addoption("--seeds", type=int, default=3, help="seeds that are run twice each")
    parser.addoption("--kills", type=int, default=20, help="kills of the data stream's ledger test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave long proofs to targets of their own, such as `make exact`: `pytest -m exact`."""
    left = [mark for mark in LONG if mark not in config.option.markexpr]
    whole = [item for item in items if any(map(item.get_closest_marker, left))]
    config.hook.pytest_deselected(items=whole)
    items[:] = [item for item in items if item not in whole]
    if hasattr(config, "workerinput"):  # a process of `pytest -n`: the longest part goes first
        items.sort(key=lambda item: part_of(item.nodeid) != "one at a time")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each process of `pytest -n` whole files, and one of them all that fill the machine.

    Marks of xdist cannot say so: with pytest 9.2 its `--dist loadgroup` groups nothing
    (pytest-xdist issue 1386), and the process that hands out tests sees names alone.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return part_of(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def part_of(nodeid: str) -> str:
    """Return which tests a test stays together with: those of its file, or all of some files."""
    file = nodeid.partition("::")[0]
    return "one at a time" if one_at_a_time(file) else file


@functools.cache
def one_at_a_time(file: str) -> bool:
    """Tell whether a test file, a path below the root, takes Ray, a browser or times processes."""
    return file.startswith(TIMED) or bool(ONE_AT_A_TIME.search((ROOT / file).read_text("utf-8")))


@pytest.fixture(autouse=True, scope="module")
def ray_only_where_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let no Ray start where no test is marked `ray`: it would do so beside another one."""
    with pytest.MonkeyPatch.context() as patch:
        if not one_at_a_time(request.node.nodeid):
            patch.setenv("RAY_TMPDIR", "/dev/null/mark this test with pytest.mark.ray")
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium without a window, for pages that are files."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium found; apt-get install chromium runs the page tests")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()


@pytest.fixture(autouse=True)
def torch_of_its_own() -> Iterator[None]:
    """Undo what DeepSpeed's stage 3 does to all of a process: linear layers of its own."""
    yield
    stage_3 = sys.modules.get("deepspeed.runtime.zero.linear")
    torch = sys.modules.get("torch")
    if stage_3 and torch and torch.nn.functional.linear is stage_3.zero3_linear_wrap:
        torch.nn.functional.linear = torch._C._nn.linear


@pytest.fixture(scope="session")
def imported() -> list[int]:
    """How many modules there were when what they hold was set aside."""
    return [0]


@pytest.fixture(autouse=True)
def libraries_out_of_the_way(imported: list[int]) -> Iterator[None]:
    """Set aside what a test's imports brought: loading a model collects garbage.

    Else each collection looks through a million objects of libraries, and takes half a second.
    """
    yield
    if len(sys.modules) > imported[0]:
        imported[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers, width 64, with a byte-level BPE tokenizer and ChatML."""
    folder = tmp_path_factory.mktemp("tiny_model")
    make_tiny_model(folder)
    return folder


def make_tiny_model(folder: Path, *, seed: int = 0, **changes: int) -> None:
    """Write a random Llama checkpoint and its tokenizer into `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    vocab_size = make_tokenizer(folder)
    torch.manual_seed(seed)
    values = {
        "vocab_size": vocab_size, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 512, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    }  # fmt: skip
    config = LlamaConfig(**{**values, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)


def make_tokenizer(folder: Path) -> int:
    """Train a small byte-level BPE on our own words; return its size."""
    return write_tokenizer(folder, WORDS, pieces=400)


def write_chats(path: Path, rows: int) -> Path:
    """Write `rows` one-turn chats of differing lengths as JSONL."""
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            answer = " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + i % 7))
            turns = [
                {"role": "user", "content": f"question {i} about {WORDS[i % len(WORDS)]}?"},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": turns}) + "\n")
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short chats."""
    return write_chats(tmp_path_factory.mktemp("data") / "chats.jsonl", 40)
