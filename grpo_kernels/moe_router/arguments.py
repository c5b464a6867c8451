"""Checks of the router's arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grpo_kernels import _checks
from grpo_kernels.moe_router.options import GROUP_SCORES, MAX_EXPERTS, MAX_TOP_K, SCORING_FUNCS, RouterOptions

OP = "moe_router"
REPLAY_DTYPES = (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8)


def check_logits(logits: Tensor) -> None:
    """[T, E], 1 <= E <= 1024."""
    _checks.check_tensor(OP, "logits", logits)
    _checks.check_dtype(OP, "logits", logits)
    _checks.check_ndim(OP, "logits", logits, "[T, E]")
    if not 1 <= logits.shape[1] <= MAX_EXPERTS:
        raise ValueError(f"{OP}: logits must have shape [T, E] with 1 <= E <= {MAX_EXPERTS}, got {list(logits.shape)}")


def check_options(tokens: int, experts: int, options: RouterOptions) -> None:
    """The options by themselves, and against the numbers of tokens and experts."""
    _check_options(tokens, experts, *options)


@_checks.remembered
def _check_options(tokens: int, experts: int, *values: Any) -> None:
    options = RouterOptions(*values)
    _checks.check_integer(OP, "top_k", options.top_k, minimum=1)
    if options.top_k > min(MAX_TOP_K, experts):
        raise ValueError(f"{OP}: top_k must be <= min(E, {MAX_TOP_K}) = {min(experts, MAX_TOP_K)}, got {options.top_k}")
    if tokens * options.top_k >= 2**31:
        raise ValueError(f"{OP}: T * K must be < 2^31, which counts can hold, got {tokens} * {options.top_k}")
    _checks.check_choice(OP, "scoring_func", options.scoring_func, SCORING_FUNCS)
    _checks.check_choice(OP, "group_score", options.group_score, GROUP_SCORES)
    _checks.check_integer(OP, "n_group", options.n_group, minimum=1)
    if experts % options.n_group:
        raise ValueError(f"{OP}: n_group must divide E = {experts}, got {options.n_group}")
    _checks.check_integer(OP, "topk_group", options.topk_group, minimum=1)
    if options.topk_group > options.n_group:
        raise ValueError(f"{OP}: topk_group must be <= n_group = {options.n_group}, got {options.topk_group}")
    left = experts // options.n_group * options.topk_group
    if left < options.top_k:
        raise ValueError(f"{OP}: topk_group = {options.topk_group} of {options.n_group} groups leave {left} experts, "
                         f"fewer than top_k = {options.top_k}")  # fmt: skip
    if not isinstance(options.norm_topk_prob, bool):
        raise TypeError(f"{OP}: norm_topk_prob must be a bool, got {type(options.norm_topk_prob).__name__}")
    _checks.check_number(OP, "routed_scaling_factor", options.routed_scaling_factor, above=0.0)


def check_tensors(
    logits: Tensor,
    top_k: int,
    bias: Tensor | None,
    token_mask: Tensor | None,
    replay_ids: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """The optional tensors: types, shapes, devices."""
    tokens, experts = logits.shape
    if bias is not None:
        _check(logits, "e_score_correction_bias", bias, "[E]", [experts])
        wide = logits.dtype == torch.float64
        if bias.dtype != torch.float32 and not (wide and bias.dtype == torch.float64):
            raise TypeError(
                f"{OP}: e_score_correction_bias must have dtype float32{' or float64' if wide else ''}, got "
                f"{str(bias.dtype).removeprefix('torch.')}: it decides between scores that differ by less than a "
                "narrower type can tell, and then chooses other experts"
            )
    if token_mask is not None:
        _check(logits, "token_mask", token_mask, "[T]", [tokens])
    if replay_ids is not None:
        _check(logits, "replay_ids", replay_ids, "[T, K]", [tokens, top_k])
        _checks.check_dtype(OP, "replay_ids", replay_ids, REPLAY_DTYPES)
    if cu_seqlens is not None:
        _checks.check_tensor(OP, "cu_seqlens", cu_seqlens)
        _checks.check_dtype(OP, "cu_seqlens", cu_seqlens, _checks.INTEGER)
        _checks.check_same_device(OP, "cu_seqlens", cu_seqlens, "logits", logits)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"{OP}: cu_seqlens must have shape [B + 1], got {list(cu_seqlens.shape)}")


def _check(logits: Tensor, name: str, value: Any, symbol: str, shape: list[int]) -> None:
    _checks.check_tensor(OP, name, value)
    _checks.check_shape(OP, name, value, (symbol, shape))
    _checks.check_same_device(OP, name, value, "logits", logits)


def raise_replay(replay_ids: Tensor, token: int, experts: int) -> None:
    """The replayed ids of a token are no routes."""
    raise ValueError(
        f"{OP}: replay_ids must be distinct and in [-1, E) = [-1, {experts}), -1 for a slot to be filled, got "
        f"{replay_ids[token].tolist()} for token {token}"
    )


def raise_cu_seqlens(cu_seqlens: Tensor, sequence: int, tokens: int) -> None:
    """`cu_seqlens` does not cut [0, T] into sequences; `sequence` is the first that is wrong."""
    ends = cu_seqlens[sequence : sequence + 2].tolist()
    raise ValueError(
        f"{OP}: cu_seqlens must rise from 0 to T = {tokens} without a step down, got {', '.join(map(str, ends))} for "
        f"sequence {sequence} of {cu_seqlens.shape[0] - 1}"
    )


def raise_faults(
    logits: Tensor, token_mask: Tensor | None, replay_ids: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """On the CPU, where looking is free: raises for what only the data shows, as the kernels do."""
    if logits.device.type != "cpu" or torch.compiler.is_compiling():
        return
    tokens, experts = logits.shape
    if replay_ids is not None:
        ids = replay_ids.to(torch.int64)
        repeated = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(dim=-1) & (ids >= 0)
        faulty = ((ids < -1) | (ids >= experts) | repeated).any(dim=1)
        faulty = faulty if token_mask is None else faulty & token_mask
        if faulty.any():
            raise_replay(replay_ids, int(faulty.to(torch.uint8).argmax()), experts)
    if cu_seqlens is not None:
        ends = [0, *cu_seqlens[1:].tolist()] if cu_seqlens[0] == 0 else [1, 0]
        wrong = next((s for s in range(len(ends) - 1) if ends[s] > ends[s + 1]), None)
        if wrong is None and ends[-1] != tokens:
            wrong = max(len(ends) - 2, 0)
        if wrong is not None:
            raise_cu_seqlens(cu_seqlens, wrong, tokens)
