"""FP8 products on a GPU: graphs whose offsets change, and the largest sizes. Random problems: test_fuzz.py."""

from __future__ import annotations

import pytest
import torch

import grpo_kernels
from grpo_kernels.fp8_quantize import ScaledTensor
from python_tests.fp8_products import problem, widened
from python_tests.gpu.devices import placed


@pytest.mark.gpu
def test_no_synchronisation_and_a_graph() -> None:
    p = problem([300, 300, 900], 1000, 256, 256)
    x, weight = (ScaledTensor(*(placed(part, "cuda") for part in scaled)) for scaled in (p.x, p.weight))
    offsets, bias = p.offsets.cuda(), torch.randn(3, 256, device="cuda")

    def product() -> torch.Tensor:
        return grpo_kernels.grouped_gemm(x, weight, offsets, bias=bias)

    wanted = product()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        product()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = product()
    offsets.copy_(torch.tensor([100, 200, 1000]))
    expected = product()
    graph.replay()
    assert torch.equal(result, expected)
    assert not torch.equal(result, wanted)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """Of rows, of the result and of weights: the last ones come out as they do alone."""
    if torch.cuda.mem_get_info()[0] < 16 * 2**30:
        pytest.skip("needs 16 GiB of free GPU memory")
    rows, width, columns, experts = 2**20 + 200, 2176, 2176, 460

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 0x70, shape, device="cuda", dtype=torch.uint8).view(torch.float8_e4m3fn)

    x = ScaledTensor(codes(rows, width), torch.rand(17, rows, device="cuda").t())
    weight = ScaledTensor(codes(experts, columns, width), torch.rand(experts, 17, 17, device="cuda"))
    assert min(rows * width, rows * columns, experts * columns * width) > 2**31
    offsets = torch.full((experts,), rows - 5, device="cuda")
    offsets[-1] = rows
    offsets[:-1] -= torch.arange(experts - 2, -1, -1, device="cuda")
    out = grpo_kernels.grouped_gemm(x, weight, offsets)
    ends = (ScaledTensor(x.data[-5:], x.scale[-5:]), ScaledTensor(weight.data[-1], weight.scale[-1]))
    rows_alone, weight_alone = (widened(end, torch.float32) for end in ends)
    torch.testing.assert_close(out[-5:].float(), rows_alone @ weight_alone.T, rtol=2.0**-7, atol=0)
