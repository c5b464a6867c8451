"""Samples of the linear ops: log-probs, cross-entropy and loss from hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import LoRAFactors
from python_tests.samples import BadCall, Call
from python_tests.samples.token_log_probs import IDS, MASK, TEMPERATURES, UPSTREAM, statistics

WIDTH, VOCAB, RANK = 9, 37, 2
GENERATOR = torch.Generator().manual_seed(0)


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=GENERATOR) * scale


HIDDEN = _normal(2, 3, WIDTH)
WEIGHT = _normal(VOCAB, WIDTH)
BIAS = _normal(VOCAB)
BIAS[:7] = float("-inf")
BIAS[1] = 0.5
A, B = _normal(RANK, WIDTH, scale=0.5), _normal(VOCAB, RANK, scale=0.5)
LIVE_IDS = IDS.clamp(min=12)
EVERY_OUTPUT = ("entropy", "sum_squared_probs", "top1_ids")

# --- registered ops: 2-D, everything of one dtype --------------------------------------------------------------------

X, I = HIDDEN.reshape(6, WIDTH), IDS.reshape(6)
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


EVERYTHING = (True, True, True, True)
OPS = {
    "linear_token_log_probs": [
        (*_head(torch.float32, False), I, *PLAIN, False, False, False, True),
        (*_head(torch.bfloat16, True), I.int(), *FULL, True, True, True, True),
        (*_head(torch.float16, True), I, *PLAIN, True, False, True, False),
        (*_head(torch.float32, False, X[:0]), I[:0], *PLAIN, True, True, True, True),
    ],
    "linear_token_log_probs_backward": [
        _backward(torch.float32, False, (True, True, False, False)),
        _backward(torch.float32, True, EVERYTHING),
        _backward(torch.bfloat16, True, EVERYTHING, results=torch.float32),
        _backward(torch.float16, True, (False, False, True, True)),
        _backward(torch.bfloat16, False, (True, True, False, False), accumulator=True),
        _backward(torch.float32, False, (True, True, False, False), hidden=X[:0], ids=I[:0]),
    ],
}

# --- public calls ----------------------------------------------------------------------------------------------------


def _make(*tensors: Tensor) -> Any:
    return lambda device: tuple(tensor.to(device) for tensor in tensors)


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
]

# --- wrong calls -----------------------------------------------------------------------------------------------------


def _head_mistakes(op: str, call: Any) -> list[BadCall]:
    """What every op on a head rejects alike; `call(hidden=..., weight=..., ...)` is right without arguments."""

    def bad(name: str, error: type[Exception], *says: str, **arguments: Any) -> BadCall:
        return BadCall(f"{op}_{name}", lambda: call(**arguments), error, (f"{op}: ", *says))

    needs_grad = WEIGHT.clone().requires_grad_()
    accumulator = torch.zeros_like(WEIGHT)
    return [
        bad("hidden_list", TypeError, "hidden must be a torch.Tensor, got list", hidden=[1.0]),
        bad("hidden_dtype", TypeError, "hidden must have dtype float32", "got int64", hidden=HIDDEN.long()),
        bad("hidden_scalar", ValueError, "hidden must have shape [..., H] with H >= 1, got []", hidden=HIDDEN[0, 0, 0]),
        bad("weight_list", TypeError, "weight must be a torch.Tensor, got list", weight=[1.0]),
        bad("weight_dtype", TypeError, "weight must have dtype float32", "got int64", weight=WEIGHT.long()),
        bad("weight_device", ValueError, "weight must be on cpu like hidden, got meta", weight=WEIGHT.to("meta")),
        bad(
            "weight_shape", ValueError, f"weight must have shape [V, H] = [V, {WIDTH}]", "got [9, 37]", weight=WEIGHT.T
        ),
        bad("weight_vector", ValueError, "weight must have shape [V, H], got [37]", "ZeRO-3", weight=BIAS),
        bad("weight_empty", ValueError, "weight must have shape [V, H]", "got [0, 9]", weight=WEIGHT[:0]),
        bad("bias_shape", ValueError, "bias must have shape [V] = [37], got [36]", bias=BIAS[1:]),
        bad("bias_dtype", TypeError, "bias must have dtype float32", bias=BIAS.bool()),
        bad("lora_type", TypeError, "lora must be LoRAFactors(a, b, scale), got tuple", lora=(A, B, 1.0)),
        bad(
            "lora_a",
            ValueError,
            f"lora.a must have shape [r, H] = [r, {WIDTH}] with r >= 1, got [2, 8]",
            lora=LoRAFactors(A[:, 1:], B),
        ),
        bad("lora_b", ValueError, "lora.b must have shape [V, r] = [37, 2], got [2, 37]", lora=LoRAFactors(A, B.T)),
        bad("lora_scale", ValueError, "lora.scale must be finite, got nan", lora=LoRAFactors(A, B, float("nan"))),
        bad(
            "accumulator_shape",
            ValueError,
            "weight_grad_accumulator must have shape [V, H] = [37, 9], got [36, 9]",
            weight=needs_grad,
            weight_grad_accumulator=accumulator[1:],
        ),
        bad(
            "accumulator_dtype",
            TypeError,
            "weight_grad_accumulator must have dtype float32, got bfloat16",
            weight=needs_grad,
            weight_grad_accumulator=accumulator.bfloat16(),
        ),
        bad(
            "accumulator_strides",
            ValueError,
            "weight_grad_accumulator must have a dense last axis",
            weight=needs_grad,
            weight_grad_accumulator=torch.zeros(WIDTH, VOCAB).T,
        ),
        bad(
            "accumulator_frozen",
            ValueError,
            "weight_grad_accumulator is for the gradient of weight, which does not require one",
            weight_grad_accumulator=accumulator,
        ),
        bad("logit_scale", ValueError, "logit_scale must not be 0", logit_scale=0.0),
        bad("softcap", ValueError, "softcap must be finite and > 0, got 0", softcap=0.0),
    ]


def _log_probs(hidden: Any = HIDDEN, weight: Any = WEIGHT, token_ids: Any = IDS, **options: Any) -> Any:
    return grpo_kernels.linear_token_log_probs(hidden, weight, token_ids, **options)


def _bad(name: str, error: type[Exception], *says: str, **arguments: Any) -> BadCall:
    op = "linear_token_log_probs"
    return BadCall(f"{op}_{name}", lambda: _log_probs(**arguments), error, (f"{op}: ", *says))


BAD_CALLS = [
    *_head_mistakes("linear_token_log_probs", _log_probs),
    _bad("id_shape", ValueError, "token_ids must have shape [...] = [2, 3], got [3, 2]", token_ids=IDS.T),
    _bad("id_dtype", TypeError, "token_ids must have dtype int64, int32, got float32", token_ids=IDS.float()),
    _bad("id_range", ValueError, "token_ids", "must be < V = 20", "got 36", weight=WEIGHT[:20]),
    _bad("mask", ValueError, "mask must have shape [...] = [2, 3], got [3]", mask=MASK[0]),
    _bad("temperature", ValueError, "temperature must be finite and > 0, got 0", temperature=0),
    _bad("temperature_shape", ValueError, "temperature must have shape [...] = [2, 3]", temperature=torch.ones(2)),
    _bad("outputs", ValueError, "outputs must be one of 'entropy'", "'top2'", outputs=("top2",)),
]
