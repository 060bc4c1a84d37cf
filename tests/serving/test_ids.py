"""Training ids are serving ids: what an engine runs is the training row up to its answer."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from raytune_ft.chat import ChatModel, Sampling
from raytune_ft.data.encode import IGNORE_INDEX, encode_conversation
from raytune_ft.data.segments import Conversation
from raytune_ft.data.templating.templates import get_template, template_names
from raytune_ft.serving.engine import ChatEngine
from raytune_ft.serving.engines.batched import BatchedEngine
from tests.conftest import WORDS

ODD = [
    "", " ", "\n", "\n\n", "  two", "tail ", "<|im_start|>", "<|im_end|>", "</s>", "<s>", "[INST]",
    "<|im_end", "好", "é", "🙂", "e\u0301", "\u200b", "{{ x }}", "{% raw %}", "\t", "0", "a" * 40,
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


def text(drawn: random.Random) -> str:
    parts = [
        drawn.choice(ODD if drawn.random() < 0.3 else WORDS) for _ in range(drawn.randint(1, 9))
    ]
    return drawn.choice(["", " "]).join(parts)


def chats(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
    """Draw conversations of one to four turns that end with an answer, some with a system text."""
    drawn = random.Random(seed)
    for _ in range(count):
        messages = (
            [{"role": "system", "content": text(drawn) + "."}] if drawn.random() < 0.4 else []
        )
        for _turn in range(drawn.randint(1, 4)):
            messages.append({"role": "user", "content": text(drawn) + "?"})
            messages.append({"role": "assistant", "content": text(drawn) + "!"})
        yield messages


def served(chat: ChatModel, name: str) -> BatchedEngine:
    return BatchedEngine(replace(chat, template=get_template(name, chat.tokenizer)))


def differences(engine: BatchedEngine, count: int) -> list[list[dict[str, str]]]:
    """Return the conversations whose prompt is not what training has before the last answer."""
    chat, wrong = engine._models.chat(None), []
    for messages in chats(count, seed=count):
        prompt = engine.encode(messages[:-1])
        row = encode_conversation(Conversation(messages), chat.template, chat.tokenizer)
        targets = (row.labels != IGNORE_INDEX).nonzero()[0]
        first = targets[targets >= len(prompt)][:1].tolist()
        if first != [len(prompt)] or not np.array_equal(row.input_ids[: len(prompt)], prompt):
            wrong.append(messages)
    return wrong


@pytest.mark.parametrize("name", template_names())
def test_a_prompt_is_the_training_row_up_to_its_answer(endless: ChatModel, name: str) -> None:
    engine = served(endless, name)
    try:
        assert differences(engine, 15) == []
    finally:
        engine.close()


@pytest.mark.exact
@pytest.mark.parametrize("name", template_names())
def test_of_1000_chats_none_differs(endless: ChatModel, name: str) -> None:
    engine = served(endless, name)
    try:
        assert differences(engine, 1000) == []
    finally:
        engine.close()


def test_what_is_encoded_is_what_the_model_runs(endless: ChatModel) -> None:
    seen: list[list[int]] = []
    engine: ChatEngine = served(endless, "tokenizer")
    ids = engine.encode([{"role": "user", "content": "red river?"}], tools=TOOLS[:0])
    words = endless.model.get_input_embeddings()
    hook = words.register_forward_pre_hook(lambda _module, inputs: seen.extend(inputs[0].tolist()))

    async def ask() -> None:
        async for _ in engine.submit(ids, Sampling(temperature=0.0, max_new_tokens=1)):
            pass

    asyncio.run(ask())
    hook.remove()
    engine.close()
    assert seen == [ids]


def test_plain_text_is_encoded_as_pre_training_has_it(endless: ChatModel) -> None:
    engine = served(endless, "tokenizer")
    tokenizer = endless.tokenizer
    for content in (*ODD[1:], "red river <|im_end|> blue"):
        lone = Conversation([{"role": "assistant", "content": content}])
        row = encode_conversation(lone, endless.template, tokenizer).input_ids.tolist()
        assert engine.encode_text(content) == row[:-1]
        assert row[-1] == tokenizer.eos_id
    engine.close()
