"""A scripted engine behind a real server, and a real browser in front of it."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from raytune_ft.chat import Piece, Sampling
from raytune_ft.serving.engine import ChatEngine, EngineBusyError, PieceStream

CHROMIUM = shutil.which("chromium")
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


class Scripted(ChatEngine):
    """Says what the test wants, to see what the page makes of it."""

    context = 100

    def __init__(self, *names: str) -> None:
        self._names = names or ("scripted",)
        self.name = self._names[0]
        self.answer = "ok"
        self.endless = False
        self.busy = False
        self.asked: list[list[dict[str, str]]] = []
        self.sampled: list[tuple[str | None, Sampling]] = []
        self.cancelled = threading.Event()

    def models(self) -> tuple[str, ...]:
        return self._names

    def encode(
        self,
        messages: Sequence[dict[str, Any]],
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        self.asked.append(list(messages))
        return [0] * sum(len(m["content"]) for m in messages)

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, model: str | None = None
    ) -> PieceStream:
        if self.busy:
            raise EngineBusyError("2 requests wait already; try again later")
        self.sampled.append((model, sampling))
        out: asyncio.Queue[Any] = asyncio.Queue()
        text = self.answer.replace("MODEL", model or self.name)
        for count, start in enumerate(range(0, len(text), 3), start=1):
            out.put_nowait(Piece(text[start : start + 3], count))
        if not self.endless:
            out.put_nowait(Piece("", 9, "stop"))
            out.put_nowait(None)
        return PieceStream(out, self.cancelled.set)

    def healthy(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to stop."""


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
def open_page(tmp_path: Path) -> Iterator[Any]:
    """Return a function that opens a URL; any error on the page fails the test."""
    problems: list[str] = []
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no chromium found; apt-get install chromium runs the page tests")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch_persistent_context(
            str(tmp_path / "profile"), executable_path=CHROMIUM, args=FLAGS
        )

        def opened(url: str) -> Any:
            page = browser.new_page()
            page.set_default_timeout(15_000)
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.on("dialog", lambda dialog: problems.append(f"dialog: {dialog.message}"))
            page.goto(url)
            return page

        yield opened
        browser.close()
    assert problems == []


def say(page: Any, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def answered(page: Any, count: int = 1) -> list[str]:
    """Wait for `count` finished answers and return their texts."""
    page.wait_for_function(
        "n => document.querySelectorAll('.assistant:not(.writing, .failed) .text').length === n",
        arg=count,
    )
    return list(page.locator(".assistant:not(.failed) .text").all_inner_texts())
