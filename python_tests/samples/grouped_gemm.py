"""Samples of grouped_gemm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from python_tests.samples import BadCall, Call

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(9, 8, generator=GENERATOR)
WEIGHT = torch.randn(4, 5, 8, generator=GENERATOR)
BIAS = torch.randn(4, 5, generator=GENERATOR)
GRAD = torch.randn(9, 5, generator=GENERATOR)
OFFSETS = torch.tensor([2, 2, 6, 7])  # the second expert has no rows, the last two rows have no expert
NARROW = OFFSETS.int()
X[7:], GRAD[7:] = float("nan"), float("nan")
TURNED = WEIGHT.transpose(1, 2).contiguous().transpose(1, 2)

X8 = grpo_kernels.fp8_quantize(X)
WEIGHT8, TURNED8 = grpo_kernels.fp8_quantize(WEIGHT, (128, 128), transpose="both")
GRAD8 = grpo_kernels.fp8_quantize(GRAD, power_of_two_scales=False)
# Of transposes: x^T [8, 140] and grad^T [5, 140].
WIDE8 = [grpo_kernels.fp8_quantize(torch.randn(140, width, generator=GENERATOR), transpose=True) for width in (8, 5)]
EMPTY8 = [part[:, :0] for scaled in WIDE8 for part in scaled]

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OPS = {
    "grouped_gemm": [
        (X, WEIGHT, OFFSETS, None, F32),
        (X.bfloat16(), WEIGHT.bfloat16(), NARROW, BIAS.bfloat16(), BF16),
        (X.half(), TURNED.half(), NARROW, None, F32),
        (GRAD, WEIGHT.transpose(1, 2), OFFSETS, None, BF16),
        (X[:0], WEIGHT, OFFSETS * 0, BIAS, F32),
    ],
    "fp8_grouped_gemm": [
        (*X8, *WEIGHT8, OFFSETS, None, BF16),
        (*X8, *WEIGHT8, OFFSETS, BIAS.bfloat16(), BF16),
        (*GRAD8, *TURNED8, NARROW, GRAD[:4, :1].expand(4, 8), F32),
        (X8.data[:0], X8.scale[:0], *WEIGHT8, OFFSETS * 0, BIAS, F16),
    ],
    "fp8_grouped_gemm_wgrad": [
        (*WIDE8[0], *WIDE8[1], torch.tensor([128, 128, 140]), F32),
        (*WIDE8[0], *WIDE8[1], torch.tensor([0, 128, 128]).int(), BF16),
        (*EMPTY8, torch.tensor([0, 0, 0]), F32),
    ],
    "fp8_grouped_gemm_wgrad_add_": [
        (*WIDE8[0], *WIDE8[1], torch.tensor([128, 128, 140]), torch.ones(3, 5, 8)),
        (*WIDE8[0], *WIDE8[1], torch.tensor([0, 128, 128]).int(), torch.ones(3, 8, 5).transpose(1, 2)),
        (*EMPTY8, torch.tensor([0, 0, 0]), torch.ones(3, 5, 8)),
    ],
    "grouped_gemm_wgrad": [
        (X, GRAD, OFFSETS, F32),
        (X.bfloat16(), GRAD.bfloat16(), NARROW, BF16),
        (X[:0], GRAD[:0], OFFSETS * 0, F32),
    ],
    "grouped_gemm_wgrad_add_": [
        (X.half(), GRAD.half(), NARROW, torch.ones(4, 5, 8)),
        (X, GRAD, NARROW, torch.ones(4, 8, 5).transpose(1, 2)),
        (X[:0], GRAD[:0], OFFSETS * 0, torch.ones(4, 5, 8)),
    ],
    "grouped_row_sum": [(GRAD, OFFSETS), (GRAD.bfloat16(), NARROW), (GRAD[:0], OFFSETS * 0)],
}


def _make(*tensors: Tensor) -> Any:
    return lambda device: tuple(tensor.to(device) for tensor in tensors)


CALLS = [
    Call("plain", lambda x, w, o: grpo_kernels.grouped_gemm(x, w, o), _make(X, WEIGHT, OFFSETS), (0, 1), (0, 1)),
    Call(
        "everything",
        lambda x, w, o, b: grpo_kernels.grouped_gemm(x, w.transpose(1, 2), o, bias=b, out_dtype=torch.float32),
        _make(X.bfloat16(), WEIGHT.transpose(1, 2).contiguous().bfloat16(), NARROW, BIAS),
        (0, 1, 3),
        (0, 1, 3),
        rounds=torch.bfloat16,
    ),
    Call(
        "frozen_weight",
        lambda x, w, o: grpo_kernels.grouped_gemm(x.T, w, o),
        _make(X.T.contiguous(), WEIGHT, OFFSETS),
        (0,),
        (0, 1),
    ),
    Call(
        "fp8",
        lambda x, w, o: grpo_kernels.grouped_gemm(
            grpo_kernels.fp8_quantize(x), grpo_kernels.fp8_quantize(w, (128, 128)), o, out_dtype=torch.float32
        ),
        _make((2 * X).round(), (2 * WEIGHT).round(), OFFSETS),  # small integers: exact in any accumulator
    ),
    Call(
        "fp8_bias",
        lambda x, w, o, b: grpo_kernels.grouped_gemm(
            grpo_kernels.fp8_quantize(x), grpo_kernels.fp8_quantize(w, (128, 128)), o, bias=b
        ),
        _make((2 * X).round(), (2 * WEIGHT).round(), OFFSETS, BIAS.round()),
    ),
    Call(
        "empty",
        lambda x, w, o, b: grpo_kernels.grouped_gemm(x, w, o, bias=b),
        _make(X[:0], WEIGHT, OFFSETS * 0, BIAS),
        (0, 1, 3),
        (0, 1, 3),
    ),
]


def _bad(
    name: str,
    error: type[Exception],
    *says: str,
    x: Any = X,
    weight: Any = WEIGHT,
    offsets: Any = OFFSETS,
    **options: Any,
) -> BadCall:
    return BadCall(
        f"grouped_gemm_{name}", lambda: grpo_kernels.grouped_gemm(x, weight, offsets, **options), error, says
    )


def _bad8(
    name: str, error: type[Exception], *says: str, x: Any = X8, weight: Any = WEIGHT8, **options: Any
) -> BadCall:  # fmt: skip
    return _bad(f"fp8_{name}", error, *says, x=x, weight=weight, **options)


def _trained(accumulator: Tensor) -> dict[str, Any]:
    return {"weight": WEIGHT.clone().requires_grad_(), "weight_grad_accumulator": accumulator}


def _freed() -> Tensor:
    weight = WEIGHT.clone()
    weight.untyped_storage().resize_(0)
    return weight


BAD_CALLS = [
    _bad("list", TypeError, "x must be a torch.Tensor, got list", x=[1.0]),
    _bad("integer", TypeError, "x must have dtype float32", "int64", x=OFFSETS[:, None]),
    _bad("rows", ValueError, "x must have shape [R, K], got [8]", x=X[0]),
    _bad("many_rows", ValueError, "at most R = 2^31 - 2^14 rows, got 2147483648", x=X[:1].expand(2**31, 8)),
    _bad("matrix", ValueError, "weight must have shape [E, N, K], got [5, 8]", weight=WEIGHT[0]),
    _bad("width", ValueError, "weight must have shape [E, N, K] = [E, N, 8]", "[4, 8, 5]", weight=WEIGHT.mT),
    _bad("no_experts", ValueError, "E, N, K >= 1, got [0, 5, 8]", weight=WEIGHT[:0], offsets=OFFSETS[:0]),
    _bad("device", ValueError, "weight must be on cpu like x, got meta", weight=WEIGHT.to("meta")),
    _bad("freed", ValueError, "the memory of weight [4, 5, 8] is freed", weight=_freed()),
    _bad("offset_type", TypeError, "offsets must be a torch.Tensor, got list", offsets=[2, 2, 6, 7]),
    _bad("offset_dtype", TypeError, "offsets must have dtype int64, int32, got float32", offsets=OFFSETS.float()),
    _bad("offset_shape", ValueError, "offsets must have shape [E] = [4], got [3]", offsets=OFFSETS[:3]),
    _bad("offset_order", ValueError, "offsets[1] must be >= 2", "got 1", offsets=torch.tensor([2, 1, 6, 7])),
    _bad("offset_sign", ValueError, "offsets[0] must be >= 0", "got -1", offsets=torch.tensor([-1, 2, 6, 7])),
    _bad(
        "offset_range",
        ValueError,
        "offsets[3] must be >= 6",
        "<= R = 9, got 10",
        offsets=OFFSETS + torch.tensor([0, 0, 0, 3]),
    ),
    _bad("bias_shape", ValueError, "bias must have shape [E, N] = [4, 5], got [5]", bias=BIAS[0]),
    _bad("bias_dtype", TypeError, "bias must have dtype float32", bias=BIAS.long()),
    _bad("bias_device", ValueError, "bias must be on cpu like x", bias=BIAS.to("meta")),
    _bad("out_dtype", TypeError, "out_dtype must be float32, bfloat16 or float16", "int32", out_dtype=torch.int32),
    _bad("out_wide", TypeError, "float64 for float64 operands", out_dtype=torch.float64),
    _bad("fp8_rows", TypeError, "both ScaledTensors, got ScaledTensor and Tensor", x=X8),
    _bad("fp8_weight", TypeError, "both ScaledTensors, got Tensor and ScaledTensor", weight=WEIGHT8),
    _bad8("bias_type", TypeError, "bias must be a torch.Tensor, got float", bias=1.0),
    _bad8("bias_dtype", TypeError, "bias must have dtype float32", "int64", bias=BIAS.long()),
    _bad8("bias_shape", ValueError, "bias must have shape [E, N] = [4, 5], got [4]", bias=BIAS[:, 0]),
    _bad8("bias_device", ValueError, "bias must be on cpu like x.data, got meta", bias=BIAS.to("meta")),
    _bad8("accumulator", ValueError, "weight_grad_accumulator cannot be given", weight_grad_accumulator=WEIGHT),
    _bad8(
        "out_dtype", ValueError, "out_dtype must be one of torch.bfloat16", "got torch.float64", out_dtype=torch.float64
    ),
    _bad8("list", TypeError, "x.scale must be a torch.Tensor, got list", x=X8._replace(scale=[1.0])),
    _bad8("data", TypeError, "x.data must have dtype float8_e4m3fn, got float32", x=X8._replace(data=X)),
    _bad8(
        "fnuz",
        TypeError,
        "weight.data must have dtype float8_e4m3fn, got float8_e4m3fnuz",
        weight=WEIGHT8._replace(data=WEIGHT.to(torch.float8_e4m3fnuz)),
    ),
    _bad8("scale", TypeError, "x.scale must have dtype float32, got float64", x=X8._replace(scale=X8.scale.double())),
    _bad8("matrix", ValueError, "weight.data must have shape [E, N, K], got [9, 8]", weight=X8),
    _bad8("width", ValueError, "weight.data must have shape [E, N, K] = [E, N, 8]", "[4, 8, 5]", weight=TURNED8),
    _bad8(
        "tiles",
        ValueError,
        "x.scale must have shape [R, K/128] = [9, 1], got [1, 1]",
        x=X8._replace(scale=X8.scale[:1]),
    ),
    _bad8(
        "blocks",
        ValueError,
        "weight.scale must have shape [E, N/128, K/128] = [4, 1, 1], got [4, 5, 1]",
        weight=grpo_kernels.fp8_quantize(WEIGHT),
    ),
    _bad8(
        "device",
        ValueError,
        "weight.scale must be on cpu like x.data",
        weight=WEIGHT8._replace(scale=WEIGHT8.scale.to("meta")),
    ),
    _bad8("offsets", ValueError, "offsets must have shape [E] = [4], got [3]", offsets=OFFSETS[:3]),
    _bad8("offset_order", ValueError, "offsets[1] must be >= 2", "got 1", offsets=torch.tensor([2, 1, 6, 7])),
    _bad("accumulator_dtype", TypeError, "weight_grad_accumulator must have dtype float32", **_trained(WEIGHT.half())),
    _bad("accumulator_shape", ValueError, "must have shape [E, N, K] = [4, 5, 8]", **_trained(WEIGHT[0])),
    _bad("accumulator_dense", ValueError, "one of the last two axes dense", **_trained(torch.ones(4, 5, 16)[..., ::2])),
    _bad("accumulator_frozen", ValueError, "does not require one", weight_grad_accumulator=WEIGHT),
]
