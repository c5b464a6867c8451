"""What accuracy does not show (`grpo-kernels verify` looks at that): rows that do not depend on other rows, results in
place, ids that are out of range.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import _dispatch
from python_tests.gpu.devices import DEVICES, assert_identical, assert_same, kernel_backends

ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --- token_log_probs -------------------------------------------------------------------------------------------------


def _log_probs(logits: Tensor, ids: Tensor, upstream: Tensor) -> list[Tensor]:
    logits = logits.detach().clone().requires_grad_()
    result = grpo_kernels.token_log_probs(logits, ids, outputs=("entropy", "sum_squared_probs", "top1_ids"))
    outputs = [result.log_probs, result.entropy]
    upstream = upstream.to(result.log_probs.dtype)
    (gradient,) = torch.autograd.grad(outputs, logits, [upstream, 0.5 * upstream])
    return [*(output.detach() for output in outputs), result.sum_squared_probs, gradient, result.top1_ids]


@ON_DEVICES
@pytest.mark.parametrize("vocab", [5003, 5008])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, vocab: int, device: str) -> None:
    logits = (torch.randn(67, vocab, device=device) * 4).to(dtype)
    ids = torch.randint(vocab, (67,), device=device)
    upstream = torch.randn(67, device=device)
    together = _log_probs(logits, ids, upstream)
    for rows in (slice(0, 1), slice(30, 47), slice(66, 67)):
        alone = _log_probs(logits[rows], ids[rows], upstream[rows])
        assert_identical(alone, [tensor[rows] for tensor in together])


@ON_DEVICES
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_gradient_is_the_same(dtype: torch.dtype, device: str) -> None:
    logits = torch.randn(9, 1031, device=device).to(dtype)
    ids = torch.randint(1031, (9,), device=device)
    upstream = torch.randn(9, device=device)
    (expected,) = torch.autograd.grad(
        grpo_kernels.token_log_probs(leaf := logits.clone().requires_grad_(), ids).log_probs, leaf, upstream
    )
    leaf = logits.clone().requires_grad_()
    overwritten = leaf * 1
    result = grpo_kernels.token_log_probs(overwritten, ids, inplace_backward=True)
    (actual,) = torch.autograd.grad(result.log_probs, leaf, upstream)
    assert_identical([actual, overwritten.detach()], [expected, expected])


@ON_DEVICES
def test_an_id_outside_the_vocabulary_reads_nothing(device: str) -> None:
    """CUDA cannot look without waiting: the row comes out NaN. The CPU raises."""
    logits = torch.randn(4, 100, device=device)
    ids = torch.tensor([1, 2**31 - 1, 99, 100], device=device)
    upstream = torch.ones(4, device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"token_ids\[1\] must be < V = 100"):
            _log_probs(logits, ids, upstream)
        return
    outputs = _log_probs(logits, ids, upstream)
    for output in outputs[:4]:
        assert output.isnan().view(4, -1).all(1).tolist() == [False, True, False, True]
        assert output.isnan().view(4, -1).any(1).tolist() == [False, True, False, True]


# --- linear_token_log_probs ------------------------------------------------------------------------------------------


@ON_DEVICES
def test_linear_an_id_outside_the_vocabulary_spoils_its_row_alone(device: str) -> None:
    hidden, weight = torch.randn(4, 24, device=device), torch.randn(100, 24, device=device)
    ids = torch.tensor([1, 2**31 - 1, 99, 100], device=device)
    if device == "cpu":
        with pytest.raises(ValueError, match=r"token_ids\[1\] must be < V = 100"):
            grpo_kernels.linear_token_log_probs(hidden, weight, ids)
        return
    every = ("entropy", "sum_squared_probs", "top1_ids")
    found = grpo_kernels.linear_token_log_probs(hidden, weight, ids, outputs=every)
    expected = grpo_kernels.linear_token_log_probs(hidden, weight, ids.clamp(max=99), outputs=every)
    for output, sound in zip(found[:3], expected[:3], strict=True):
        assert output.isnan().tolist() == [False, True, False, True]
        assert_identical([output[::2]], [sound[::2]])
    assert found.top1_ids.tolist()[1::2] == [-1, -1]


@ON_DEVICES
def test_linear_pads_of_other_sizes_change_no_live_row(device: str) -> None:
    """Masked rows behind the live ones: their number may change the order of sums, and nothing else."""
    hidden, weight = torch.randn(40, 48, device=device), torch.randn(333, 48, device=device)
    ids, upstream = torch.randint(333, (40,), device=device), torch.randn(40, device=device)

    def run(padding: int) -> list[Tensor]:
        states = torch.cat([hidden, hidden.new_full((padding, 48), float("nan"))]).requires_grad_()
        leaf = weight.clone().requires_grad_()
        found = grpo_kernels.linear_token_log_probs(states, leaf, torch.cat([ids, ids.new_full((padding,), -100)]))
        gradients = torch.autograd.grad(found.log_probs[:40], [states, leaf], upstream)
        assert gradients[0][40:].count_nonzero() == 0
        return [found.log_probs[:40].detach(), gradients[0][:40], gradients[1]]

    expected = run(0)
    for padding in (1, 90):
        assert_same(run(padding), expected)


# --- grpo_loss -------------------------------------------------------------------------------------------------------


@ON_DEVICES
def test_grpo_loss_does_not_depend_on_the_batch(device: str) -> None:
    config = grpo_kernels.GRPOLossConfig.preset("gspo")
    log_probs = -torch.rand(33, 1030, device=device)
    old, advantages = log_probs + 0.01 * torch.randn_like(log_probs), torch.randn(33, device=device)

    def gradient(rows: slice) -> Tensor:
        leaf = log_probs[rows].clone().requires_grad_()
        loss = grpo_kernels.grpo_loss(leaf, old[rows], advantages[rows], None, config, num_items=33).loss
        return torch.autograd.grad(loss, leaf)[0]

    whole = gradient(slice(0, 33))
    for rows in (slice(0, 1), slice(5, 19), slice(32, 33)):
        assert_identical([gradient(rows)], [whole[rows]])


def test_both_devices_use_kernels() -> None:
    for op in _dispatch.public_ops():
        assert kernel_backends(op, "cuda")
        assert kernel_backends(op, "cpu")
