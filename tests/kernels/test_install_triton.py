"""The fast path's forms over the kernels themselves, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kernels.installed import batches, gradients, least_cosine, made


@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("family", ["internlm", "chatglm", "starcoder", "Gemma2"])
def test_a_step_by_kernels_is_the_plain_way_s(family: str, tmp_path: Path) -> None:
    found = []
    for fast in (False, True):
        model, loss, _ = made(family, tmp_path, fast)
        model.eval()  # StarCoder's dropouts
        value = batches(length=9)[0].loss(loss)
        value.backward()
        found.append((value.item(), gradients(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    assert least_cosine(found[1][1], found[0][1]) > 0.99999
