"""Public function of the package: argument checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _checks, _dispatch
from grpo_kernels._autocast import no_autocast
from grpo_kernels._gemm import gemm_dtype
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.grouped_gemm import fp8, reference
from grpo_kernels.grouped_gemm.arguments import (
    check_accumulator,
    check_bias,
    check_offsets,
    check_present,
    check_rows,
    segment_ends,
)
from grpo_kernels.grouped_gemm.function import Options, grouped_linear

_OP = "grouped_gemm"


def grouped_gemm(
    x: Tensor | ScaledTensor,
    weight: Tensor | ScaledTensor,
    offsets: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    weight_grad_accumulator: Tensor | None = None,
) -> Tensor:
    """A linear layer for every expert: its rows of x by its own weight, in one call.

    out[r] = x[r] @ weight[e].T + bias[e] for the rows r of expert e, offsets[e - 1] <= r < offsets[e].

    Args:
        x: [R, K] float. Rows, one expert's after the other's. Or a ScaledTensor, quantised by tiles of 1 x 128, with a
            weight that is one, too; then there is no accumulator and no gradient.
        weight: [E, N, K] float. As `nn.Linear`, one for each expert. One of the last two axes should be dense, whatever
            the other strides: `parameter.transpose(1, 2)` of a parameter [E, K, N] is not copied. Or a ScaledTensor,
            quantised by tiles of 128 x 128; K is its dense axis, so that a gradient of x takes the transposed weight's.
        offsets: [E] int32 or int64. The row behind the last one of each expert, not decreasing, at most R, as
            `build_permutation` and `torch.nn.functional.grouped_mm` have them. An expert whose offset equals the one
            before it has no rows.
        bias: [E, N] float. Added before the result is rounded, for ScaledTensors in fp32 whatever its dtype.
        out_dtype: dtype of the result; that of the product's operands by default, bfloat16 for ScaledTensors.
        weight_grad_accumulator: [E, N, K] float32 (float64 for a float64 weight), one of the last two axes dense. The
            backward adds the weight's gradient there, and `weight.grad` stays as it is: the main gradient of a trainer.
            Not on the reference backend.

    Returns:
        [R, N]. Rows behind the last offset are 0, and so is their gradient; what they hold in x and in the upstream
        gradient, NaN included, has no part in any result.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, device or range; on the CPU also where
            offsets decrease, are negative or exceed R. On other devices such offsets are clamped: a segment that would
            begin before the last one ends is cut off there, and rows >= R do not exist.
        BackendUnavailable: weight_grad_accumulator needs kernels, and there are none for this device and dtype.

    Numerics:
        Operands have autocast's dtype, else the wider of those of x and weight, as with `F.linear`. Products
        accumulate in fp32 and are rounded once; the gradients of weight and bias likewise, over an expert's rows in a
        fixed order, and are exactly 0 for an expert without rows. An input that needs no gradient costs no product. No
        atomics, no host synchronisation on a GPU: equal calls give equal bits. ScaledTensors: every 128 products of a
        sum are scaled by their row's scale, then by their block's, and added in fp32; a NaN scale makes its row, or its
        expert's 128 columns, NaN.

    Source:
        The grouped products of MegaBlocks (arXiv 2211.15841), and `torch.nn.functional.grouped_mm`, whose rows behind
        the last offset are uninitialised instead, in the value and in the gradient.
    """
    if isinstance(x, ScaledTensor) and isinstance(weight, ScaledTensor):
        if weight_grad_accumulator is not None:
            raise ValueError(f"{_OP}: weight_grad_accumulator cannot be given with ScaledTensors")
        return fp8.product(x, weight, offsets, bias, out_dtype)
    if isinstance(x, ScaledTensor) or isinstance(weight, ScaledTensor):
        got = f"{type(x).__name__} and {type(weight).__name__}"
        raise TypeError(f"{_OP}: x and weight must both be tensors or both ScaledTensors, got {got}")
    _check(x, weight, offsets, bias, weight_grad_accumulator)
    dtype = gemm_dtype(x, weight)
    out_dtype = dtype if out_dtype is None else out_dtype
    if out_dtype not in _checks.FLOATING or (out_dtype == torch.float64) > (dtype == torch.float64):
        allowed = "float32, bfloat16 or float16 (float64 for float64 operands)"
        raise TypeError(f"{_OP}: out_dtype must be {allowed}, got {out_dtype}")
    backend = _dispatch.resolve(_OP, weight if weight.dtype == torch.float64 else x)
    if backend != "reference":
        return grouped_linear(Options(dtype, out_dtype, backend), x, weight, offsets, bias, weight_grad_accumulator)
    if weight_grad_accumulator is not None:
        raise _dispatch.BackendUnavailable(f"{_OP}: weight_grad_accumulator needs kernels")
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        segment_ends(_OP, offsets, x.shape[0])
    with no_autocast(x.device.type):
        cast_bias = None if bias is None else bias.to(dtype)
        return reference.grouped_gemm(x.to(dtype), weight.to(dtype), offsets, cast_bias, out_dtype)


def _check(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None, accumulator: Tensor | None) -> None:
    for name, value in (("x", x), ("weight", weight)):
        _checks.check_tensor(_OP, name, value)
        _checks.check_dtype(_OP, name, value)
    _checks.check_ndim(_OP, "x", x, "[R, K]")
    check_rows(_OP, "x", x)
    check_present(_OP, "weight", weight, "[E, N, K]")
    _checks.check_ndim(_OP, "weight", weight, "[E, N, K]")
    experts, columns, width = weight.shape
    if width != x.shape[1] or 0 in (experts, columns, width):
        wanted = f"[E, N, K] = [E, N, {x.shape[1]}] with E, N, K >= 1"
        raise ValueError(f"{_OP}: weight must have shape {wanted}, got {list(weight.shape)}")
    _checks.check_same_device(_OP, "weight", weight, "x", x)
    check_offsets(_OP, offsets, experts, "x", x)
    if bias is not None:
        check_bias(_OP, bias, experts, columns, "x", x)
    if accumulator is not None:
        check_accumulator(_OP, "weight_grad_accumulator", accumulator, "weight", weight, "[E, N, K]")
