"""Tensors of more than 2^31 elements: the last rows must come out as they do alone."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import grpo_kernels
from grpo_kernels import ScaledTensor
from grpo_kernels.fp8_quantize.layout import tiles
from python_tests.fp8_products import widened
from python_tests.gpu.devices import (
    DEVICES,
    assert_agrees,
    assert_identical,
    assert_same,
    assert_same_bits,
    kernel_backends,
)
from python_tests.samples import Call, assert_gradients_agree

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


# --- mixture of experts: T * K * H beyond 2^31 -----------------------------------------------------------------------

_TOKENS, _SLOTS, _WIDTH = 40_000, 8, 7_168
_EXPERTS = 16


def _routes(device: str) -> tuple[int, int, torch.Tensor]:
    """Tokens, a width whose rows of experts are beyond 2^31 elements, and ids."""
    width = _WIDTH if device == "cuda" else 24
    tokens = _beyond_int32(_TOKENS, _SLOTS * _WIDTH, device) if device == "cuda" else 20
    liking = torch.rand(tokens, _EXPERTS, device=device)
    return tokens, width, liking.topk(_SLOTS).indices


def _ends(tokens: int) -> list[slice]:
    return [slice(0, LAST), slice(tokens - LAST, tokens)]


@ON_DEVICES
def test_moe_router(device: str) -> None:
    _need(device, 24)
    experts = 1_024 if device == "cuda" else 32
    tokens = _beyond_int32(2_100_000, 1_024, device)
    logits = torch.empty(tokens, experts, device=device, dtype=torch.bfloat16).normal_()
    upstream = torch.randn(tokens, 2, device=device)

    def run(which: slice) -> list[torch.Tensor]:
        x = logits[which].detach().requires_grad_()
        result = grpo_kernels.moe_router(x, 2, scoring_func="sigmoid", norm_topk_prob=False)
        (gradient,) = torch.autograd.grad(result.topk_weights, x, upstream[which])
        return [result.topk_weights.detach(), result.topk_ids, gradient]

    whole = run(slice(0, tokens))
    for which in _ends(tokens):
        assert_identical([tensor[which] for tensor in whole], run(which))


@ON_DEVICES
def test_moe_permute(device: str) -> None:
    _need(device, 24)
    tokens, width, ids = _routes(device)
    x = torch.empty(tokens, width, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    permutation = grpo_kernels.build_permutation(ids, _EXPERTS)
    rows = grpo_kernels.moe_permute(x, permutation)
    upstream = torch.empty_like(rows).normal_()
    (gradient,) = torch.autograd.grad(rows, x, upstream)
    for which in _ends(tokens):
        places = permutation.row_id_map[which].long()
        copies = x.detach()[which, None].expand(-1, _SLOTS, -1)
        assert_identical([rows.detach()[places]], [copies])
        assert_same([gradient[which]], [upstream[places].float().sum(1).bfloat16()])


@ON_DEVICES
def test_moe_unpermute(device: str) -> None:
    _need(device, 30)
    tokens, width, ids = _routes(device)
    permutation = grpo_kernels.build_permutation(ids, _EXPERTS)
    y = torch.empty(tokens * _SLOTS, width, device=device, dtype=torch.bfloat16).normal_().requires_grad_()
    weights = torch.rand(tokens, _SLOTS, device=device).requires_grad_()
    out = grpo_kernels.moe_unpermute(y, permutation, weights)
    upstream = torch.empty_like(out).normal_()
    of_rows, of_weights = torch.autograd.grad(out, [y, weights], upstream)
    for which in _ends(tokens):
        places = permutation.row_id_map[which].long()
        chosen = y.detach()[places].requires_grad_()
        leaves = [chosen, weights.detach()[which].requires_grad_()]
        expected = (leaves[0].float() * leaves[1][..., None]).sum(1).bfloat16()
        slopes = torch.autograd.grad(expected, leaves, upstream[which])
        call = Call("ends", lambda: None, lambda device: (), (0, 1), rounds=torch.bfloat16)
        assert_agrees(call, [out.detach()[which], of_rows[places], of_weights[which]], [expected.detach(), *slopes])


@ON_DEVICES
@pytest.mark.parametrize("block", [(1, 128), (128, 128)])
def test_fp8_quantize(block: tuple[int, int], device: str) -> None:
    """Of the matrix and of its transpose; rows that tiles of 128 end with, as many as a multiple of 128 has."""
    _need(device, 24)
    width = 2880
    rows = 128 * _beyond_int32(2**31 // width // 128 + 2, 128 * width, device)
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
    _need(device, 24)
    tokens, width, ids = _routes(device)
    x = torch.empty(tokens, width, device=device, dtype=torch.bfloat16).normal_()
    permutation = grpo_kernels.build_permutation(ids, _EXPERTS, alignment=128)
    alone = grpo_kernels.moe_permute_quantize(x, permutation)
    rows, transposed = grpo_kernels.moe_permute_quantize(x, permutation, transpose="both")
    assert_identical([rows.scale, rows.data.view(torch.uint8)], [alone.scale, alone.data.view(torch.uint8)])
    for which in _ends(tokens):
        places = permutation.row_id_map[which].long()
        few = grpo_kernels.fp8_quantize(x[which])
        copies = few.data.view(torch.uint8)[:, None].expand(-1, _SLOTS, -1)
        assert_identical([alone.data.view(torch.uint8)[places]], [copies])
        assert_identical([alone.scale[places]], [few.scale[:, None].expand(-1, _SLOTS, -1)])
    last = permutation.offsets[-1] - 128 + torch.arange(128, device=device)
    slots = permutation.inv_map[last]
    tile = torch.where((slots >= 0)[:, None], x[slots.clamp(min=0) // _SLOTS], 0.0)
    few = grpo_kernels.fp8_quantize(tile, transpose=True)
    assert_identical([transposed.data.view(torch.uint8)[:, last]], [few.data.view(torch.uint8)])
    assert_identical([transposed.scale[:, last[:1] // 128]], [few.scale])


@ON_DEVICES
@pytest.mark.parametrize("wide", ["inputs", "outputs"])
def test_grouped_gemm(wide: str, device: str) -> None:
    """Rows of the first and of the last expert, with gradients of their own alone."""
    _need(device, 30)
    rows = _beyond_int32(_TOKENS * _SLOTS, _WIDTH, device) if device == "cuda" else 40
    large, small = (_WIDTH, 64) if device == "cuda" else (24, 8)
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
def test_fp8_grouped_gemm(device: str) -> None:
    """Rows, result and weights are all of more than 2^31 elements: the last rows come out as they do alone."""
    _need(device, 16)
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
    _need(device, 24)
    shape = {"rows": (299_648, 4, _WIDTH, 64), "result": (512, 300, 2_688, 2_688)}[large]
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
    _need(device, 30)
    rows, width = (299_648, _WIDTH // 2) if device == "cuda" else (384, 12)
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


@ON_DEVICES
@pytest.mark.parametrize(
    "options", [{"save": "preact"}, {"save": "input"}, {"recipe": "fp8_block128"}], ids=["preact", "input", "fp8"]
)
def test_moe_experts(options: dict[str, Any], device: str) -> None:
    """The first tokens and the last, with gradients of their own alone, against the definition on these tokens; in FP8
    against the same kernels, of which a row gets the same bits in any company."""
    _need(device, 40)
    tokens, twice, ids = _routes(device)
    hidden = 64 if device == "cuda" else 16
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype).normal_(std=scale).requires_grad_()

    x, gate_up = normal(tokens, hidden), normal(_EXPERTS, twice, hidden, scale=hidden**-0.5)
    down = normal(_EXPERTS, hidden, twice // 2, scale=(twice // 2) ** -0.5)
    weights = torch.rand(tokens, _SLOTS, device=device)
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
