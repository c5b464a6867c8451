"""Calls of the linear ops that must raise."""

from __future__ import annotations

from typing import Any

import torch

import grpo_kernels
from grpo_kernels import GRPOLossConfig, LoRAFactors
from python_tests.samples import BadCall
from python_tests.samples._linear_head import ADVANTAGES, BIAS, HIDDEN, OLD, VOCAB, WEIGHT, WIDTH, A, B
from python_tests.samples.token_log_probs import IDS, MASK

X = HIDDEN.reshape(6, WIDTH)


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


def _entropy_loss(hidden: Any = HIDDEN, weight: Any = WEIGHT, target: Any = IDS, **options: Any) -> Any:
    return grpo_kernels.linear_cross_entropy(hidden, weight, target, **options)


def _policy_loss(hidden: Any = HIDDEN, weight: Any = WEIGHT, token_ids: Any = IDS, **options: Any) -> Any:
    given = {"old_log_probs": OLD, "advantages": ADVANTAGES, "mask": None, **options}
    return grpo_kernels.linear_grpo_loss(hidden, weight, token_ids, **given)


def _mistakes(op: str, call: Any) -> Any:
    def bad(name: str, error: type[Exception], *says: str, **arguments: Any) -> BadCall:
        return BadCall(f"{op}_{name}", lambda: call(**arguments), error, (f"{op}: ", *says))

    return bad


_bad = _mistakes("linear_token_log_probs", _log_probs)
_bad_target = _mistakes("linear_cross_entropy", _entropy_loss)
_bad_loss = _mistakes("linear_grpo_loss", _policy_loss)
CU = torch.tensor([0, 4, 6])
BAD_CALLS = [
    *_head_mistakes("linear_token_log_probs", _log_probs),
    *_head_mistakes("linear_cross_entropy", _entropy_loss),
    *(bad for bad in _head_mistakes("linear_grpo_loss", _policy_loss) if "hidden_scalar" not in bad.name),
    _bad("id_shape", ValueError, "token_ids must have shape [...] = [2, 3], got [3, 2]", token_ids=IDS.T),
    _bad("id_dtype", TypeError, "token_ids must have dtype int64, int32, got float32", token_ids=IDS.float()),
    _bad("id_range", ValueError, "token_ids", "must be < V = 20", "got 36", weight=WEIGHT[:20]),
    _bad("mask", ValueError, "mask must have shape [...] = [2, 3], got [3]", mask=MASK[0]),
    _bad("temperature", ValueError, "temperature must be finite and > 0, got 0", temperature=0),
    _bad("temperature_shape", ValueError, "temperature must have shape [...] = [2, 3]", temperature=torch.ones(2)),
    _bad("outputs", ValueError, "outputs must be one of 'entropy'", "'top2'", outputs=("top2",)),
    _bad_target("shape", ValueError, "target must have shape [...] = [2, 3], got [3, 2]", target=IDS.T),
    _bad_target("dtype", TypeError, "target must have dtype int64, int32, got float32", target=IDS.float()),
    _bad_target("range", ValueError, "target[0, 0] must be < V = 20", "got 36", weight=WEIGHT[:20]),
    _bad_target("reduction", ValueError, "reduction must be one of 'mean', 'sum', 'none', got 'avg'", reduction="avg"),
    _bad_target("z_loss", ValueError, "z_loss must be finite and >= 0, got -1", z_loss=-1.0),
    _bad_target("z_loss_type", TypeError, "z_loss must be a number, got str", z_loss="no"),
    _bad_target("ignore_index", TypeError, "ignore_index must be an int, got float", ignore_index=-100.0),
    _bad_loss("hidden_ndim", ValueError, "hidden must have shape [B, T, H], got [6, 9]", hidden=X),
    _bad_loss("packed_ndim", ValueError, "hidden must have shape [N, H], got [2, 3, 9]", cu_seqlens=CU),
    _bad_loss("cu_dtype", TypeError, "cu_seqlens must have dtype int64, int32", hidden=X, cu_seqlens=CU.float()),
    _bad_loss("id_shape", ValueError, "token_ids must have shape [...] = [2, 3], got [3, 2]", token_ids=IDS.T),
    _bad_loss("id_range", ValueError, "token_ids[0, 0] must be < V = 20", "got 36", weight=WEIGHT[:20]),
    _bad_loss("old", ValueError, "old_log_probs must have shape [B, T] = [2, 3], got [2, 2]", old_log_probs=OLD[:, 1:]),
    _bad_loss("old_device", ValueError, "old_log_probs must be on cpu like hidden", old_log_probs=OLD.to("meta")),
    _bad_loss("advantages", ValueError, "advantages must have shape [B] = [2] or [B, T]", advantages=ADVANTAGES[:1]),
    _bad_loss("mask", ValueError, "mask must have shape [B, T] = [2, 3], got [3]", mask=MASK[0]),
    _bad_loss("config", TypeError, "config must be a GRPOLossConfig, got dict", config={}),
    _bad_loss("no_ref", ValueError, "ref_log_probs must be given when kl_coef is set", kl_coef=0.1),
    _bad_loss(
        "no_sampler",
        ValueError,
        "sampler_log_probs must be given when sampler_correction is set",
        config=GRPOLossConfig(sampler_correction="token_mask"),
    ),
    _bad_loss("temperature", ValueError, "temperature must have shape [...] = [2, 3]", temperature=torch.ones(2)),
    _bad_loss("num_items", ValueError, "num_items must be finite and >= 0, got -1", num_items=-1),
]
