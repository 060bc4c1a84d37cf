"""The sides of the serving benchmark: a model's folder in, something that answers out.

`engine` is driven in this process; `endpoint` is ours through Ray Serve, as `raytune-ft serve`
starts it, and `endpoint+vllm` the same with vLLM behind it; `vllm` is vLLM's own server, and
`transformers` is `transformers serve` with continuous batching. All but the first run in processes
of their own and are asked over HTTP by one client.
"""

from __future__ import annotations

import asyncio
import gc
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.serve_load import Ask
from raytune_ft.chat.model import Sampling, open_chat
from raytune_ft.serving.engines import EngineOptions, embedded

ROOT = Path(__file__).resolve().parents[1]
START_S = 400
"""For a side to load its model and answer."""
MAX_WAITING = 400


@dataclass(frozen=True)
class Side:
    """Something that answers."""

    ask: Ask
    log: Path | None = None


@contextmanager
def engine(model: str, _folder: Path) -> Iterator[Side]:
    """Answer from the engine in this process."""
    options = EngineOptions(path=model, max_waiting=MAX_WAITING)
    lent = embedded(open_chat(model), options)

    async def ask(message: str, tokens: int) -> AsyncIterator[tuple[str, int]]:
        ids = lent.encode([{"role": "user", "content": message}])
        async for piece in lent.submit(ids, Sampling(temperature=0.0, max_new_tokens=tokens)):
            yield piece.text, piece.n_tokens

    try:
        yield Side(ask)
    finally:
        lent.close()


@contextmanager
def endpoint(model: str, folder: Path, engine: str = "embedded") -> Iterator[Side]:
    """Start our endpoint as a user does."""
    port, threads = free_port(), os.environ.get("OMP_NUM_THREADS")
    options: dict[str, Any] = {"max_waiting": MAX_WAITING, "engine": engine}
    options |= {"threads": int(threads)} if threads else {}
    code = (
        "import sys; from raytune_ft.serving.app import serve\n"
        f"sys.exit(serve({model!r}, port={port}, options={options!r}))"
    )
    packages = vllm_site() if engine == "vllm" else ""
    with _process([sys.executable, "-c", code], folder / f"{engine}.log", packages) as log:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/readyz", log)
        with urllib.request.urlopen(f"{url}/v1/models") as answer:
            name = json.load(answer)["data"][0]["id"]
        yield Side(over_http(url, name), log)


@contextmanager
def transformers(model: str, folder: Path) -> Iterator[Side]:
    """Start `transformers serve` with continuous batching on the same folder."""
    from raytune_ft.model.loading import prepare_folder

    where, port = str(prepare_folder(model)), free_port()
    options = ["--continuous-batching", "--port", str(port), "--host", "127.0.0.1"]
    options += ["--dtype", "auto", "--log-level", "error"]
    if not torch.cuda.is_available():
        # its default takes most of the machine's memory for the cache and its masks
        options += ["--device", "cpu", "--dtype", "float32"]
        options += ["--cb-num-blocks", "64", "--cb-max-batch-tokens", "512"]
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve", where, *options]
    with _process(program, folder / "transformers.log") as log:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", log)
        yield Side(over_http(url, where), log)


@contextmanager
def endpoint_vllm(model: str, folder: Path) -> Iterator[Side]:
    """Start our endpoint with vLLM behind it."""
    with endpoint(model, folder, "vllm") as side:
        yield side


@contextmanager
def vllm(model: str, folder: Path) -> Iterator[Side]:
    """Start vLLM's own server on the same folder."""
    from raytune_ft.model.loading import prepare_folder

    where, port = str(prepare_folder(model)), free_port()
    program = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", where]
    program += ["--host", "127.0.0.1", "--port", str(port), "--disable-uvicorn-access-log"]
    with _process(program, folder / "vllm_alone.log", vllm_site()) as log:
        url = f"http://127.0.0.1:{port}"
        _wait(f"{url}/health", log)
        yield Side(over_http(url, where), log)


SIDES = {
    "engine": engine,
    "endpoint": endpoint,
    "transformers": transformers,
    "endpoint+vllm": endpoint_vllm,
    "vllm": vllm,
}


def vllm_site() -> str:
    """Return the folder of vLLM's packages, which go before all others; empty where it has none."""
    return os.environ.get("BENCH_VLLM_SITE", "")


def default_sides() -> list[str]:
    """Return the sides that can run here; vLLM's where it is installed or its folder is named."""
    able = bool(vllm_site()) or importlib.util.find_spec("vllm") is not None
    return [name for name in SIDES if able or "vllm" not in name]


def over_http(url: str, name: str) -> Ask:
    """Return an asker of an OpenAI-shaped endpoint that streams."""
    import aiohttp

    async def ask(message: str, tokens: int) -> AsyncIterator[tuple[str, int]]:
        body = {
            "model": name, "stream": True, "temperature": 0.0, "max_tokens": tokens,
            "stream_options": {"include_usage": True},
            "messages": [{"role": "user", "content": message}],
        }  # fmt: skip
        limit = aiohttp.ClientTimeout(total=1800)
        async with (
            aiohttp.ClientSession(timeout=limit) as session,
            session.post(f"{url}/v1/chat/completions", json=body) as answer,
        ):
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {(await answer.text())[:150]}")
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    yield _text(json.loads(line[6:]))

    return ask


def _text(chunk: dict[str, Any]) -> tuple[str, int]:
    if "error" in chunk:
        raise RuntimeError(str(chunk["error"])[:150])
    choices, usage = chunk.get("choices") or [{}], chunk.get("usage") or {}
    delta = choices[0].get("delta") or {}
    return delta.get("content") or "", usage.get("completion_tokens") or 0


@contextmanager
def _process(program: list[str], log: Path, packages: str = "") -> Iterator[Path]:
    places = [str(ROOT), packages, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    _give_back()
    with log.open("w") as file:
        process = subprocess.Popen(program, stdout=file, stderr=file, env=environment, cwd=ROOT)
    try:
        yield log
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _give_back() -> None:
    """Leave the device to the side that starts, which may ask for nearly all of it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _wait(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (OSError, urllib.error.URLError):
            time.sleep(0.5)
    raise RuntimeError(f"{url} did not answer in {START_S} s: {log.read_text()[-500:]}")


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def warmed(ask: Ask) -> float:
    """Ask once or twice before the clock runs; return the seconds of the last answer."""
    took = 0.0
    for message in ("warm up please", "once more then"):
        began = time.perf_counter()
        async for _ in ask(message, 8):
            pass
        took = time.perf_counter() - began
        await asyncio.sleep(0)
    return took
