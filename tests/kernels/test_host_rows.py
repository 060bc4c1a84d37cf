"""Rows of a table on the host: those of `embedding`, in plain torch and in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from raytune_ft.kernels.host_rows import gather, reads_host

pytestmark = pytest.mark.usefixtures("way")


@pytest.mark.parametrize("width", [1, 48, 2050])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_table(width: int, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(width)
    table = torch.randn(37, width, generator=random).to(dtype)
    ids = torch.randint(0, 37, (2, 5), generator=random)
    ids[0, 0], ids[1, 4] = 36, 0

    found = gather(table, ids)

    assert found.shape == (2, 5, width)
    assert torch.equal(found, table[ids])
    assert torch.equal(gather(table, ids.T, directly=False), table[ids.T])


def test_no_rows_and_one_id_of_a_decoding_step() -> None:
    table = torch.randn(5, 8)
    assert gather(table, torch.empty(0, dtype=torch.int64)).shape == (0, 8)
    assert torch.equal(gather(table, torch.tensor([[4]])), table[4].view(1, 1, 8))


def test_a_cpu_is_not_taken_for_a_device_that_reads_the_host() -> None:
    assert reads_host(torch.randn(5, 8), torch.device("cpu")) == "it is no GPU"
