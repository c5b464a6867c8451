"""A call of every op, of sizes that fill a GPU, so that blocks finish in another order every time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig
from python_tests.gpu.devices import inputs_of, run, run_op
from python_tests.samples import Call, tensors


def _token_log_probs(device: str, dtype: torch.dtype, **options: Any) -> Callable[[], list[Tensor]]:
    rows, vocab = (512, 50_257) if device == "cuda" else (9, 5_003)
    logits = (torch.randn(rows, vocab, device=device) * 4).to(dtype)
    ids = torch.randint(vocab, (rows,), device=device)
    ids[::7] = -100
    every = ("entropy", "sum_squared_probs", "top1_ids")

    def function(x: Tensor) -> Sequence[Tensor]:
        return grpo_kernels.token_log_probs(x * 1.0, ids, outputs=every, **options)

    call = Call("big", function, lambda device: (logits,), (0,))
    return lambda: run(call, inputs_of(call, device))


def _group_advantages(device: str, **options: Any) -> Callable[[], list[Tensor]]:
    batch = 65_536 if device == "cuda" else 1_024
    rewards = torch.randn(batch, 3, device=device)
    rewards[torch.rand(rewards.shape, device=device) < 0.1] = float("nan")
    if "group_size" not in options:
        options["group_ids"] = torch.randint(-batch // 16, batch // 16, (batch,), device=device)
    if options.get("normalize_by") == "batch_tokens":
        options["lengths"] = torch.randint(4_096, (batch,), device=device)
    return lambda: list(grpo_kernels.group_advantages(rewards, **options))


def _groups(device: str, function: Callable[[Tensor, Tensor], Any]) -> Callable[[], list[Tensor]]:
    batch = 65_536 if device == "cuda" else 1_024
    scores = torch.randint(4, (batch,), device=device).float()  # many ties
    ids = torch.randint(batch // 16, (batch,), device=device)

    def work() -> list[Tensor]:
        result = function(scores, ids)
        return [result] if isinstance(result, Tensor) else list(result)

    return work


def _grpo_loss(device: str, preset: str, packed: bool) -> Callable[[], list[Tensor]]:
    batch, tokens = (256, 2_048) if device == "cuda" else (7, 65)
    config = GRPOLossConfig.preset(preset)
    log_probs = -torch.rand(batch, tokens, device=device) * 3
    old = log_probs + 0.2 * torch.randn_like(log_probs)
    advantages = torch.randn(batch, device=device)
    lengths = torch.randint(0, tokens + 1, (batch,), device=device)
    mask = torch.arange(tokens, device=device) < lengths[:, None]
    options: dict[str, Any] = {"max_length": tokens} if config.reduction == "sequence_mean_token_sum_norm" else {}
    if packed:
        options["cu_seqlens"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        log_probs, old, mask = log_probs[mask], old[mask], mask[mask]

    def function(x: Tensor) -> list[Tensor]:
        output = grpo_kernels.grpo_loss(x, old, advantages, mask, config, **options)
        return [output.loss, output.metrics.values]

    call = Call(preset, function, lambda device: (log_probs,), (0,))
    return lambda: run(call, inputs_of(call, device))


_SEQUENCES = 4


def _head(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and ids, some of them masked; bf16 on a GPU."""
    rows, width, vocab = (2_048, 1_024, 50_257) if device == "cuda" else (65 * _SEQUENCES, 24, 517)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = torch.randn(rows, width, device=device).to(dtype)
    weight = (torch.randn(vocab, width, device=device) * 3 / width**0.5).to(dtype)
    ids = torch.randint(vocab, (rows,), device=device)
    ids[::7] = -100
    return hidden, weight, ids


def _linear_token_log_probs(device: str, outputs: tuple[str, ...], **options: Any) -> Callable[[], list[Tensor]]:
    hidden, weight, ids = _head(device)

    def function(x: Tensor, w: Tensor) -> Any:
        return grpo_kernels.linear_token_log_probs(x, w, ids, outputs=outputs, **options)

    call = Call("big", function, lambda device: (hidden, weight), (0, 1))
    return lambda: run(call, inputs_of(call, device))


def _linear_cross_entropy(device: str, reduction: str) -> Callable[[], list[Tensor]]:
    hidden, weight, target = _head(device)

    def function(x: Tensor, w: Tensor) -> Tensor:
        return grpo_kernels.linear_cross_entropy(x, w, target, z_loss=0.01, reduction=reduction)

    call = Call("big", function, lambda device: (hidden, weight), (0, 1))
    return lambda: run(call, inputs_of(call, device))


