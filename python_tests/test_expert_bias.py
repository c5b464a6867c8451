"""update_expert_bias: the step of every bias, its exact comparison, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from grpo_kernels import update_expert_bias


def test_experts_with_few_tokens_rise_and_those_with_many_fall() -> None:
    bias = torch.tensor([0.5, -0.25, 0.0, 1.0])
    update_expert_bias(bias, torch.tensor([10, 4, 6, 4], dtype=torch.int32), rate=0.125)
    assert torch.equal(bias, torch.tensor([0.375, -0.125, 0.0, 1.125]))  # the mean is 6: the third stays


def test_loads_are_compared_exactly() -> None:
    """The mean of these loads is 2^25 + 2/3: in float32 it is that of the first two."""
    bias = torch.zeros(3)
    update_expert_bias(bias, torch.tensor([2**25, 2**25, 2**25 + 2]), rate=1.0)
    assert bias.tolist() == [1.0, 1.0, -1.0]
    bias.zero_()
    update_expert_bias(bias, torch.full((3,), 2**31 - 1, dtype=torch.int32), rate=1.0)  # the sum needs more than int32
    assert bias.tolist() == [0.0, 0.0, 0.0]


def test_no_tokens_change_nothing() -> None:
    bias = torch.tensor([0.5, -0.5])
    update_expert_bias(bias, torch.zeros(2, dtype=torch.int32))
    assert bias.tolist() == [0.5, -0.5]


def test_layers_stacked_are_updated_each_by_its_own_mean() -> None:
    bias = torch.zeros(2, 2, dtype=torch.float64)
    loads = torch.tensor([[1, 3], [30, 10]])
    update_expert_bias(bias, loads, rate=torch.tensor(1e-3, dtype=torch.float64))
    assert bias.tolist() == [[1e-3, -1e-3], [-1e-3, 1e-3]]
    assert loads.tolist() == [[1, 3], [30, 10]]


@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_step_is_of_the_dtype_of_the_bias(default: torch.dtype, dtype: torch.dtype) -> None:
    before = torch.get_default_dtype()
    bias = torch.zeros(3, dtype=dtype)
    torch.set_default_dtype(default)
    try:
        update_expert_bias(bias, torch.tensor([0, 1, 2]), rate=1e-3)
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(bias, torch.tensor([1e-3, 0.0, -1e-3], dtype=dtype))


def test_a_backward_that_needs_the_old_bias_notices() -> None:
    bias, x = torch.zeros(2), torch.ones(2, requires_grad=True)
    loss = (x * bias).sum()
    update_expert_bias(bias, torch.tensor([1, 3]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_repeated_updates_balance_a_skewed_router() -> None:
    """The loads of a fixed batch whose logits prefer some experts come close to each other."""
    from grpo_kernels import moe_router

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 8, generator=generator) + torch.linspace(-1, 1, 8)
    bias = torch.zeros(8)
    shares = []
    for _ in range(200):
        output = moe_router(logits, 2, scoring_func="sigmoid", e_score_correction_bias=bias)
        shares.append(float(output.tokens_per_expert.max()) / (2 * 512 / 8))
        update_expert_bias(bias, output.tokens_per_expert, rate=5e-3)
    assert shares[0] > 2.0
    assert max(shares[-10:]) < 1.1


CPU_LOADS = torch.tensor([1, 2, 3])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: update_expert_bias([0.0], CPU_LOADS), TypeError, "bias must be a torch.Tensor, got list"),  # type: ignore[arg-type]
        (lambda: update_expert_bias(torch.zeros(3).bfloat16(), CPU_LOADS), TypeError, "got bfloat16: steps of 1e-3"),
        (lambda: update_expert_bias(torch.zeros(()), CPU_LOADS), ValueError, r"\[..., E\], got \[\]"),
        (lambda: update_expert_bias(torch.zeros(3), torch.ones(3)), TypeError, "must have dtype int64, int32, got"),
        (lambda: update_expert_bias(torch.zeros(4), CPU_LOADS), ValueError, r"\[..., E\] = \[4\], got \[3\]"),
        (lambda: update_expert_bias(torch.zeros(3), CPU_LOADS, -1.0), ValueError, "rate must be finite and >= 0"),
        (lambda: update_expert_bias(torch.zeros(3), CPU_LOADS, torch.ones(1)), ValueError, "number or a 0-d tensor"),
        (
            lambda: update_expert_bias(torch.zeros(3), CPU_LOADS, process_group=3),  # type: ignore[arg-type]
            ValueError,
            "update_expert_bias: process_group needs torch.distributed",
        ),
        (
            lambda: update_expert_bias(torch.zeros(3, device="meta"), CPU_LOADS),
            ValueError,
            "tokens_per_expert must be on meta like bias, got cpu",
        ),
    ],
)
def test_bad_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


def test_compiled_updates_equal_eager_ones() -> None:
    compiled = torch.compile(update_expert_bias, fullgraph=True, backend="aot_eager")

    def both(rate: float) -> tuple[Tensor, Tensor]:
        eager_bias, compiled_bias = torch.zeros(3), torch.zeros(3)
        update_expert_bias(eager_bias, CPU_LOADS, rate)
        compiled(compiled_bias, CPU_LOADS, rate)
        return eager_bias, compiled_bias

    for rate in (1e-3, 0.5):
        eager_bias, compiled_bias = both(rate)
        assert torch.equal(compiled_bias, eager_bias)
