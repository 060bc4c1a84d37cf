"""Answering: prompts in while a model is in training, the same answers out on every rank.

Ranks share the prompts. A rank that has written its share waits for the others in small
exchanges, so that none waits longer than it takes to write a few tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from raytune_ft.data.templating.templates import Template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.model.answers import GREEDY, Answer, Drawing, answer_all
from raytune_ft.training.engine import Engine, rank, world_size

TOKENS_PER_EXCHANGE = 16
_NOT_MINE = -1


@dataclass(frozen=True)
class Voice:
    """Everything needed to ask the model in training a question."""

    model: nn.Module
    tokenizer: TextTokenizer
    template: Template
    engine: Engine

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        drawing: Drawing = GREEDY,
        seeds: Sequence[int | None] = (),
    ) -> list[Answer]:
        """Answer encoded prompts; every rank has to call it, and gets all answers.

        Args:
            prompts: ids, the same on every rank.
            max_new_tokens: ids of an answer at most.
            drawing: how tokens are chosen.
            seeds: one per prompt, where tokens are drawn; None for one that is answered greedily.
        """
        mine = range(rank(), len(prompts), world_size())
        company = _Company(self.engine.device)
        with self.engine.whole():
            found = answer_all(
                self.model,
                [prompts[place] for place in mine],
                stop_ids=self.template.stop_ids,
                max_new_tokens=max_new_tokens,
                drawing=drawing,
                seeds=[seeds[place] for place in mine] if seeds else (),
                after_token=company.token,
            )
            company.finish()
        answers = dict(zip(mine, found, strict=True))
        if world_size() == 1:
            return found
        return _exchanged(answers, len(prompts), self.engine.device)

    def text(self, answer: Answer) -> str:
        """Return an answer as people read it, without half a character where it was cut."""
        text = self.tokenizer.decode(answer.ids)
        return (text.rstrip("\ufffd") if answer.stopped == "length" else text).strip()


class _Company:
    """Keeps ranks that write answers of different lengths in touch.

    Every rank makes the same exchanges: one per so many tokens, and then more until none writes.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.tokens = device, 0

    def token(self) -> None:
        """Note that this rank has written another token."""
        self.tokens += 1
        if self.tokens % TOKENS_PER_EXCHANGE == 0:
            self._writing(here=True)

    def finish(self) -> None:
        """Wait until no rank is writing any more."""
        while self._writing(here=False):
            pass

    def _writing(self, *, here: bool) -> bool:
        if world_size() == 1:
            return False
        flag = torch.tensor([int(here)], device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def _exchanged(answers: dict[int, Answer], total: int, device: torch.device) -> list[Answer]:
    """Give every rank the answers of all: numbers alone, by the one exchange of a table."""
    longest = torch.tensor([max((len(a.ids) for a in answers.values()), default=0)], device=device)
    dist.all_reduce(longest, op=dist.ReduceOp.MAX)
    table = torch.full((total, int(longest) + 2), _NOT_MINE, device=device)
    for place, answer in answers.items():
        row = [len(answer.ids), int(answer.stopped == "end"), *answer.ids]
        table[place, : len(row)] = torch.tensor(row, device=device)
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return [
        Answer(ids[:size], "end" if ended else "length") for size, ended, *ids in table.tolist()
    ]