def _linear_grpo_loss(device: str, config: GRPOLossConfig) -> Callable[[], list[Tensor]]:
    hidden, weight, ids = _head(device)
    hidden, ids = hidden.view(_SEQUENCES, -1, hidden.shape[-1]), ids.view(_SEQUENCES, -1)
    old = -10.0 - 2 * torch.rand(ids.shape, device=device)
    advantages = torch.randn(len(ids), device=device)

    def function(x: Tensor, w: Tensor) -> list[Tensor | None]:
        output = grpo_kernels.linear_grpo_loss(x, w, ids, old, advantages, None, config)
        return [output.loss, output.metrics.values, output.log_probs, output.entropy]

    call = Call("big", function, lambda device: (hidden, weight), (0, 1))
    return lambda: run(call, inputs_of(call, device))


def _mtp_linear_cross_entropy(device: str, policy: bool, **options: Any) -> Callable[[], list[Tensor]]:
    """Three depths in packed documents, or behind a policy."""
    hidden, weight, ids = _head(device)
    hiddens = torch.stack([hidden, hidden.flip(0), -hidden])
    if policy:
        hiddens, ids = hiddens.unflatten(1, (_SEQUENCES, -1)), ids.view(_SEQUENCES, -1)
        old, advantages = -10.0 - 2 * torch.rand(ids.shape, device=device), torch.randn(len(ids), device=device)
        terms = grpo_kernels.PolicyTerms(old, advantages, GRPOLossConfig.preset("dapo", entropy_coef=0.1))
        options |= {"policy": terms, "shift": 0}
    else:
        options["positions"] = torch.arange(len(ids), device=device) % 13

    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        output = grpo_kernels.mtp_linear_cross_entropy(x, w, ids, **options)
        return tensors(output)

    call = Call("big", function, lambda device: (hiddens, weight), (0, 1))
    return lambda: run(call, inputs_of(call, device))


def _verify_draft(device: str, **options: Any) -> Callable[[], list[Tensor]]:
    batch, drafts, vocab = (64, 3, 50_257) if device == "cuda" else (7, 3, 517)
    target = torch.randn(batch, drafts + 1, vocab, device=device) * 3
    draft = target[:, :drafts] + torch.randn(batch, drafts, vocab, device=device) / 2
    ids = draft.argmax(-1)
    seeds = torch.randint(2**62, (batch,), device=device)
    if device == "cuda":
        target, draft = target.bfloat16(), draft.bfloat16()
    return lambda: list(grpo_kernels.verify_draft(target, ids, draft_logits=draft, seeds=seeds, **options))


