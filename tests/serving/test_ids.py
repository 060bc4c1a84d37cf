"""Ids over HTTP equal training's; `make soak` compares a thousand chats with every template."""

from __future__ import annotations

import asyncio

from raytune_ft.chat import ChatModel
from tests.soak.ids import differences


def test_served_ids_are_training_ids(endless: ChatModel) -> None:
    compared, found = asyncio.run(differences(endless, n_chats=6))
    assert found == []
    assert compared == 6 * 24
