"""Samples of the linear ops: log-probs, cross-entropy and loss from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import GRPOLossConfig, LoRAFactors
from python_tests.samples import Call
from python_tests.samples._linear_head import ADVANTAGES, BIAS, HIDDEN, OLD, VOCAB, WEIGHT, WIDTH, A, B
from python_tests.samples._linear_mistakes import BAD_CALLS as BAD_CALLS
from python_tests.samples.token_log_probs import IDS, MASK, TEMPERATURES, UPSTREAM, statistics

LIVE_IDS = IDS.clamp(min=12)
POLICY_IDS = torch.where(IDS < 0, IDS, LIVE_IDS)  # no policy has sampled an impossible token
EVERY_OUTPUT = ("entropy", "sum_squared_probs", "top1_ids")

# --- registered ops: 2-D, everything of one dtype --------------------------------------------------------------------

X, I, POLICY_I = HIDDEN.reshape(6, WIDTH), IDS.reshape(6), POLICY_IDS.reshape(6)
PLAIN = (None, None, 1.0, 1.0, 0.0)  # mask, temperature tensor, temperature, logit_scale, softcap
FULL = (MASK.reshape(6), TEMPERATURES.reshape(6), 0.0, 1.3, 5.0)


def _head(dtype: torch.dtype, full: bool, hidden: Tensor = X) -> tuple[Any, ...]:
    """Hidden states, weight, bias, LoRA factors and their scale."""
    optional = (BIAS, A, B) if full else (None, None, None)
    return (hidden.to(dtype), WEIGHT.to(dtype), *(None if t is None else t.to(dtype) for t in optional), 0.5)


def _backward(
    dtype: torch.dtype,
    full: bool,
    needs: tuple[bool, bool, bool, bool],
    *,
    hidden: Tensor = X,
    ids: Tensor = I,
    accumulator: bool = False,
    results: torch.dtype | None = None,
) -> tuple[Any, ...]:
    """Needs are those of hidden, weight, bias and the LoRA factors."""
    rows = FULL if full else PLAIN
    logits = hidden @ WEIGHT.T + (BIAS + 0.5 * hidden @ A.T @ B.T if full else 0.0)
    upstream = UPSTREAM.reshape(-1)[: len(ids)]
    others = (upstream.cos(), upstream.sin()) if full else (None, None)
    return (
        *_head(dtype, full, hidden), ids, *rows, statistics(logits, ids), upstream, *others,
        torch.ones(VOCAB, WIDTH) if accumulator else None, *needs, results or dtype, results or dtype,
    )  # fmt: skip


def _cross_entropy(
    dtype: torch.dtype, full: bool, needs: tuple[bool, bool, bool, bool], *, hidden: Tensor = X, ids: Tensor = I
) -> tuple[Any, ...]:
    """With `full` a factor for every row, and the likeliest tokens."""
    factor = torch.linspace(0.0, 0.5, len(ids)) if full else torch.tensor(1.0)
    rows = (*FULL, factor, 0.1, True) if full else (*PLAIN, factor, 0.0, False)
    return (*_head(dtype, full, hidden), ids, *rows, *needs, dtype, dtype)


def _loss(
    dtype: torch.dtype,
    full: bool,
    needs: tuple[bool, bool, bool, bool],
    *,
    hidden: Tensor = X,
    ids: Tensor = POLICY_I,
    sequence_length: int = 0,
    behind: int = 0,
) -> tuple[Any, ...]:
    """Two sequences of three tokens; with `full` every input, and a sampler's correction. The last `behind` rows carry
    cross-entropy, and their likeliest tokens are wanted."""
    count = len(ids) - behind
    old = torch.linspace(-4.0, -1.0, count)
    config = GRPOLossConfig(
        reduction="none", ratio_level="sequence" if sequence_length else "token", kl_coef=0.3 if full else 0.0,
        sampler_correction="token_truncate" if full else "none",
    )  # fmt: skip
    optional = (old + 0.2, old - 0.1, torch.linspace(0.5, 1.5, count)) if full else (None, None, None)
    bonus, coefficient = (torch.tensor(-0.05), torch.tensor(0.3)) if full else (None, None)
    options, parameters = config.pack()
    return (
        *_head(dtype, full, hidden), ids, *(FULL if full else PLAIN), old, old.cos(), *optional,
        torch.full((count,), 0.2), bonus, coefficient, 0.0, sequence_length, list(options), list(parameters),
        torch.linspace(0.1, 0.4, behind) if behind else None, 0.1 if behind else 0.0, behind > 0, *needs, dtype, dtype,
    )  # fmt: skip


EVERYTHING, BASE = (True, True, True, True), (True, True, False, False)
OPS = {
    "linear_token_log_probs": [
        (*_head(torch.float32, False), I, *PLAIN, False, False, False, True),
        (*_head(torch.bfloat16, True), I.int(), *FULL, True, True, True, True),
        (*_head(torch.float16, True), I, *PLAIN, True, False, True, False),
        (*_head(torch.float32, False, X[:0]), I[:0], *PLAIN, True, True, True, True),
    ],
    "linear_token_log_probs_backward": [
        _backward(torch.float32, False, BASE),
        _backward(torch.float32, True, EVERYTHING),
        _backward(torch.bfloat16, True, EVERYTHING, results=torch.float32),
        _backward(torch.float16, True, (False, False, True, True)),
        _backward(torch.bfloat16, False, BASE, accumulator=True),
        _backward(torch.float32, False, BASE, hidden=X[:0], ids=I[:0]),
    ],
    "linear_cross_entropy": [
        _cross_entropy(torch.float32, False, BASE),
        _cross_entropy(torch.bfloat16, True, EVERYTHING),
        _cross_entropy(torch.float32, True, (False, True, True, False)),
        _cross_entropy(torch.float32, False, BASE, hidden=X[:0], ids=I[:0]),
        _cross_entropy(torch.float32, False, BASE, ids=torch.full_like(I, -100)),
    ],
    "linear_grpo_loss": [
        _loss(torch.float32, False, BASE),
        _loss(torch.bfloat16, True, EVERYTHING),
        _loss(torch.float32, True, (True, False, False, True), sequence_length=3),
        _loss(torch.float32, True, EVERYTHING, behind=2),
        _loss(torch.bfloat16, False, BASE, sequence_length=3, behind=3),
        _loss(torch.float32, False, BASE, hidden=X[:0], ids=I[:0]),
        _loss(torch.float32, False, BASE, ids=torch.full_like(I, -100)),
    ],
}

# --- public calls ----------------------------------------------------------------------------------------------------


def _make(*tensors: Tensor) -> Any:
    return lambda device: tuple(tensor.to(device) for tensor in tensors)


def _loss_call(name: str, config: GRPOLossConfig, *, packed: bool = False) -> Call:
    """Two sequences of three tokens; packed one of four and one of two."""

    def function(x: Tensor, w: Tensor, i: Tensor, old: Tensor, advantages: Tensor, m: Tensor) -> Any:
        given = [value.flatten(0, 1) if packed else value for value in (x, i, old, m)]
        x, i, old, m = given
        cu_seqlens = torch.tensor([0, 4, 6], device=x.device) if packed else None
        return grpo_kernels.linear_grpo_loss(
            x, w, i, old, advantages, m, config, ref_log_probs=old.sin() - 3.0, cu_seqlens=cu_seqlens
        )

    return Call(name, function, _make(FLAT, WEIGHT, POLICY_IDS, OLD, ADVANTAGES, MASK), (0, 1), autocast=(0, 1))


FLAT = HIDDEN * 0.3  # of log-probs near those
HALF_HEAD = (HIDDEN.bfloat16(), WEIGHT.bfloat16())
CALLS = [
    Call(
        "log_probs",
        lambda x, w, i: grpo_kernels.linear_token_log_probs(x, w, i),
        _make(HIDDEN, WEIGHT, IDS),
        (0, 1),
        autocast=(0, 1),
    ),
    Call(
        "log_probs_everything",
        lambda x, w, i, bias, m, t, a, b: grpo_kernels.linear_token_log_probs(
            x,
            w,
            i,
            bias=bias,
            mask=m,
            temperature=t,
            logit_scale=1.3,
            softcap=5.0,
            lora=LoRAFactors(a, b, 0.5),
            outputs=EVERY_OUTPUT,
        ),
        _make(HIDDEN, WEIGHT, IDS, BIAS, MASK, TEMPERATURES, A, B),
        (0, 1, 3, 6, 7),
        autocast=(0, 1, 3, 6, 7),
    ),
    Call(
        "log_probs_lora_alone",
        lambda x, w, i, a, b: grpo_kernels.linear_token_log_probs(
            x, w, i, lora=LoRAFactors(a, b, 2.0), temperature=0.7, outputs=("entropy",)
        ),
        _make(HIDDEN, WEIGHT, IDS, A, B),
        (3, 4),
        autocast=(0, 1, 3, 4),
    ),
    Call(
        "log_probs_strided",
        lambda x, w, i: grpo_kernels.linear_token_log_probs(x.transpose(0, 1), w[::2], i.T.clamp(max=15)),
        _make(HIDDEN, WEIGHT, IDS),
        (0, 1),
        autocast=(0, 1),
    ),
    Call(
        "log_probs_bf16",
        lambda x, w, i: grpo_kernels.linear_token_log_probs(x[:, :-1], w, i[:, 1:], outputs=("entropy",)),
        _make(*HALF_HEAD, LIVE_IDS.int()),
        (0, 1),
        autocast=(0, 1),
        rounds=torch.bfloat16,
    ),
    Call(
        "log_probs_one_row",
        lambda x, w, i: grpo_kernels.linear_token_log_probs(x, w, i),
        _make(HIDDEN[1, 1], WEIGHT, IDS[1, 1]),
        (0, 1),
        autocast=(0, 1),
    ),
    Call(
        "log_probs_empty",
        lambda x, w, i: grpo_kernels.linear_token_log_probs(x, w, i, outputs=EVERY_OUTPUT),
        _make(HIDDEN[:0], WEIGHT, IDS[:0]),
        (0, 1),
        autocast=(0, 1),
    ),
    Call(
        "log_probs_all_masked",
        lambda x, w, i, m: grpo_kernels.linear_token_log_probs(x * float("nan"), w, i, mask=m, outputs=EVERY_OUTPUT),
        _make(HIDDEN, WEIGHT, IDS, torch.zeros_like(MASK)),
        (1,),
        autocast=(0, 1),
    ),
    Call(
        "log_probs_frozen",
        lambda x, w, i: grpo_kernels.linear_token_log_probs(x, w, i, outputs=EVERY_OUTPUT),
        _make(HIDDEN, WEIGHT, IDS),
        autocast=(0, 1),
    ),
    Call(
        "cross_entropy",
        lambda x, w, i: grpo_kernels.linear_cross_entropy(x, w, i),
        _make(HIDDEN, WEIGHT, IDS),
        (0, 1),
        autocast=(0, 1),
    ),
    Call(
        "cross_entropy_everything",
        lambda x, w, i, bias, a, b: grpo_kernels.linear_cross_entropy(
            x,
            w,
            i,
            bias=bias,
            lora=LoRAFactors(a, b, 0.5),
            logit_scale=1.3,
            softcap=5.0,
            z_loss=0.1,
            ignore_index=12,
            reduction="sum",
        ),
        _make(HIDDEN, WEIGHT, IDS, BIAS, A, B),
        (0, 1, 3, 4, 5),
        autocast=(0, 1, 3, 4, 5),
    ),
    Call(
        "cross_entropy_per_token",
        lambda x, w, i: grpo_kernels.linear_cross_entropy(x.transpose(0, 1), w, i.T, z_loss=0.1, reduction="none"),
        _make(HIDDEN, WEIGHT, IDS),
        (0, 1),
        autocast=(0, 1),
    ),
    Call(
        "cross_entropy_bf16",
        lambda x, w, i: grpo_kernels.linear_cross_entropy(x[:, :-1], w, i[:, 1:]),
        _make(*HALF_HEAD, LIVE_IDS.int()),
        (0, 1),
        autocast=(0, 1),
        rounds=torch.bfloat16,
    ),
    Call(
        "cross_entropy_nothing_counts",
        lambda x, w, i: grpo_kernels.linear_cross_entropy(x * float("nan"), w, i),
        _make(HIDDEN, WEIGHT, torch.full_like(IDS, -100)),
        (1,),
        autocast=(0, 1),
    ),
    Call(
        "cross_entropy_empty",
        lambda x, w, i: grpo_kernels.linear_cross_entropy(x, w, i),
        _make(HIDDEN[:0], WEIGHT, IDS[:0]),
        (0, 1),
        autocast=(0, 1),
    ),
    _loss_call("loss_of_sequences", GRPOLossConfig.preset("gspo", kl_coef=0.3, entropy_coef=0.1)),
    _loss_call("loss_per_token", GRPOLossConfig(reduction="none", kl_coef=0.3, entropy_coef=0.1)),
    _loss_call("loss_packed", GRPOLossConfig.preset("grpo", kl_coef=0.3), packed=True),
    Call(
        "loss_everything",
        lambda x, w, i, bias, m, t, a, b, old, advantages: grpo_kernels.linear_grpo_loss(
            x,
            w,
            i,
            old,
            advantages,
            m,
            GRPOLossConfig(kl_coef=0.3, entropy_coef=0.1),
            bias=bias,
            temperature=t,
            logit_scale=1.3,
            softcap=5.0,
            lora=LoRAFactors(a, b, 0.5),
            ref_log_probs=old.flip(0),
            token_weights=t,
            sampler_log_probs=old + 0.1,
        ),
        _make(FLAT, WEIGHT, POLICY_IDS, BIAS, MASK, TEMPERATURES, A, B, OLD, ADVANTAGES),
        (0, 1, 3, 6, 7),
        autocast=(0, 1, 3, 6, 7),
    ),
    Call(
        "loss_on_policy_bf16",
        lambda x, w, i, advantages: grpo_kernels.linear_grpo_loss(x, w, i, None, advantages, None),
        _make(*HALF_HEAD, LIVE_IDS, ADVANTAGES),
        (0, 1),
        autocast=(0, 1),
        rounds=torch.bfloat16,
    ),
    Call(
        "loss_nothing_counts",
        lambda x, w, i, old, advantages, m: grpo_kernels.linear_grpo_loss(x * float("nan"), w, i, old, advantages, m),
        _make(HIDDEN, WEIGHT, IDS, OLD, ADVANTAGES, torch.zeros_like(MASK)),
        (1,),
        autocast=(0, 1),
    ),
    Call(
        "loss_empty",
        lambda x, w, i, old, advantages: grpo_kernels.linear_grpo_loss(x, w, i, old, advantages, None),
        _make(HIDDEN[:0], WEIGHT, IDS[:0], OLD[:0], ADVANTAGES[:0]),
        (0, 1),
        autocast=(0, 1),
    ),
]
