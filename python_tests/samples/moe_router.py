"""Samples of moe_router."""

from __future__ import annotations

import torch

import grpo_kernels
from python_tests.samples import BadCall, Call

INF, NAN = float("inf"), float("nan")

# Logits far enough apart that backends cannot disagree about the choice.
Z = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(row)) for row in range(6)]) * 0.5 - 1.5
HOLES = Z.clone()
HOLES[2, :5], HOLES[4, ::2] = -INF, -INF
HARD = HOLES.clone()
HARD[1, 3], HARD[3, 2], HARD[5] = NAN, INF, -INF
BIAS = torch.tensor([0.05, -0.3, 0.0, 0.2, -0.1, 0.35, 0.15, -0.25])
MASK = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.bool)
REPLAY = torch.tensor([[3, 1], [-1, -1], [0, -1], [-1, 7], [5, 4], [2, 6]], dtype=torch.int32)
ENDS = torch.tensor([0, 2, 2, 6])

PLAIN = (2, "softmax", 1, 1, "top2_sum", True, 1.0, False, False, False)
FULL = (2, "sigmoid", 4, 2, "top2_sum", True, 2.5, True, True, True)


def _saved(logits, ids, balance_rows):
    """The backward's inputs: weights, ids, balance, live_tokens."""
    weights = (
        torch.linspace(0.1, 0.9, ids.numel())
        .view(ids.shape)
        .to(logits.dtype if logits.dtype == torch.float64 else torch.float32)
    )
    balance = torch.linspace(0.0, 0.2, balance_rows * logits.shape[1]).view(balance_rows, -1).to(weights.dtype)
    return weights, ids.to(torch.int32), balance, torch.tensor(5, dtype=torch.int32)


IDS = torch.tensor([[0, 1], [-1, -1], [2, 7], [6, 5], [3, 4], [7, 0]])
_W, _I, _B, _L = _saved(Z, IDS, 4)
_NO_BALANCE = torch.empty(0, 8)
UP = torch.linspace(-1.0, 1.0, 12).view(6, 2)
UP_LOSSES = torch.tensor([0.5, -1.0, 2.0])

OPS = {
    "moe_router": [
        (HOLES, None, None, None, None, *PLAIN),
        (Z.bfloat16(), BIAS, MASK, REPLAY, ENDS, *FULL),
        (Z.double()[:, ::2], None, None, None, None, 3, "sqrtsoftplus", 2, 2, "max", False, 1.0, True, True, False),
        (Z[:0], BIAS, None, None, ENDS[:1], 2, "topk_softmax", 1, 1, "max", True, 1.0, False, False, True),
    ],
    "moe_router_backward": [
        (Z, _W, _I, None, _NO_BALANCE, _L, UP, None, "softmax", True, 1.0, False, False, False),
        (Z.half(), _W, _I, ENDS, _B, _L, UP, UP_LOSSES, "sigmoid", True, 2.5, True, True, True),
        (Z, _W, _I, None, _B[:1], _L, None, UP_LOSSES, "softmax", False, 1.0, True, True, False),
        (Z[:0], _W[:0], _I[:0], None, _NO_BALANCE, _L, UP[:0], None, "sqrtsoftplus", False, 1.0, False, False, False),
    ],
}


def _all(logits, ends):
    return grpo_kernels.moe_router(
        logits, 2, scoring_func="sigmoid", n_group=4, topk_group=2, routed_scaling_factor=2.5, cu_seqlens=ends,
        z_loss_coef=0.1, aux_loss_coef=0.2, seq_aux_loss_coef=0.3,
    )  # fmt: skip


CALLS = [
    Call("softmax", lambda z: grpo_kernels.moe_router(z, 2), lambda device: (HARD.to(device),), differentiable=(0,)),
    Call("losses", _all, lambda device: (Z.to(device), ENDS.to(device)), differentiable=(0,)),
    Call(
        "replay",
        lambda z, bias, mask, ids: grpo_kernels.moe_router(
            z, 2, scoring_func="sqrtsoftplus", e_score_correction_bias=bias, token_mask=mask, replay_ids=ids
        ),
        lambda device: (Z.bfloat16().to(device), BIAS.to(device), MASK.to(device), REPLAY.to(device)),
        differentiable=(0,),
    ),
    Call(
        "empty",
        lambda z: grpo_kernels.moe_router(z, 2, norm_topk_prob=False, aux_loss_coef=1.0),
        lambda device: (Z[:0].to(device),),
        differentiable=(0,),
    ),
]


def _bad(name, error, *says, logits=Z, top_k=2, **options):
    return BadCall(f"moe_router_{name}", lambda: grpo_kernels.moe_router(logits, top_k, **options), error, says)


