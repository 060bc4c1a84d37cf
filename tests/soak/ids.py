"""Ids that the server makes of messages over HTTP, beside those of training (G7).

Every template of XTuner's and every chat family; chats with system texts or without, of one to
six turns, in any script, with words of special tokens among them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx

from raytune_ft.chat import ChatModel, Piece, Sampling
from raytune_ft.data.encode import encode_conversation
from raytune_ft.data.segments import Conversation
from raytune_ft.data.templating.prompts import PROMPTS
from raytune_ft.data.templating.templates import get_template
from raytune_ft.serving.api import build_api
from raytune_ft.serving.engine import ChatEngine, PieceStream
from raytune_ft.serving.guard import GuardRules
from raytune_ft.serving.options import ApiOptions
from tests.data.chat_families import FAMILIES

WORDS = [
    "red", "blue river", "你好", "请", "été", "🙂", "👩‍👩‍👧", "مرحبا", "<|im_end|>", "<s>", "</s>",
    "[INST]", "\n", "\n\n", "  ", "\t", "{input}", "{{ x }}", "a\u0301", "\u200d", "0", "-1.5e3",
    "def f(x):\n    return x", "«»", "\u00a0", "ﬁ", "I'm", "don't",
]  # fmt: skip


class Capturing(ChatEngine):
    """Encodes as the embedded engine does, keeps the ids, and has nothing to say."""

    def __init__(self, chat: ChatModel) -> None:
        self.name, self.context = chat.name, 10**6
        self._chat = chat
        self.ids: list[list[int]] = []

    def encode(self, messages: Any, *, model: Any = None, tools: Any = None) -> list[int]:
        return self._chat.encode(messages, tools or ())

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, model: Any = None
    ) -> PieceStream:
        import asyncio

        self.ids.append(list(prompt_ids))
        out: asyncio.Queue[Any] = asyncio.Queue()
        out.put_nowait(Piece("", 0, "stop"))
        return PieceStream(out, lambda: None)

    def healthy(self) -> bool:
        return True

    def close(self) -> None:
        """Nothing to stop."""


def speakers(chat: ChatModel) -> Iterator[tuple[str, ChatModel]]:
    """Yield the model under every template there is."""
    for name in PROMPTS:
        yield name, replace(chat, template=get_template(name, chat.tokenizer))
    for name, family in FAMILIES.items():
        tokenizer = family.tokenizer(chat.tokenizer)
        template = get_template("tokenizer", tokenizer)
        yield f"{name}'s own", replace(chat, tokenizer=tokenizer, template=template)


def made_chat(draw: random.Random) -> list[dict[str, str]]:
    """Make a conversation that ends with a question."""

    def text() -> str:
        return "q" + "".join(draw.choice(WORDS) + draw.choice(["", " "]) for _ in range(9))

    turns = []
    if draw.random() < 0.5:
        turns.append({"role": "system", "content": text()})
    for _ in range(draw.randrange(0, 6)):
        turns += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
    return [*turns, {"role": "user", "content": text()}]


async def differences(chat: ChatModel, n_chats: int, seed: int = 0) -> tuple[int, list[str]]:
    """Send chats; return how many were compared, and a line for each that differs.

    A template may refuse a chat (`422`), if training refuses it too.
    """
    compared, found = 0, []
    for name, speaker in speakers(chat):
        draw = random.Random(f"{seed} {name}")
        engine = Capturing(speaker)
        app = build_api(engine, GuardRules(), ApiOptions(access_log="/dev/null"))
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for number in range(n_chats):
                messages = made_chat(draw)
                engine.ids.clear()
                body = {"model": engine.name, "messages": messages}
                response = await client.post("/v1/chat/completions", json=body)
                row = [*messages, {"role": "assistant", "content": "x"}]
                trained = encode_conversation(
                    Conversation(speaker.with_system(row)), speaker.template, speaker.tokenizer
                ).input_ids.tolist()
                served = engine.ids[0] if engine.ids else []
                compared += 1
                if response.status_code != 200 or trained[: len(served)] != served or not served:
                    found.append(f"{name} {number}: {response.status_code} {messages}")
    return compared, found
