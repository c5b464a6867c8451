"""Tensors in FP8 of more than 2^31 elements: the last rows must come out as they do alone."""

from __future__ import annotations

import pytest
import torch

import grpo_kernels
from grpo_kernels import ScaledTensor
from grpo_kernels.fp8_quantize.layout import tiles
from python_tests.fp8_products import widened
from python_tests.gpu.devices import assert_identical, assert_same_bits, kernel_backends
from python_tests.gpu.large import EXPERTS, ON_DEVICES, SLOTS, WIDTH, beyond_int32, both_ends, need, routes


@ON_DEVICES
@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_fp8_quantize(block: tuple[int, int], device: str) -> None:
    """Of the matrix and of its transpose; rows that tiles of 128 end with, as many as a multiple of 128 has."""
    need(device, 24)
    width = 2880
    rows = 128 * beyond_int32(2**31 // width // 128 + 2, 128 * width, device)
    x = torch.empty(rows, width, device=device, dtype=torch.bfloat16).normal_()
    plain, transposed = grpo_kernels.fp8_quantize(x, block, transpose="both")
    values = grpo_kernels.fp8_dequantize(plain)
    for which in (slice(0, 128), slice(rows - 128, rows)):
        with grpo_kernels.backend("reference"):
            one, turned = grpo_kernels.fp8_quantize(x[which], block, transpose="both")
        tile = slice(which.start // 128, which.stop // 128)
        scales = plain.scale[which] if block[0] == 1 else plain.scale[tile]
        assert_identical([plain.data[which], scales], [one.data, one.scale])
        assert_identical([transposed.data[:, which], transposed.scale[:, tile]], [turned.data, turned.scale])
        assert_identical([values[which]], [grpo_kernels.fp8_dequantize(one)])


@ON_DEVICES
def test_moe_permute_quantize(device: str) -> None:
    need(device, 24)
    tokens, width, ids = routes(device)
    x = torch.empty(tokens, width, device=device, dtype=torch.bfloat16).normal_()
    permutation = grpo_kernels.build_permutation(ids, EXPERTS, alignment=128)
    alone = grpo_kernels.moe_permute_quantize(x, permutation)
    rows, transposed = grpo_kernels.moe_permute_quantize(x, permutation, transpose="both")
    assert_identical([rows.scale, rows.data.view(torch.uint8)], [alone.scale, alone.data.view(torch.uint8)])
    for which in both_ends(tokens):
        places = permutation.row_id_map[which].long()
        few = grpo_kernels.fp8_quantize(x[which])
        copies = few.data.view(torch.uint8)[:, None].expand(-1, SLOTS, -1)
        assert_identical([alone.data.view(torch.uint8)[places]], [copies])
        assert_identical([alone.scale[places]], [few.scale[:, None].expand(-1, SLOTS, -1)])
    last = permutation.offsets[-1] - 128 + torch.arange(128, device=device)
    slots = permutation.inv_map[last]
    tile = torch.where((slots >= 0)[:, None], x[slots.clamp(min=0) // SLOTS], 0.0)
    few = grpo_kernels.fp8_quantize(tile, transpose=True)
    assert_identical([transposed.data.view(torch.uint8)[:, last]], [few.data.view(torch.uint8)])
    assert_identical([transposed.scale[:, last[:1] // 128]], [few.scale])


@ON_DEVICES
def test_fp8_grouped_gemm(device: str) -> None:
    """Rows, result and weights are all of more than 2^31 elements: the last rows come out as they do alone."""
    need(device, 16)
    rows, width, experts = (2**20 + 200, 2176, 460) if device == "cuda" else (40, 24, 9)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 0x70, shape, device=device, dtype=torch.uint8).view(torch.float8_e4m3fn)

    x = ScaledTensor(codes(rows, width), torch.rand(tiles(width), rows, device=device).t())
    blocks = (tiles(width), tiles(width))
    weight = ScaledTensor(codes(experts, width, width), torch.rand(experts, *blocks, device=device))
    bias = torch.randn(experts, width, device=device)
    assert device == "cpu" or min(rows * width, experts * width * width) > 2**31
    offsets = torch.arange(rows - 5 - experts + 2, rows - 5 + 1, device=device)
    offsets = torch.cat([offsets, offsets.new_tensor([rows])])
    out = grpo_kernels.grouped_gemm(x, weight, offsets, bias=bias)
    ends = (ScaledTensor(x.data[-5:], x.scale[-5:]), ScaledTensor(weight.data[-1:], weight.scale[-1:]))
    assert_identical([out[-5:]], [grpo_kernels.grouped_gemm(*ends, offsets[:1] * 0 + 5, bias=bias[-1:])])
    exact = widened(ends[0], torch.float32) @ widened(ends[1], torch.float32)[0].T + bias[-1]
    torch.testing.assert_close(out[-5:].float(), exact, rtol=2.0**-7, atol=0)


@ON_DEVICES
@pytest.mark.parametrize("large", ["rows", "result"])
def test_fp8_grouped_gemm_wgrad(large: str, device: str) -> None:
    """The last expert's rows alone, behind those of others; or the last of many experts, most of them without any."""
    need(device, 24)
    shape = {"rows": (299_648, 4, WIDTH, 64), "result": (512, 300, 2_688, 2_688)}[large]
    rows, experts, width, columns = shape if device == "cuda" else (384, 4, 24, 8)
    assert device == "cpu" or max(rows * width, experts * width * columns) > 2**31

    def operand(height: int) -> torch.Tensor:
        return grpo_kernels.fp8_quantize(torch.randn(height, rows, device=device, dtype=torch.bfloat16))

    x, grad = operand(width), operand(columns)
    offsets = torch.full((experts,), rows - 128, device=device, dtype=torch.int32)
    offsets[0], offsets[-1] = 128, rows
    wgrad = torch.ops.grpo_kernels.fp8_grouped_gemm_wgrad
    backend = kernel_backends("grouped_gemm", device)[0]
    whole = wgrad(*x, *grad, offsets, torch.bfloat16, backend)
    last = [ScaledTensor(part.data[:, -128:].contiguous(), part.scale[:, -1:].contiguous()) for part in (x, grad)]
    alone = wgrad(*last[0], *last[1], offsets[:1] * 0 + 128, torch.bfloat16, backend)
    assert_identical([whole[-1]], [alone[0]])


@ON_DEVICES
def test_moe_glu_quantize(device: str) -> None:
    """Both ways, with everything that they give: the last rows come out as they do alone, in tiles of their own."""
    need(device, 30)
    rows, width = (299_648, WIDTH // 2) if device == "cuda" else (384, 12)
    assert device == "cpu" or 2 * rows * width > 2**31
    preact = torch.empty(rows, 2 * width, device=device, dtype=torch.bfloat16).normal_()
    grad = torch.empty(rows, width, device=device, dtype=torch.bfloat16).normal_()
    slots, weights = torch.arange(rows, device=device, dtype=torch.int32), torch.rand(rows, 1, device=device)
    glu, back = torch.ops.grpo_kernels.moe_glu_quantize, torch.ops.grpo_kernels.moe_glu_backward_quantize
    kind, backend = (False, 1.0, 1.0, False), kernel_backends("moe_experts", device)[0]

    def run(which: slice) -> list[torch.Tensor]:
        own = slots[which] - which.start
        data, scale, kept, kept_scale = glu(preact[which], own, *kind, True, 1e-12, backend)
        operands = (kept, kept_scale, grad[which], own, weights[which], None, *kind)
        return [data, scale, kept, kept_scale, *back(*operands, *(True,) * 6, 1e-12, 1e-30, torch.bfloat16, backend)]

    whole = run(slice(0, rows))
    for which in (slice(0, 128), slice(rows - 128, rows)):
        tile, alone = slice(which.start // 128, which.stop // 128), run(which)
        places = (
            [which] * 6
            + [(slice(None), which), (slice(None), tile), which]
            + [(slice(None), which), (slice(None), tile)]
        )
        for found, place, expected in zip(whole, [*places, which, which], alone, strict=True):
            assert_same_bits([found[place].contiguous()], [expected.contiguous()])
