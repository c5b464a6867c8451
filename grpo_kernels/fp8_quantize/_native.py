"""Quantisation through the C++ kernels for the CPU: allocates and launches."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _extension
from grpo_kernels._extension import DTYPE_CODE, fp8_tensor
from grpo_kernels.fp8_quantize.layout import TILE, empty_dequantized, empty_quantized


def _sizes(tensor: Tensor) -> tuple[int, int, int]:
    return (tensor.shape[0] if tensor.ndim == 3 else 1, tensor.shape[-2], tensor.shape[-1])


def fp8_quantize(
    x: Tensor, square: bool, power_of_two: bool, rows: bool, columns: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = empty_quantized(x, square, power_of_two, rows, columns, eps)
    plain, transposed = fp8_tensor(*outputs[:2]), fp8_tensor(*outputs[2:])
    if x.stride(-1) != 1 and x.stride(-2) == 1:  # a transposed view: the other way round
        x, plain, transposed = x.transpose(-1, -2), transposed, plain
    elif x.stride(-1) != 1:
        x = x.contiguous()
    _extension.extension().fp8_quantize(
        x.data_ptr(),
        x.stride(0) if x.ndim == 3 else 0,
        x.stride(-2),
        DTYPE_CODE[x.dtype],
        *_sizes(x),
        square,
        power_of_two,
        eps,
        plain,
        transposed,
        *_extension.execution(x),
    )
    return outputs


def _tile(scales: int, size: int) -> int:
    """Elements of an axis that share a scale."""
    return 1 if scales == size else TILE


def fp8_dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    out = empty_dequantized(data, scale, dtype)
    if data.stride(-1) != 1:
        data = data.contiguous()
    _extension.extension().fp8_dequantize(
        fp8_tensor(data, scale),
        *_sizes(data),
        _tile(scale.shape[-2], data.shape[-2]),
        _tile(scale.shape[-1], data.shape[-1]),
        DTYPE_CODE[dtype],
        out.data_ptr(),
        *_extension.execution(data),
    )
    return out
