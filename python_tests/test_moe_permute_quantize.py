"""moe_permute_quantize: the bits of moe_permute and fp8_quantize, one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import (
    Permutation,
    ScaledTensor,
    build_permutation,
    fp8_dequantize,
    fp8_quantize,
    moe_permute,
    moe_permute_quantize,
)
from grpo_kernels.testing import guard_input, guarded_allocations, poisoned_allocations
from python_tests.test_moe_permute import routes

pytestmark = pytest.mark.usefixtures("backend")

NAN = float("nan")


def permutation_of(ids: Tensor, experts: int, **options: Any) -> Permutation:
    with grpo_kernels.backend("reference"):
        return build_permutation(ids, experts, **options)


def assert_same(actual: ScaledTensor, expected: ScaledTensor) -> None:
    """Shapes, strides and all bits: one NaN of a kind."""
    for a, b, raw in zip(actual, expected, (torch.uint8, torch.int32), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
        assert torch.equal(a.view(raw), b.view(raw))


def check_bits(x: Tensor, permutation: Permutation, **options: Any) -> None:
    """Against the two definitions; with segments of 128 rows also the transpose."""
    ends = [permutation.inv_map.shape[0], *permutation.offsets.tolist()]
    forms: list[Any] = [False] if any(end % 128 for end in ends) else [False, "both"]
    for transpose in forms:
        with grpo_kernels.backend("reference"):
            expected = fp8_quantize(moe_permute(x, permutation), transpose=transpose, **options)
        with guarded_allocations(), poisoned_allocations():
            maps = [guard_input(tensor) for tensor in permutation]
            found = moe_permute_quantize(guard_input(x), Permutation(*maps), transpose=transpose, **options)
        if transpose:
            assert_same(found[1], expected[1])
            found, expected = found[0], expected[0]
        assert_same(found, expected)


@pytest.mark.parametrize("power_of_two", [True, False], ids=["powers of two", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("hidden", [1, 40, 130, 272])
def test_bits_of_the_two_functions(hidden: int, dtype: torch.dtype, power_of_two: bool) -> None:
    x = (torch.randn(6, hidden) * torch.exp(3 * torch.randn(6, hidden))).to(dtype)
    for options in ({}, {"alignment": 4}, {"alignment": 128}, {"alignment": 8, "expert_range": (2, 4)}):
        permutation = permutation_of(routes(6, 3, 4), 4, **options)
        check_bits(x, permutation, power_of_two_scales=power_of_two)


@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1, 1), (40, 2), (3, 12), (150, 1)])
def test_every_map(tokens: int, top_k: int) -> None:
    """No tokens, more slots than a program works on together, an expert with more rows than a tile."""
    ids = routes(tokens, top_k, 3)
    if tokens == 150:
        ids[:] = 1
    for alignment in (1, 128):
        check_bits(torch.randn(tokens, 144).bfloat16(), permutation_of(ids, 3, alignment=alignment), eps=1e-4)
    nowhere = permutation_of(ids, 3, alignment=128, expert_range=(3, 3))
    check_bits(torch.randn(tokens, 144), nowhere)


def test_no_columns() -> None:
    permutation = permutation_of(routes(4, 2, 3), 3, alignment=128)
    check_bits(torch.randn(4, 0), permutation)


def test_padding_is_zero_with_the_scale_of_zeros() -> None:
    permutation = permutation_of(routes(5, 2, 2), 4, alignment=128)
    padding = permutation.inv_map < 0
    plain, transposed = moe_permute_quantize(torch.randn(5, 200), permutation, transpose="both", eps=2.0**-10)
    assert not plain.data.view(torch.uint8)[padding].any()
    assert not transposed.data.view(torch.uint8)[:, padding].any()
    smallest = torch.tensor(2.0**-18)  # 2^-10 <= 448 * 2^-18, and not 448 * 2^-19
    assert torch.equal(plain.scale[padding], smallest.expand(int(padding.sum()), 2))
    empty = padding.view(-1, 128).all(1)
    assert empty.any()
    assert torch.equal(transposed.scale[:, empty], smallest.expand(200, int(empty.sum())))


def test_nan_stays_in_its_tile() -> None:
    """Of a token: in its rows alone. In the transpose: of the 128 rows of its expert, that column alone."""
    ids = torch.tensor([[0, 1], [1, 2], [2, 0]])
    permutation = permutation_of(ids, 3, alignment=128)
    x = torch.randn(3, 300)
    x[1, 140] = NAN
    plain, transposed = moe_permute_quantize(x, permutation, transpose="both")
    spoiled = torch.zeros(permutation.inv_map.shape[0], 300, dtype=torch.bool)
    spoiled[permutation.row_id_map[1].long(), 128:256] = True
    assert torch.equal(fp8_dequantize(plain).isnan(), spoiled)
    column = torch.zeros(300, spoiled.shape[0], dtype=torch.bool)
    column[140, 128:384] = True
    assert torch.equal(fp8_dequantize(transposed).isnan(), column)


def test_views_are_read_where_they_lie() -> None:
    permutation = permutation_of(routes(4, 2, 3), 3, alignment=128)
    wide = torch.randn(4, 300)
    for x in (wide[:, 16:144], wide[:, 3:200], wide[:, ::2], wide[:1].expand(4, 300)):
        check_bits(x, permutation)


def test_the_transpose_belongs_to_the_experts() -> None:
    """Every column of an expert's segment is quantised by itself: what other experts hold does not matter."""
    ids = torch.tensor([[0], [1], [0], [1]])
    permutation = permutation_of(ids, 2, alignment=128)
    x = torch.randn(4, 24)
    _, one = moe_permute_quantize(x, permutation, transpose="both")
    x[1] *= 1e6
    _, other = moe_permute_quantize(x, permutation, transpose="both")
    assert torch.equal(one.data[:, :128].view(torch.uint8), other.data[:, :128].view(torch.uint8))
    assert torch.equal(one.scale[:, 0], other.scale[:, 0])
    assert not torch.equal(one.scale[:, 1], other.scale[:, 1])


def test_what_requires_a_gradient_is_taken_by_value() -> None:
    permutation = permutation_of(routes(4, 2, 3), 3)
    x = torch.randn(4, 24, requires_grad=True)
    found = moe_permute_quantize(x, permutation)
    assert not found.data.requires_grad
    assert not found.scale.requires_grad
    assert_same(found, moe_permute_quantize(x.detach(), permutation))


def test_maps_that_do_not_belong_together_raise() -> None:
    permutation = permutation_of(routes(4, 2, 3, 0.0), 3, alignment=128)
    inv_map = permutation.inv_map.clone()
    inv_map[0] = 100
    for transpose in (False, "both"):
        with pytest.raises(ValueError, match=r"moe_permute: permutation.inv_map\[0\] must be < T \* K = 8"):
            moe_permute_quantize(torch.randn(4, 24), permutation._replace(inv_map=inv_map), transpose=transpose)
