"""FP8 products on a GPU in graphs whose offsets change. Random problems: test_fuzz.py; large ones: test_sizes.py."""

from __future__ import annotations

import pytest
import torch

import grpo_kernels
from grpo_kernels.fp8_quantize import ScaledTensor
from python_tests.fp8_products import problem
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
