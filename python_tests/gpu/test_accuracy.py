"""Accuracy on the device at sizes that fill it: every variant against float64 on the CPU, within the budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels.testing import assert_as_accurate
from python_tests.gpu.devices import DEVICES, assert_identical, kernel_backends
from python_tests.samples import grpo_loss as loss_samples

ON_DEVICES = pytest.mark.parametrize("device", DEVICES)
TRANSFORM = {"softcap": 20.0, "temperature": 0.7, "logit_scale": 1.1}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _check(names: list[str], actual: list[Tensor], expected: list[Tensor], eager: list[Tensor]) -> None:
    for name, a, e, plain in zip(names, actual, expected, eager, strict=True):
        assert_as_accurate(a, e, plain, name=name)


# --- token_log_probs -------------------------------------------------------------------------------------------------


def _log_probs(logits: Tensor, ids: Tensor, upstream: Tensor, **options: Any) -> list[Tensor]:
    logits = logits.detach().clone().requires_grad_()
    result = grpo_kernels.token_log_probs(logits, ids, outputs=("entropy", "sum_squared_probs", "top1_ids"), **options)
    outputs = [result.log_probs, result.entropy]
    upstream = upstream.to(result.log_probs.dtype)
    (gradient,) = torch.autograd.grad(outputs, logits, [upstream, 0.5 * upstream])
    return [*(output.detach() for output in outputs), result.sum_squared_probs, gradient, result.top1_ids]


@ON_DEVICES
@pytest.mark.parametrize(
    "options", [{}, {"softcap": 20.0, "temperature": 0.7, "logit_scale": 1.1}], ids=["plain", "softcap"]
)
@pytest.mark.parametrize("vocab", [513, 32000, pytest.param(151936, marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_log_probs(dtype: torch.dtype, vocab: int, options: dict[str, float], device: str) -> None:
    rows = 32
    logits = (torch.randn(rows, vocab) * 4).to(dtype)
    logits[0, : vocab // 2] = float("-inf")
    ids = torch.randint(vocab // 2, vocab, (rows,))
    ids[3] = -100
    upstream = torch.randn(rows)
    actual = _log_probs(logits.to(device), ids.to(device), upstream.to(device), **options)
    with grpo_kernels.backend("reference"):
        expected = _log_probs(logits.double(), ids, upstream, **options)
        eager = _log_probs(logits.float(), ids, upstream, **options)
    names = ["log_probs", "entropy", "sum_squared_probs", "gradient"]
    _check(names, actual[:4], expected[:4], eager[:4])
    live = ids >= 0
    picked = logits.float().gather(1, actual[4].cpu().clamp(min=0)[:, None])[:, 0]
    assert torch.equal(picked[live], logits.float().amax(1)[live])
    assert actual[4].cpu()[3] == -1


@ON_DEVICES
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype, device: str) -> None:
    logits = (torch.randn(67, 5003, device=device) * 4).to(dtype)
    ids = torch.randint(5003, (67,), device=device)
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


# --- group_advantages ------------------------------------------------------------------------------------------------

ADVANTAGE_OPTIONS = [
    {},
    {"baseline": "leave_one_out", "normalize_by": "batch"},
    {"normalize_by": "none"},
    {"aggregation": "normalize_then_sum"},
]


@ON_DEVICES
@pytest.mark.parametrize("ragged", [False, True], ids=["equal", "ragged"])
@pytest.mark.parametrize("options", ADVANTAGE_OPTIONS)
def test_group_advantages(options: dict[str, Any], ragged: bool, device: str) -> None:
    rewards = torch.randn(4096, 3)
    rewards[torch.rand(rewards.shape) < 0.1] = float("nan")
    groups = {"group_ids": torch.randint(-300, 300, (4096,))} if ragged else {"group_size": 16}
    on_device = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in groups.items()}
    actual = list(grpo_kernels.group_advantages(rewards.to(device), **on_device, **options))
    with grpo_kernels.backend("reference"):
        expected = list(grpo_kernels.group_advantages(rewards.double(), **groups, **options))
    _check(["advantages", "mean", "std"], actual, expected, [tensor.float() for tensor in expected])


# --- grpo_loss -------------------------------------------------------------------------------------------------------


def _loss(inputs: dict[str, Any], config: grpo_kernels.GRPOLossConfig, **options: Any) -> list[Tensor]:
    names = [name for name in ("log_probs", "entropy") if inputs[name] is not None]
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in names}
    output = loss_samples.call({**inputs, **leaves}, config, **options)
    weights = torch.linspace(0.5, 1.5, output.loss.numel(), device=output.loss.device, dtype=torch.float32)
    upstream = weights.to(output.loss.dtype).view(output.loss.shape)
    gradients = torch.autograd.grad(output.loss, list(leaves.values()), upstream, materialize_grads=True)
    return [output.loss.detach(), *gradients, output.metrics.values]


@ON_DEVICES
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean_token_mean", "none"])
@pytest.mark.parametrize("variant", loss_samples.VARIANTS)
def test_grpo_loss(variant: str, reduction: str, packed: bool, device: str) -> None:
    lengths = (200, 37, 1, 0, 129, 300) if device == "cuda" else (20, 1, 0, 13)
    config = loss_samples.config_of(variant, reduction)

    def evaluate(seed: int, to: str, dtype: torch.dtype) -> list[Tensor]:
        inputs, options = loss_samples.batch(variant, lengths=lengths, seed=seed), {}
        if packed:
            inputs, cu_seqlens = loss_samples.pack(inputs)
            options["cu_seqlens"] = cu_seqlens.to(to)
        for name, value in inputs.items():
            if isinstance(value, Tensor):
                inputs[name] = value.to(to, dtype if value.is_floating_point() else None)
        return [tensor.flatten() for tensor in _loss(inputs, config, **options)]

    def pooled(to: str, dtype: torch.dtype) -> list[Tensor]:
        """Several batches in one: the error of a single number, the scalar loss, would be luck."""
        return [torch.cat(parts) for parts in zip(*(evaluate(seed, to, dtype) for seed in range(4)), strict=True)]

    actual = pooled(device, torch.float32)
    with grpo_kernels.backend("reference"):
        expected, eager = pooled("cpu", torch.float64), pooled("cpu", torch.float32)
    names = ["loss", "log_probs' gradient", "entropy's gradient"][: len(actual) - 1]
    _check(names, actual[:-1], expected[:-1], eager[:-1])
    torch.testing.assert_close(actual[-1].cpu(), expected[-1], rtol=1e-4, atol=1e-4, equal_nan=True)


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
    for op in ("token_log_probs", "group_advantages", "grpo_loss"):
        assert kernel_backends(op, "cuda")
        assert kernel_backends(op, "cpu")
