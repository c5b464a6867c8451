"""The public functions: argument checks and the choice of a backend."""

from __future__ import annotations

from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from grpo_kernels import _checks, _dispatch
from grpo_kernels.fp8_quantize import ops, reference
from grpo_kernels.fp8_quantize.arguments import check_quantize, check_scaled


class ScaledTensor(NamedTuple):
    """Numbers in eight bits and the scale of their tiles: data * scale is the tensor.

    Attributes:
        data: [M, K] or [E, M, K] float8_e4m3fn. Rows are dense, and a multiple of 16 bytes apart in memory.
        scale: float32. Multiply by it to dequantise. For tiles of 1 x 128: [..., M, ceil(K / 128)], with the rows
            adjacent in memory (strides 1 and M, up to a multiple of 4). For tiles of 128 x 128: [..., ceil(M / 128),
            ceil(K / 128)], contiguous.
    """

    data: Tensor
    scale: Tensor


@overload
def fp8_quantize(
    x: Tensor,
    block: tuple[int, int] = ...,
    *,
    power_of_two_scales: bool = ...,
    transpose: bool = ...,
    eps: float = ...,
) -> ScaledTensor: ...


@overload
def fp8_quantize(
    x: Tensor,
    block: tuple[int, int] = ...,
    *,
    power_of_two_scales: bool = ...,
    transpose: Literal["both"],
    eps: float = ...,
) -> tuple[ScaledTensor, ScaledTensor]: ...


def fp8_quantize(
    x: Tensor,
    block: tuple[int, int] = (1, 128),
    *,
    power_of_two_scales: bool = True,
    transpose: bool | Literal["both"] = False,
    eps: float = 1e-12,
) -> ScaledTensor | tuple[ScaledTensor, ScaledTensor]:
    """A tensor in e4m3 with a scale for every tile.

    For a tile whose largest magnitude is amax, at least eps::

        scale = 2^k, the smallest with amax <= 448 * 2^k       (power_of_two_scales)
        scale = amax / 448                                     (otherwise)
        data  = e4m3(x / scale), clamped to +-448, rounded to nearest, ties to even

    Args:
        x: [M, K] or [E, M, K] bf16, fp16, fp32 or fp64. A view is not copied if one of its last two axes is dense.
        block: rows and columns of a tile: (1, 128) for activations and gradients, (128, 128) for weights. At the end of
            an axis tiles are smaller; nothing is padded.
        power_of_two_scales: the division is then exact, and so is a second quantisation with tiles of another shape
            as long as nothing becomes subnormal.
        transpose: True quantises the transpose of x instead: [..., K, M], equal to quantising `x.mT.contiguous()`. With
            (1, 128) its tiles are 128 rows of one column of x. "both" gives the two from one read of x.
        eps: between 1e-30 and 1. A tile below it gets its scale: one that is all zeros, say.

    Returns:
        `ScaledTensor(data, scale)`; for transpose="both" two of them: of x and of its transpose. No gradient: of an
        input that requires one the values are taken.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or range.

    Numerics:
        The same bits on every backend and device, whatever the threads. NaN or an infinity in a tile makes its scale
        and all of its elements NaN, and those of no other tile. The sign of zero stays. fp64 is rounded to float32
        first. Empty tensors give empty ones. No host synchronisation.

    Source:
        DeepSeek-V3 (arXiv 2412.19437), section 3.3; the memory format of the scales is DeepGEMM's. TransformerEngine
        rounds scales up to powers of two by default, too.
    """
    op = "fp8_quantize"
    check_quantize(op, x, block, power_of_two_scales, transpose, eps)
    x = x.detach()
    rows, columns = transpose in (False, "both"), transpose in (True, "both")
    arguments = (x, block[0] != 1, power_of_two_scales, rows, columns, float(eps))
    backend = _dispatch.resolve(op, x)
    outputs = reference.fp8_quantize(*arguments) if backend == "reference" else ops.fp8_quantize(*arguments, backend)
    plain, transposed = ScaledTensor(*outputs[:2]), ScaledTensor(*outputs[2:])
    if rows and columns:
        return plain, transposed
    return plain if rows else transposed


def fp8_dequantize(scaled: ScaledTensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """The tensor that was quantised, as far as eight bits hold it: data * scale.

    Args:
        scaled: from `fp8_quantize`. Along each of the last two axes the scale has an entry for every element of data,
            or for every 128 of them; so transposed views of both tensors will do.
        dtype: of the result: float32, bfloat16, float16 or float64.

    Returns:
        The shape of data, contiguous. No gradient.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape or device.

    Numerics:
        A float32 product, rounded once to dtype; the same bits on every backend and device. NaN data or a NaN scale
        gives NaN.

    Source:
        The inverse of `fp8_quantize`.
    """
    op = "fp8_dequantize"
    if not isinstance(scaled, ScaledTensor):
        raise TypeError(f"{op}: scaled must be a ScaledTensor, got {type(scaled).__name__}")
    if dtype not in _checks.FLOATING:
        raise TypeError(f"{op}: dtype must be float32, bfloat16, float16 or float64, got {dtype}")
    check_scaled(op, "scaled", *scaled)
    arguments = (scaled.data, scaled.scale.detach(), dtype)
    backend = _dispatch.resolve(op, scaled.data)
    if backend == "reference":
        return reference.fp8_dequantize(*arguments)
    result: Tensor = ops.fp8_dequantize(*arguments, backend)
    return result
