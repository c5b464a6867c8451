"""The Triton kernels of moe_permute_quantize, run by Triton's interpreter on CPU tensors: the definition's bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grpo_kernels.moe_permute import ops
from grpo_kernels.testing import guard_input, guarded_allocations, poisoned_allocations
from python_tests.test_moe_permute import routes
from python_tests.test_moe_permute_quantize import check_bits, permutation_of

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("triton_on_cpu")]

FAR = (2**30, 2**31 - 1, 10**6)


@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("hidden", [1, 130, 1040])
def test_bits_of_the_two_functions(hidden: int, dtype: torch.dtype, power_of_two: bool) -> None:
    """Tokens of one program and of two, rows that are aligned and others; a NaN."""
    x = (torch.randn(5, hidden) * torch.exp(3 * torch.randn(5, hidden))).to(dtype)
    x[3, -1] = float("nan")
    check_bits(x, permutation_of(routes(5, 3, 4), 4, alignment=4), power_of_two_scales=power_of_two)


@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "plain"])
def test_the_transpose(power_of_two: bool) -> None:
    """Of an expert with more rows than a tile, of one without rows; padding behind the last segment."""
    ids = torch.zeros(150, 1, dtype=torch.int64)
    ids[::9] = 2
    x = torch.randn(150, 24).bfloat16()
    x[77, 20] = float("inf")
    check_bits(x, permutation_of(ids, 3, alignment=128), power_of_two_scales=power_of_two)


@pytest.mark.parametrize(
    "options", [{}, {"alignment": 128}, {"expert_range": (2, 4)}, {"expert_range": (6, 6)}], ids=str
)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (7, 1), (2, 12)])
def test_every_map(tokens: int, top_k: int, options: dict[str, Any]) -> None:
    """Fewer slots than a program works on together, and more; rows of which most are padding."""
    if tokens == 7 and options == {"alignment": 128}:
        options = {"alignment": 64}  # the transpose is slow here
    check_bits(torch.randn(tokens, 32).half(), permutation_of(routes(tokens, top_k, 6), 6, **options))


def test_views() -> None:
    permutation = permutation_of(routes(4, 2, 3, 0.0), 3)
    wide = torch.randn(4, 300)
    for x in (wide[:, 16:144], wide[:, 3:200], wide[:, ::2], wide[:1].expand(4, 300)):
        check_bits(x, permutation)


@pytest.mark.parametrize("columns", [False, True])
def test_entries_beyond_the_tensors_are_as_minus_one(columns: bool) -> None:
    """No row of experts R, no slot T * K: nothing is read or written there."""
    permutation = permutation_of(routes(5, 2, 2, 0.0), 2, alignment=128)
    x = torch.randn(5, 40)

    def run(*beyond: int) -> list[torch.Tensor]:
        row_id_map, inv_map = permutation.row_id_map.clone(), permutation.inv_map.clone()
        for place, entry in enumerate(beyond):
            inv_map[row_id_map[place, 0]] = entry
            row_id_map[place, 0] = entry
        with guarded_allocations(), poisoned_allocations():
            a, *maps = map(guard_input, (x, row_id_map, inv_map))
            found = ops.moe_permute_quantize(a, *maps, True, columns, 1e-12, "triton")
        return [t.view(torch.uint8 if t.element_size() == 1 else torch.int32) for t in found]

    expected = run(-1, -1, -1)
    assert not expected[0][permutation.row_id_map[:3, 0].long()].any()
    for found, wanted in zip(run(*FAR), expected, strict=True):
        assert torch.equal(found, wanted)


def test_quantize_config_depends_on_the_token_alone() -> None:
    from grpo_kernels.moe_permute._quantize_kernels_triton import quantize_config

    assert quantize_config(7168, 8) == (8, 8, 2)
    assert quantize_config(2880, 4) == (8, 4, 2)
    assert quantize_config(500, 1) == (4, 1, 1)
    assert quantize_config(0, 0) == (4, 1, 1)
    for hidden in (1, 128, 513, 65536):
        for top_k in (1, 3, 32):
            config = quantize_config(hidden, top_k)
            assert config.tiles * 128 == 16 * 32 * config.num_warps  # 16 elements a thread
            assert config.slots <= 8