BAD_CALLS = [
    _bad("list", TypeError, "moe_router: logits must be a torch.Tensor, got list", logits=[1.0]),
    _bad("integer", TypeError, "logits must have dtype float32", "int64", logits=IDS),
    _bad("ndim", ValueError, "logits must have shape [T, E], got [6, 4, 2]", logits=Z.view(6, 4, 2)),
    _bad("no_experts", ValueError, "1 <= E <= 1024, got [6, 0]", logits=Z[:, :0]),
    _bad("many_experts", ValueError, "1 <= E <= 1024, got [2, 1025]", logits=torch.zeros(2, 1025)),
    _bad("top_k_zero", ValueError, "top_k must be >= 1, got 0", top_k=0),
    _bad("top_k_float", TypeError, "top_k must be an int, got float", top_k=2.0),
    _bad("top_k_experts", ValueError, "top_k must be <= min(E, 32) = 8, got 9", top_k=9),
    _bad("top_k_large", ValueError, "top_k must be <= min(E, 32) = 32, got 33", logits=torch.zeros(1, 64), top_k=33),
    _bad("many_slots", ValueError, "T * K must be < 2^31", "1073741824 * 2", logits=Z[:1].expand(2**30, 8)),
    _bad("scoring", ValueError, "scoring_func must be one of 'softmax'", "'tanh'", scoring_func="tanh"),
    _bad("group_score", ValueError, "group_score must be one of 'top2_sum', 'max', got 'sum'", group_score="sum"),
    _bad("n_group", ValueError, "n_group must divide E = 8, got 3", n_group=3),
    _bad("n_group_zero", ValueError, "n_group must be >= 1, got 0", n_group=0),
    _bad("topk_group", ValueError, "topk_group must be <= n_group = 4, got 5", n_group=4, topk_group=5),
    _bad(
        "groups_too_small",
        ValueError,
        "topk_group = 1 of 4 groups leave 2 experts, fewer than top_k = 3",
        n_group=4,
        top_k=3,
    ),
    _bad("norm", TypeError, "norm_topk_prob must be a bool, got int", norm_topk_prob=1),
    _bad("scaling", ValueError, "routed_scaling_factor must be finite and > 0, got 0", routed_scaling_factor=0.0),
    _bad(
        "bias_dtype",
        TypeError,
        "e_score_correction_bias must have dtype float32, got bfloat16: it decides between scores",
        e_score_correction_bias=BIAS.bfloat16(),
    ),
    _bad(
        "bias_half_of_double",
        TypeError,
        "must have dtype float32 or float64, got float16",
        logits=Z.double(),
        e_score_correction_bias=BIAS.half(),
    ),
    _bad("bias_double", TypeError, "must have dtype float32, got float64", e_score_correction_bias=BIAS.double()),
    _bad(
        "bias_shape",
        ValueError,
        "e_score_correction_bias must have shape [E] = [8], got [7]",
        e_score_correction_bias=BIAS[:7],
    ),
    _bad("bias_list", TypeError, "e_score_correction_bias must be a torch.Tensor", e_score_correction_bias=[0.0] * 8),
    _bad("mask_shape", ValueError, "token_mask must have shape [T] = [6], got [5]", token_mask=MASK[:5]),
    _bad("mask_device", ValueError, "token_mask must be on cpu like logits, got meta", token_mask=MASK.to("meta")),
    _bad("replay_shape", ValueError, "replay_ids must have shape [T, K] = [6, 2], got [6, 1]", replay_ids=IDS[:, :1]),
    _bad("replay_dtype", TypeError, "replay_ids must have dtype int32, int64, int16, int8, uint8", replay_ids=UP),
    _bad(
        "replay_twice",
        ValueError,
        "replay_ids must be distinct and in [-1, E) = [-1, 8)",
        "got [3, 3] for token 4",
        replay_ids=torch.tensor([[0, 1], [1, 2], [-1, 5], [-1, -1], [3, 3], [9, 9]]),
    ),
    _bad("replay_outside", ValueError, "got [0, 8] for token 0", replay_ids=torch.tensor([[0, 8]] * 6)),
    _bad("replay_negative", ValueError, "got [-2, 0] for token 0", replay_ids=torch.tensor([[-2, 0]] * 6)),
    _bad("ends_dtype", TypeError, "cu_seqlens must have dtype int64, int32", cu_seqlens=UP),
    _bad("ends_shape", ValueError, "cu_seqlens must have shape [B + 1], got [0]", cu_seqlens=ENDS[:0]),
    _bad(
        "ends_down",
        ValueError,
        "cu_seqlens must rise from 0 to T = 6 without a step down, got 4, 2 for sequence 1 of 3",
        cu_seqlens=torch.tensor([0, 4, 2, 6]),
        seq_aux_loss_coef=1.0,
    ),
    _bad(
        "ends_short",
        ValueError,
        "got 2, 5 for sequence 1 of 2",
        cu_seqlens=torch.tensor([0, 2, 5]),
        seq_aux_loss_coef=1.0,
    ),
    _bad("coef", ValueError, "z_loss_coef must be finite, got nan", z_loss_coef=NAN),
    _bad("coef_type", TypeError, "aux_loss_coef must be a number, got str", aux_loss_coef="small"),
    _bad("coef_shape", ValueError, "seq_aux_loss_coef must be a number or a 0-d tensor", seq_aux_loss_coef=UP_LOSSES),
]
