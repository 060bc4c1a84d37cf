"""Forms that answer with fewer launches: logits of every family, passes of lanes, names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raytune_ft.model import lanes
from raytune_ft.model.fastpath import answering
from raytune_ft.model.fastpath.answering import AnsweringAttention, AnsweringMlp, AnsweringNorm
from tests.kernels.installed import FAMILIES, network

FORMS = (AnsweringNorm, AnsweringMlp, AnsweringAttention)
WITHOUT = {
    "starcoder": "no module of it has another form",  # LayerNorm, no gate, no rotation
}
IDS = (5, 9, 13, 2, 7, 31, 30, 12)


def parts_of(model: Any) -> list[str]:
    return [form.__name__ for form in FORMS if any(isinstance(m, form) for m in model.modules())]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    rows = torch.tensor([IDS, IDS[::-1]])
    return model(input_ids=rows, use_cache=False).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    model = network(family, tmp_path).eval()
    before, names = logits(model), list(model.state_dict())
    assert answering.quicken(model) == WITHOUT.get(family)
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    assert list(model.state_dict()) == names
    print(family, parts_of(model))


def test_a_llama_answers_in_all_forms(tmp_path: Path) -> None:
    model = network("Llama", tmp_path).eval()
    answering.quicken(model)
    assert parts_of(model) == [form.__name__ for form in FORMS]


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Mistral", "Phi3", "Gemma", "Glm4"])
def test_rows_side_by_side_are_those_of_plain_passes(family: str, tmp_path: Path) -> None:
    """Caches of lanes go through the forms: what a pass looks at is what was written."""
    plain, quick = (network(family, tmp_path).eval() for _ in range(2))
    assert answering.quicken(quick) is None
    found = []
    for model in (plain, quick):
        like = lanes.probed(model)
        with torch.no_grad():
            lane = lanes.Lane(model, like, 64, 2)
            for _ in range(2):
                lane.join([], 0)
            rows = [lane.extend([IDS[:3], IDS[3:8]])]
            rows += [lane.decode([4, 6 + n]) for n in range(5)]
        found.append(torch.stack(rows))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)


class KernelError(Exception):
    """As Triton's, which are no RuntimeError."""


def unturned(q: Any, k: Any, *_: Any, **__: Any) -> Any:
    return q, k


def failing(*_: Any, **__: Any) -> Any:
    raise KernelError("it does not compile")


@pytest.mark.parametrize(
    ("rope", "reason"),
    [
        (unturned, "its answers would differ by "),
        (failing, "KernelError: it does not compile"),
    ],
)
def test_what_differs_or_fails_is_put_back(
    rope: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network("Llama", tmp_path).eval()
    before = logits(model)
    monkeypatch.setattr(answering, "rope", rope)
    why = answering.quicken(model)
    assert why is not None and why.startswith(reason)
    assert parts_of(model) == []
    assert torch.equal(logits(model), before)
