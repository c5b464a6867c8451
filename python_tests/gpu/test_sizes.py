"""Tensors of more than 2^31 elements: the last rows must come out as they do alone."""

from __future__ import annotations

import pytest
import torch

import grpo_kernels
from python_tests.gpu.devices import DEVICES, assert_agrees, assert_identical, assert_same
from python_tests.samples import Call

LAST = 3
ON_DEVICES = pytest.mark.parametrize(
    "device",
    [
        DEVICES[0],  # small: only to run the test's own code
        pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.slow]),
    ],
)


def _need(device: str, gibibytes: int) -> None:
    if device != "cuda":
        return
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes} GiB of free GPU memory, has {free:.0f}")


def _beyond_int32(rows: int, columns: int, device: str) -> int:
    if device == "cpu":
        return 5
    assert rows * columns > 2**31
    return rows


@ON_DEVICES
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in_place"])
def test_token_log_probs(inplace: bool, device: str) -> None:
    _need(device, 24)
    vocab = 131_077 if device == "cuda" else 131  # odd: rows are not aligned
    rows = _beyond_int32(17_000, 131_077, device)
    logits = torch.empty(rows, vocab, device=device, dtype=torch.bfloat16).normal_()
    ids = torch.randint(vocab, (rows,), device=device)
    upstream = torch.randn(rows, device=device)

    def run(x: torch.Tensor, which: slice, inplace: bool) -> list[torch.Tensor]:
        x.requires_grad_()
        result = grpo_kernels.token_log_probs(x, ids[which], outputs=("entropy",), inplace_backward=inplace)
        (gradient,) = torch.autograd.grad([result.log_probs, result.entropy], x, [upstream[which], upstream[which]])
        return [result.log_probs.detach(), result.entropy.detach(), gradient]

    ends = [slice(0, LAST), slice(rows - LAST, rows)]
    alone = [run(logits[which].clone(), which, False) for which in ends]
    whole = run(logits, slice(0, rows), inplace)
    for which, expected in zip(ends, alone, strict=True):
        assert_identical([tensor[which] for tensor in whole], expected)


_LARGE = {
    "logits": (17_000, 64, 131_077),
    "hidden": (524_301, 4_096, 128),
    "weight": (2 * LAST, 4_096, 524_301),
}  # the product of two of the sizes is beyond 2^31


@ON_DEVICES
@pytest.mark.parametrize("large", _LARGE)
def test_linear_token_log_probs(large: str, device: str) -> None:
    """The first rows and the last, with gradients of their own alone, against the definition on these rows."""
    _need(device, 60)
    rows, width, vocab = _LARGE[large] if device == "cuda" else (20, 16, 131)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.empty(rows, width, device=device, dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(vocab, width, device=device, dtype=dtype).normal_(std=3 / width**0.5).requires_grad_()
    ids = torch.randint(vocab, (rows,), device=device)
    ends = torch.cat([torch.arange(LAST), torch.arange(rows - LAST, rows)]).to(device)
    ids[ends[-1]] = vocab - 1
    upstream = torch.zeros(rows, device=device)
    upstream[ends] = torch.randn(2 * LAST, device=device)

    def run(states: torch.Tensor, chosen: torch.Tensor, factors: torch.Tensor) -> list[torch.Tensor]:
        found = grpo_kernels.linear_token_log_probs(states, weight, chosen, outputs=("entropy",))
        outputs = [found.log_probs, found.entropy]
        gradients = torch.autograd.grad(outputs, [states, weight], [factors, 0.5 * factors])
        return [*(output.detach() for output in outputs), *gradients]

    whole = run(hidden, ids, upstream)
    with grpo_kernels.backend("reference"):
        expected = run(hidden.detach()[ends].requires_grad_(), ids[ends], upstream[ends])
    call = Call("ends", run, lambda device: (), (0, 1), rounds=dtype)
    assert_agrees(call, [*(tensor[ends] for tensor in whole[:3]), whole[3]], expected)


@ON_DEVICES
def test_grpo_loss(device: str) -> None:
    _need(device, 60)
    tokens = 32_768 if device == "cuda" else 16
    rows = _beyond_int32(66_000, 32_768, device)
    log_probs = torch.empty(rows, tokens, device=device).uniform_(-3.0, 0.0)
    old = log_probs.clone()
    old[:, ::7] -= 0.5
    advantages = torch.randn(rows, device=device)

    def gradient(which: slice) -> torch.Tensor:
        leaf = log_probs[which].detach().requires_grad_()
        loss = grpo_kernels.grpo_loss(leaf, old[which], advantages[which], None, num_items=float(rows)).loss
        assert loss.isfinite()
        return torch.autograd.grad(loss, leaf)[0]

    ends = [slice(0, LAST), slice(rows - LAST, rows)]
    alone = [gradient(which) for which in ends]
    whole = gradient(slice(0, rows))
    for which, expected in zip(ends, alone, strict=True):
        assert_same([whole[which]], [expected])


@ON_DEVICES
def test_group_advantages(device: str) -> None:
    _need(device, 24)
    functions = 40
    batch = _beyond_int32(2**26, functions, device) if device == "cuda" else 64
    rewards = torch.empty(batch, functions, device=device).normal_()
    whole = grpo_kernels.group_advantages(rewards, group_size=8)
    for which in (slice(0, 16), slice(batch - 16, batch)):
        alone = grpo_kernels.group_advantages(rewards[which].clone(), group_size=8)
        assert_identical([tensor[which] for tensor in whole], list(alone))
