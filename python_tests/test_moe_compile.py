"""A routed layer under torch.compile's default backend, trained: contract tests stop before the code is generated."""

from __future__ import annotations

import torch
from torch import Tensor

import grpo_kernels


def _layer(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    route = grpo_kernels.moe_router(x @ router.T, 2, aux_loss_coef=0.1)
    y = grpo_kernels.moe_experts(x, gate_up, down, route, gate_up_bias=bias)
    maps = grpo_kernels.build_permutation(route.topk_ids, len(down))
    rows = grpo_kernels.grouped_gemm(grpo_kernels.moe_permute(x, maps), down.mT, maps.offsets)
    return y, grpo_kernels.moe_unpermute(rows, maps, route.topk_weights).sum() + route.aux_loss


def _train(function: object, *, tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 16), (4, 16), (4, 24, 16), (4, 16, 12), (4, 24))
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    y, loss = function(*leaves)  # type: ignore[operator]
    return [y.detach(), loss.detach(), *torch.autograd.grad((y * y.detach().cos()).sum() + loss, leaves)]


def test_a_layer_trains_under_inductor() -> None:
    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs.clear()
    compiled = torch.compile(_layer, fullgraph=True)
    for tokens in (9, 14, 33):
        for ours, eager in zip(_train(compiled, tokens=tokens), _train(_layer, tokens=tokens), strict=True):
            torch.testing.assert_close(ours, eager)
    assert graphs["unique_graphs"] <= 2


def test_experts_in_fp8_train_under_inductor_without_a_graph_for_each_length() -> None:
    """Row counts that are multiples of four and others: scales of one length and of a longer one."""
    generator = torch.Generator().manual_seed(0)
    gate_up, down = (torch.randn(shape, generator=generator) * 0.1 for shape in ((4, 64, 136), (4, 136, 32)))

    def experts(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        return grpo_kernels.moe_experts(x, gate_up, down, (weights, ids), recipe="fp8_block128")

    graphs = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    graphs.clear()
    compiled = torch.compile(experts, fullgraph=True)
    for tokens in (40, 41, 42, 44):
        x, upstream = (torch.randn(tokens, 136, generator=generator) for _ in range(2))
        weights, ids = torch.rand(tokens, 2, generator=generator), torch.randint(4, (tokens, 2), generator=generator)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, gate_up, down, weights)]
        found, expected = (
            torch.autograd.grad(function(*leaves, ids), leaves, upstream) for function in (compiled, experts)
        )
        for ours, eager in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, eager)
    assert graphs["unique_graphs"] <= 2
