"""What the tests of large sizes share: tensors of more than 2^31 elements on a GPU, small ones on a CPU."""

from __future__ import annotations

import pytest
import torch

from python_tests.gpu.devices import DEVICES

LAST = 3
ON_DEVICES = pytest.mark.parametrize(
    "device",
    [
        DEVICES[0],  # small: only to run the test's own code
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
)


def need(device: str, gibibytes: int) -> None:
    if device != "cuda":
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, has {free:.0f}")


def beyond_int32(rows: int, columns: int, device: str) -> int:
    if device == "cpu":
        return 5
    assert rows * columns > 2**31
    return rows


TOKENS, SLOTS, WIDTH = 40_000, 8, 7_168
EXPERTS = 16


def routes(device: str) -> tuple[int, int, torch.Tensor]:
    """Tokens, a width whose rows of experts are beyond 2^31 elements, and ids."""
    width = WIDTH if device == "cuda" else 24
    tokens = beyond_int32(TOKENS, SLOTS * WIDTH, device) if device == "cuda" else 20
    liking = torch.rand(tokens, EXPERTS, device=device)
    return tokens, width, liking.topk(SLOTS).indices


def both_ends(tokens: int) -> list[slice]:
    return [slice(0, LAST), slice(tokens - LAST, tokens)]