_ROUTES: dict[str, Any] = {"scoring_func": "sigmoid", "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}


def _router_logits(device: str) -> tuple[Tensor, int]:
    """Logits, some of them equal, and top_k."""
    tokens, experts = (16_384, 256) if device == "cuda" else (65, 32)
    return (torch.randn(tokens, experts, device=device) * 3).bfloat16().float(), 8


def _moe_router(device: str, **options: Any) -> Callable[[], list[Tensor]]:
    logits, top_k = _router_logits(device)
    if "seq_aux_loss_coef" in options:
        options["cu_seqlens"] = torch.arange(0, len(logits) + 1, 13, device=device)
        options["cu_seqlens"][-1] = len(logits)
    if options.pop("replay", False):
        options["replay_ids"] = torch.rand(logits.shape, device=device).argsort(1)[:, :top_k]
        options["replay_ids"][::3, 1:5] = -1

    def function(x: Tensor) -> Sequence[Tensor]:
        return grpo_kernels.moe_router(x, top_k, **options)

    call = Call("big", function, lambda device: (logits,), (0,))
    return lambda: run(call, inputs_of(call, device))


def _routes(device: str) -> tuple[Tensor, int]:
    """Ids of few well-liked experts, some slots without one; and how many experts there are."""
    logits, top_k = _router_logits(device)
    experts = logits.shape[1]
    ids = (logits + torch.linspace(0, 6, experts, device=device)).topk(top_k).indices.int()
    ids[::5, 2] = -1
    return ids, experts


def _build_permutation(device: str, **options: Any) -> Callable[[], list[Tensor]]:
    ids, experts = _routes(device)
    return lambda: list(grpo_kernels.build_permutation(ids, experts, **options))


def _moves(device: str, back: bool) -> Callable[[], list[Tensor]]:
    ids, experts = _routes(device)
    width = 1_024 if device == "cuda" else 24
    permutation = grpo_kernels.build_permutation(ids, experts, alignment=8)
    if not back:
        x = torch.randn(len(ids), width, device=device).bfloat16()
        call = Call("big", lambda x: grpo_kernels.moe_permute(x, permutation), lambda device: (x,), (0,))
        return lambda: run(call, inputs_of(call, device))
    y = torch.randn(len(permutation.inv_map), width, device=device).bfloat16()
    weights = torch.rand(ids.shape, device=device)
    call = Call("big", lambda y, w: grpo_kernels.moe_unpermute(y, permutation, w), lambda device: (y, weights), (0, 1))
    return lambda: run(call, inputs_of(call, device))


def _moved_and_quantized(device: str, **options: Any) -> Callable[[], list[Tensor]]:
    ids, experts = _routes(device)
    permutation = grpo_kernels.build_permutation(ids, experts, alignment=128)
    x = torch.randn(len(ids), 1_024 if device == "cuda" else 24, device=device).bfloat16()
    return lambda: tensors(grpo_kernels.moe_permute_quantize(x, permutation, **options))


def _quantized(device: str, back: bool, **options: Any) -> Callable[[], list[Tensor]]:
    x = torch.randn((4_099, 2_880) if device == "cuda" else (131, 260), device=device).bfloat16()
    if back:
        scaled = grpo_kernels.fp8_quantize(x)
        return lambda: [grpo_kernels.fp8_dequantize(scaled)]
    return lambda: tensors(grpo_kernels.fp8_quantize(x, **options))


def _parameters(device: str, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """gate_up, down and a bias of gate_up; bf16 on a GPU."""
    hidden, width = (1_024, 256) if device == "cuda" else (24, 12)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    gate_up = torch.randn(experts, 2 * width, hidden, device=device) * hidden**-0.5
    down = torch.randn(experts, hidden, width, device=device) * width**-0.5
    return gate_up.to(dtype), down.to(dtype), torch.randn(experts, 2 * width, device=device).to(dtype)


def _grouped_gemm(device: str) -> Callable[[], list[Tensor]]:
    ids, experts = _routes(device)
    weight, _, bias = _parameters(device, experts)
    permutation = grpo_kernels.build_permutation(ids, experts)
    x = torch.randn(len(permutation.inv_map), weight.shape[2], device=device).to(weight.dtype)

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return grpo_kernels.grouped_gemm(x, w, permutation.offsets, bias=b)

    call = Call("big", function, lambda device: (x, weight, bias), (0, 1, 2))
    return lambda: run(call, inputs_of(call, device))


def _fp8_product(device: str) -> Callable[[], list[Tensor]]:
    """Many tiles for each of the few experts, and none for others."""
    rows, width, columns = (8_192, 2_880, 1_536) if device == "cuda" else (300, 40, 24)
    x = grpo_kernels.fp8_quantize(torch.randn(rows, width, device=device))
    weight = grpo_kernels.fp8_quantize(torch.randn(5, columns, width, device=device), (128, 128))
    offsets = torch.tensor([0, rows // 3, rows // 3, rows - 7, rows - 7], device=device)
    bias = torch.randn(5, columns, device=device)
    return lambda: [grpo_kernels.grouped_gemm(x, weight, offsets, bias=bias)]


def _fp8_wgrad(device: str) -> Callable[[], list[Tensor]]:
    rows, width, columns = (8_192, 1_152, 1_536) if device == "cuda" else (256, 40, 24)
    sides = [grpo_kernels.fp8_quantize(torch.randn(rows, n, device=device), transpose=True) for n in (width, columns)]
    offsets = torch.tensor([0, rows // 2, rows - 128, rows], device=device)
    return lambda: run_op("fp8_grouped_gemm_wgrad", (*sides[0], *sides[1], offsets, torch.float32), device)


def _moe_experts(device: str, **options: Any) -> Callable[[], list[Tensor]]:
    ids, experts = _routes(device)
    gate_up, down, _ = _parameters(device, experts)
    x = torch.randn(len(ids), down.shape[1], device=device).to(down.dtype)
    weights = torch.rand(ids.shape, device=device)

    def function(x: Tensor, up: Tensor, down: Tensor, w: Tensor) -> Tensor:
        return grpo_kernels.moe_experts(x, up, down, (w, ids), **options)

    call = Call("big", function, lambda device: (x, gate_up, down, weights), (0, 1, 2, 3))
    return lambda: run(call, inputs_of(call, device))


BIG: dict[str, Callable[[str], Callable[[], list[Tensor]]]] = {
    "token_log_probs": lambda device: _token_log_probs(device, torch.float32),
    "token_log_probs-bf16": lambda device: _token_log_probs(device, torch.bfloat16, softcap=20.0, temperature=0.7),
    "token_log_probs-in_place": lambda device: _token_log_probs(device, torch.bfloat16, inplace_backward=True),
    "group_advantages": lambda device: _group_advantages(device, group_size=16),
    "group_advantages-ragged": lambda device: _group_advantages(device, normalize_by="batch"),
    "group_advantages-tokens": lambda device: _group_advantages(
        device, baseline="length_weighted", normalize_by="batch_tokens"
    ),
    "informative_groups": lambda device: _groups(
        device, lambda scores, ids: grpo_kernels.informative_groups(scores, group_ids=ids)
    ),
    "best_of_group": lambda device: _groups(
        device, lambda scores, ids: grpo_kernels.best_of_group(scores, 2, group_ids=ids)
    ),
    "grpo_loss": lambda device: _grpo_loss(device, "dapo", packed=False),
    "grpo_loss-sequences": lambda device: _grpo_loss(device, "gspo", packed=False),
    "grpo_loss-packed": lambda device: _grpo_loss(device, "grpo", packed=True),
    "linear_token_log_probs": lambda device: _linear_token_log_probs(device, ()),
    "linear_token_log_probs-everything": lambda device: _linear_token_log_probs(
        device, ("entropy", "sum_squared_probs", "top1_ids"), softcap=20.0, temperature=0.7
    ),
    "linear_cross_entropy": lambda device: _linear_cross_entropy(device, "mean"),
    "linear_cross_entropy-per_token": lambda device: _linear_cross_entropy(device, "none"),
    "linear_grpo_loss": lambda device: _linear_grpo_loss(device, GRPOLossConfig.preset("dapo", entropy_coef=0.1)),
    "linear_grpo_loss-sequences": lambda device: _linear_grpo_loss(device, GRPOLossConfig.preset("gspo")),
    "mtp_linear_cross_entropy": lambda device: _mtp_linear_cross_entropy(device, policy=False),
    "mtp_linear_cross_entropy-policy": lambda device: _mtp_linear_cross_entropy(device, policy=True),
    "mtp_linear_cross_entropy-detached": lambda device: _mtp_linear_cross_entropy(
        device, policy=False, detach_head=True, z_loss=0.01
    ),
    "verify_draft": lambda device: _verify_draft(device, temperature=0.7),
    "verify_draft-filters": lambda device: _verify_draft(device, top_k=40, top_p=0.9),
    "verify_draft-block": lambda device: _verify_draft(device, mode="block"),
    "verify_draft-greedy": lambda device: _verify_draft(device, mode="greedy"),
    "moe_router": lambda device: _moe_router(device, **_ROUTES),
    "moe_router-losses": lambda device: _moe_router(
        device, replay=True, z_loss_coef=1.0, aux_loss_coef=1.0, seq_aux_loss_coef=1.0
    ),
    "build_permutation": lambda device: _build_permutation(device),
    "build_permutation-aligned": lambda device: _build_permutation(device, alignment=16, expert_range=(4, 20)),
    "moe_permute": lambda device: _moves(device, back=False),
    "moe_unpermute": lambda device: _moves(device, back=True),
    "moe_permute_quantize": lambda device: _moved_and_quantized(device),
    "moe_permute_quantize-both": lambda device: _moved_and_quantized(device, transpose="both"),
    "fp8_quantize": lambda device: _quantized(device, back=False),
    "fp8_quantize-both": lambda device: _quantized(device, back=False, transpose="both"),
    "fp8_quantize-square": lambda device: _quantized(device, back=False, block=(128, 128), transpose="both"),
    "fp8_dequantize": lambda device: _quantized(device, back=True),
    "grouped_gemm": _grouped_gemm,
    "grouped_gemm-fp8": _fp8_product,
    "grouped_gemm-fp8_wgrad": _fp8_wgrad,
    "moe_experts": lambda device: _moe_experts(device),
    "moe_experts-fp8": lambda device: _moe_experts(device, recipe="fp8_block128"),
    "moe_experts-fp8_wgrad": lambda device: _moe_experts(
        device, recipe="fp8_block128", fp8_wgrad=True, save="input", activation="clamped_swiglu", interleaved=True
    ),
    "moe_experts-recomputed": lambda device: _moe_experts(device, save="input", activation="clamped_swiglu"),
}
