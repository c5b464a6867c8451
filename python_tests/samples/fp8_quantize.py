"""Samples of fp8_quantize and fp8_dequantize."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import grpo_kernels
from grpo_kernels import ScaledTensor
from grpo_kernels.fp8_quantize import reference
from python_tests.samples import BadCall, Call

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(37, 300, generator=GENERATOR) * torch.logspace(-6, 4, 300)
WEIGHT = torch.randn(3, 130, 257, generator=GENERATOR)
BAD_WEIGHT = WEIGHT.clone()
BAD_WEIGHT[1, 5, 7], BAD_WEIGHT[2, 129, 256] = float("nan"), float("-inf")
EPS = 1e-12
ROWS = reference.fp8_quantize(X, False, True, True, False, EPS)[:2]
SQUARE = reference.fp8_quantize(WEIGHT, True, False, True, False, EPS)[:2]

OPS = {
    "fp8_quantize": [
        (X, False, True, True, False, EPS),
        (WEIGHT.bfloat16(), True, True, True, True, EPS),
        (WEIGHT.half()[:, 1:, 3:], False, False, True, True, 1e-4),
        (X.double().T, False, True, False, True, EPS),
        (WEIGHT.bfloat16().transpose(1, 2), True, False, True, False, EPS),
        (X[:, ::3], False, True, True, False, EPS),
        (X[:0], False, True, True, True, EPS),
        (WEIGHT[:0], True, True, False, True, EPS),
    ],
    "fp8_dequantize": [
        (*ROWS, torch.bfloat16),
        (*SQUARE, torch.float32),
        (*(tensor.mT for tensor in ROWS), torch.float16),
        (ROWS[0][:, 128:256], ROWS[1][:, 1:2], torch.float64),
        (ROWS[0][:0], ROWS[1][:0], torch.bfloat16),
    ],
}


def activation(x: Tensor) -> tuple[Tensor, ...]:
    """Of a tensor and of its transpose, and back."""
    plain, transposed = grpo_kernels.fp8_quantize(x, transpose="both")
    return (*plain, *transposed, grpo_kernels.fp8_dequantize(plain, torch.float32))


def weight(x: Tensor) -> tuple[Tensor, ...]:
    """A weight's transpose with scales that are no powers of two, and back."""
    scaled = grpo_kernels.fp8_quantize(x, (128, 128), power_of_two_scales=False, transpose=True, eps=1e-6)
    return (*scaled, grpo_kernels.fp8_dequantize(scaled))


CALLS = [
    Call("activation", activation, lambda device: (X.to(device),)),
    Call("activation_bf16", activation, lambda device: (X.to(device, torch.bfloat16),)),
    Call("weight", weight, lambda device: (BAD_WEIGHT.to(device),)),
    Call("weight_fp16", weight, lambda device: (BAD_WEIGHT.to(device, torch.float16),)),
    Call("nothing", activation, lambda device: (X[:0].to(device),)),
]


def _bad(name: str, error: type[Exception], *says: str, x: Any = X, block: Any = (1, 128), **options: Any) -> BadCall:
    return BadCall(f"fp8_quantize_{name}", lambda: grpo_kernels.fp8_quantize(x, block, **options), error, says)


def _bad_back(
    name: str, error: type[Exception], *says: str, data: Any = ROWS[0], scale: Any = ROWS[1], **options: Any
) -> BadCall:
    call = lambda: grpo_kernels.fp8_dequantize(ScaledTensor(data, scale), **options)  # noqa: E731
    return BadCall(f"fp8_dequantize_{name}", call, error, says)


BAD_CALLS = [
    _bad("list", TypeError, "fp8_quantize: x must be a torch.Tensor, got list", x=[1.0]),
    _bad("dtype", TypeError, "x must have dtype float32, bfloat16, float16, float64, got int64", x=X.long()),
    _bad("quantized", TypeError, "x must have dtype", "got float8_e4m3fn", x=ROWS[0]),
    _bad("vector", ValueError, "x must have shape [M, K] or [E, M, K], got [300]", x=X[0]),
    _bad("leading_axes", ValueError, "x must have shape [M, K] or [E, M, K], got [1, 3, 130, 257]", x=WEIGHT[None]),
    _bad("block", ValueError, "block must be one of (1, 128), (128, 128), got (1, 32)", block=(1, 32)),
    _bad("block_order", ValueError, "block must be one of", "got (128, 1)", block=(128, 1)),
    _bad("block_type", TypeError, "block must be (1, 128) or (128, 128), got int", block=128),
    _bad("power", TypeError, "power_of_two_scales must be a bool, got str", power_of_two_scales="yes"),
    _bad("transpose", ValueError, "transpose must be one of False, True, 'both', got 'rows'", transpose="rows"),
    _bad("transpose_type", TypeError, "transpose must be a bool or 'both', got int", transpose=1),
    _bad("eps", ValueError, "eps must be finite and >= 1e-30 and <= 1, got 0.0", eps=0.0),
    _bad("large_eps", ValueError, "eps must be finite", "got 2", eps=2),
    _bad("eps_nan", ValueError, "eps must be finite", "got nan", eps=float("nan")),
    _bad("eps_type", TypeError, "eps must be a number, got Tensor", eps=torch.ones(())),
    BadCall(
        "fp8_dequantize_tuple",
        lambda: grpo_kernels.fp8_dequantize(ROWS),
        TypeError,
        ("fp8_dequantize: scaled must be a ScaledTensor, got tuple",),
    ),
    _bad_back("list", TypeError, "scaled.data must be a torch.Tensor, got list", data=[1]),
    _bad_back("dtype", TypeError, "scaled.data must have dtype float8_e4m3fn, got float32", data=X),
    _bad_back("vector", ValueError, "scaled.data must have shape [M, K] or [E, M, K], got [300]", data=ROWS[0][0]),
    _bad_back("scale_type", TypeError, "scaled.scale must be a torch.Tensor, got float", scale=1.0),
    _bad_back("scale_dtype", TypeError, "scaled.scale must have dtype float32", "float64", scale=ROWS[1].double()),
    _bad_back(
        "scale_shape",
        ValueError,
        "scaled.scale must have shape [37 or 1, 300 or 3] for data [37, 300], got [37, 2]",
        scale=ROWS[1][:, :2],
    ),
    _bad_back("scale_axes", ValueError, "scaled.scale must have shape", "got [3]", scale=ROWS[1][0]),
    _bad_back("device", ValueError, "scaled.scale must be on cpu like scaled.data, got meta", scale=ROWS[1].to("meta")),
    _bad_back("result", TypeError, "dtype must be float32, bfloat16, float16 or float64, got", dtype=torch.int8),
    _bad_back("result_fp8", TypeError, "dtype must be", "float8_e4m3fn", dtype=torch.float8_e4m3fn),
]
