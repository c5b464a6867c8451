"""Tensors of more than 2^31 elements: the last rows must come out as they do alone."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import grpo_kernels
from python_tests.gpu.devices import assert_agrees, assert_identical, assert_same
from python_tests.gpu.large import (
    EXPERTS,
    LAST,
    ON_DEVICES,
    SLOTS,
    TOKENS,
    WIDTH,
    beyond_int32,
    both_ends,
    need,
    routes,
)
from python_tests.samples import Call, assert_gradients_agree


@ON_DEVICES
@pytest.mark.parametrize("inplace", [False, True], ids=["fresh", "in_place"])
def test_token_log_probs(inplace: bool, device: str) -> None:
    need(device, 24)
    vocab = 131_077 if device == "cuda" else 131  # odd: rows are not aligned
    rows = beyond_int32(17_000, 131_077, device)
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
    need(device, 60)
    rows, width, vocab = _LARGE[large] if device == "cuda" else (20, 16, 131)
    dtype, rounds = (torch.bfloat16, torch.bfloat16) if device == "cuda" else (torch.float64, torch.float32)
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
    call = Call("ends", run, lambda device: (), (0, 1), rounds=rounds)
    assert_agrees(call, [*(tensor[ends] for tensor in whole[:3]), whole[3]], expected)


@ON_DEVICES
def test_grpo_loss(device: str) -> None:
    need(device, 60)
    tokens = 32_768 if device == "cuda" else 16
    rows = beyond_int32(66_000, 32_768, device)
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
    need(device, 24)
    functions = 40
    batch = beyond_int32(2**26, functions, device) if device == "cuda" else 64
    rewards = torch.empty(batch, functions, device=device).normal_()
    whole = grpo_kernels.group_advantages(rewards, group_size=8)
    for which in (slice(0, 16), slice(batch - 16, batch)):
        alone = grpo_kernels.group_advantages(rewards[which].clone(), group_size=8)
        assert_identical([tensor[which] for tensor in whole], list(alone))


@ON_DEVICES
@pytest.mark.parametrize("options", [{}, {"mode": "block"}, {"top_k": 30, "top_p": 0.9}], ids=["", "block", "filters"])
def test_verify_draft(options: dict[str, Any], device: str) -> None:
    need(device, 24)
    vocab = 131_077 if device == "cuda" else 131  # odd: rows are not aligned
    batch = beyond_int32(8_500, 2 * 131_077, device)
    target = torch.empty(batch, 2, vocab, device=device, dtype=torch.bfloat16).normal_()
    draft = torch.empty(batch, 1, vocab, device=device, dtype=torch.bfloat16).normal_()
    ids = torch.randint(vocab, (batch, 1), device=device)
    ids[-LAST:] = vocab - 1
    seeds = torch.randint(2**62, (batch,), device=device)

    def run(which: slice) -> list[torch.Tensor]:
        return list(
            grpo_kernels.verify_draft(
                target[which], ids[which], draft_logits=draft[which], seeds=seeds[which], **options
            )
        )

    whole = run(slice(0, batch))
    for which in (slice(0, LAST), slice(batch - LAST, batch)):
        assert_identical([tensor[which] for tensor in whole], run(which))


# --- mixture of experts: T * K * H beyond 2^31 -----------------------------------------------------------------------


@ON_DEVICES
def test_moe_router(device: str) -> None:
    need(device, 24)
    experts = 1_024 if device == "cuda" else 32
    tokens = beyond_int32(2_100_000, 1_024, device)
    logits = torch.empty(tokens, experts, device=device, dtype=torch.bfloat16).normal_()
    upstream = torch.randn(tokens, 2, device=device)

    def run(which: slice) -> list[torch.Tensor]:
        x = logits[which].detach().requires_grad_()
        result = grpo_kernels.moe_router(x, 2, scoring_func="sigmoid", norm_topk_prob=False)
        (gradient,) = torch.autograd.grad(result.topk_weights, x, upstream[which])
        return [result.topk_weights.detach(), result.topk_ids, gradient]

    whole = run(slice(0, tokens))
    for which in both_ends(tokens):
        assert_identical([tensor[which] for tensor in whole], run(which))


@ON_DEVICES
def test_moe_permute(device: str) -> None:
    need(device, 24)
    tokens, width, ids = routes(device)
    x = torch.empty(tokens, width, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    permutation = grpo_kernels.build_permutation(ids, EXPERTS)
    rows = grpo_kernels.moe_permute(x, permutation)
    upstream = torch.empty_like(rows).normal_()
    (gradient,) = torch.autograd.grad(rows, x, upstream)
    for which in both_ends(tokens):
        places = permutation.row_id_map[which].long()
        copies = x.detach()[which, None].expand(-1, SLOTS, -1)
        assert_identical([rows.detach()[places]], [copies])
        assert_same([gradient[which]], [upstream[places].float().sum(1).bfloat16()])


@ON_DEVICES
def test_moe_unpermute(device: str) -> None:
    need(device, 30)
    tokens, width, ids = routes(device)
    permutation = grpo_kernels.build_permutation(ids, EXPERTS)
    y = torch.empty(tokens * SLOTS, width, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    weights = torch.rand(tokens, SLOTS, device=device).requires_grad_()
    out = grpo_kernels.moe_unpermute(y, permutation, weights)
    upstream = torch.empty_like(out).normal_()
    of_rows, of_weights = torch.autograd.grad(out, [y, weights], upstream)
    for which in both_ends(tokens):
        places = permutation.row_id_map[which].long()
        chosen = y.detach()[places].requires_grad_()
        leaves = [chosen, weights.detach()[which].requires_grad_()]
        expected = (leaves[0].float() * leaves[1][..., None]).sum(1).bfloat16()
        slopes = torch.autograd.grad(expected, leaves, upstream[which])
        call = Call("ends", lambda: None, lambda device: (), (0, 1), rounds=torch.bfloat16)
        assert_agrees(call, [out.detach()[which], of_rows[places], of_weights[which]], [expected.detach(), *slopes])


@ON_DEVICES
@pytest.mark.parametrize("wide", ["inputs", "outputs"])
def test_grouped_gemm(wide: str, device: str) -> None:
    """Rows of the first and of the last expert, with gradients of their own alone."""
    need(device, 30)
    rows = beyond_int32(TOKENS * SLOTS, WIDTH, device) if device == "cuda" else 40
    large, small = (WIDTH, 64) if device == "cuda" else (24, 8)
    width, columns = (large, small) if wide == "inputs" else (small, large)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    x = torch.empty(rows, width, device=device, dtype=dtype).normal_().requires_grad_()
    weight = torch.empty(4, columns, width, device=device, dtype=dtype).normal_(std=width**-0.5).requires_grad_()
    offsets = torch.tensor([LAST, rows // 2, rows - LAST, rows], device=device, dtype=torch.int32)
    ends = torch.cat([torch.arange(LAST), torch.arange(rows - LAST, rows)]).to(device)
    upstream = torch.zeros(rows, columns, device=device, dtype=dtype)
    upstream[ends] = torch.randn(2 * LAST, columns, device=device).to(dtype)

    def run(x: torch.Tensor, offsets: torch.Tensor, upstream: torch.Tensor) -> list[torch.Tensor]:
        out = grpo_kernels.grouped_gemm(x, weight, offsets)
        return [out.detach(), *torch.autograd.grad(out, [x, weight], upstream)]

    whole = run(x, offsets, upstream)
    with grpo_kernels.backend("reference"):
        few = torch.tensor([LAST, LAST, LAST, 2 * LAST], device=device, dtype=torch.int32)
        expected = run(x.detach()[ends].requires_grad_(), few, upstream[ends])
    call = Call("ends", run, lambda device: (), (0, 1), rounds=dtype)
    assert_agrees(call, [whole[0][ends], whole[1][ends], whole[2]], expected)


@ON_DEVICES
@pytest.mark.parametrize(
    "options", [{"save": "preact"}, {"save": "input"}, {"recipe": "fp8_block128"}], ids=["preact", "input", "fp8"]
)
def test_moe_experts(options: dict[str, Any], device: str) -> None:
    """The first tokens and the last, with gradients of their own alone, against the definition on these tokens; in FP8
    against the same kernels, of which a row gets the same bits in any company."""
    need(device, 40)
    tokens, twice, ids = routes(device)
    hidden = 64 if device == "cuda" else 16
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=scale).requires_grad_()

    x, gate_up = normal(tokens, hidden), normal(EXPERTS, twice, hidden, scale=hidden**-0.5)
    down = normal(EXPERTS, hidden, twice // 2, scale=(twice // 2) ** -0.5)
    weights = torch.rand(tokens, SLOTS, device=device)
    ends = torch.cat([torch.arange(LAST), torch.arange(tokens - LAST, tokens)]).to(device)
    weights[LAST:-LAST] = 0.0  # nothing of other tokens reaches the gradients of the experts
    upstream = torch.zeros(tokens, hidden, device=device, dtype=dtype)
    upstream[ends] = torch.randn(len(ends), hidden, device=device).to(dtype)

    def run(x: torch.Tensor, which: torch.Tensor) -> list[torch.Tensor]:
        given = weights[which].requires_grad_()
        out = grpo_kernels.moe_experts(x, gate_up, down, (given, ids[which]), **options)
        return [out.detach(), *torch.autograd.grad(out, [x, given, gate_up, down], upstream[which])]

    whole = run(x, torch.arange(tokens, device=device))
    in_fp8 = "recipe" in options
    with contextlib.nullcontext() if in_fp8 else grpo_kernels.backend("reference"):
        expected = run(x.detach()[ends].requires_grad_(), ends)
    of_tokens = [tensor[ends] for tensor in whole[:3]]
    if in_fp8:
        assert_identical(of_tokens, expected[:3])
    call = Call("ends", run, lambda device: (), rounds=torch.bfloat16)
    assert_gradients_agree(call, [*of_tokens, *whole[3:]], expected)
