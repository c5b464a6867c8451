"""The weight's gradient of FP8 operands through Triton: the launcher."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from grpo_kernels._launch import architecture, precision, programs, run
from grpo_kernels.fp8_quantize import ops as fp8_ops
from grpo_kernels.grouped_gemm import ops
from grpo_kernels.grouped_gemm._config_triton import LARGE_MEMORY, PANEL, segments
from grpo_kernels.grouped_gemm._fp8_config_triton import TILE, wgrad_config
from grpo_kernels.grouped_gemm._fp8_kernels_triton import fp8_wgrad_kernel
from grpo_kernels.grouped_gemm._fp8_triton import loadable, strides
from grpo_kernels.grouped_gemm._kernels_triton import ends_kernel


def _widened(data: Tensor, scale: Tensor) -> Tensor:
    """[R, K] bfloat16 of a transposed operand."""
    found: Tensor = fp8_ops.fp8_dequantize(data, scale, torch.bfloat16, "triton")
    return found.t()


def fp8_grouped_gemm_wgrad(
    data: Tensor, scale: Tensor, grad_data: Tensor, grad_scale: Tensor, offsets: Tensor, weight_dtype: torch.dtype
) -> Tensor:  # fmt: skip
    if architecture(data) not in LARGE_MEMORY:
        rows = _widened(data, scale), _widened(grad_data, grad_scale)
        widened: Tensor = ops.grouped_gemm_wgrad(*rows, offsets, weight_dtype, "triton")
        return widened
    out = ops.empty_weight_gradient(data.t(), grad_data.t(), offsets, weight_dtype)
    _wgrad(data, scale, grad_data, grad_scale, offsets, out, accumulate=False)
    return out


def fp8_grouped_gemm_wgrad_add_(
    data: Tensor, scale: Tensor, grad_data: Tensor, grad_scale: Tensor, offsets: Tensor, accumulator: Tensor
) -> None:  # fmt: skip
    if architecture(data) not in LARGE_MEMORY:
        rows = _widened(data, scale), _widened(grad_data, grad_scale)
        ops.grouped_gemm_wgrad_add_(*rows, offsets, accumulator, "triton")
        return
    if accumulator.stride(2) != 1 and accumulator.stride(1) == 1:
        turned = accumulator.transpose(1, 2)
        _wgrad(grad_data, grad_scale, data, scale, offsets, turned, accumulate=True)
    else:
        _wgrad(data, scale, grad_data, grad_scale, offsets, accumulator, accumulate=True)
    torch.autograd.graph.increment_version(accumulator)


def _wgrad(
    data: Tensor, scale: Tensor, grad_data: Tensor, grad_scale: Tensor, offsets: Tensor, out: Tensor, *, accumulate: bool
) -> None:  # fmt: skip
    """Writes, or adds to, `out` [E, N, K], whose last axis is dense."""
    experts, columns, width = out.shape
    rows = data.shape[1]
    if rows == 0:
        if not accumulate:
            out.zero_()
        return
    x, grad = loadable(data), loadable(grad_data)
    offsets = offsets.contiguous()
    ends = torch.empty_like(offsets, dtype=torch.int32)
    config = wgrad_config(architecture(data), accumulate and out.stride(1) % 16 != 0)
    grid = programs(data, experts * triton.cdiv(columns, TILE) * triton.cdiv(width, TILE))

    def launch() -> None:
        ends_kernel[(1,)](offsets, ends, rows, experts, SEGMENTS=segments(experts))
        fp8_wgrad_kernel[(grid,)](
            x,
            scale,
            grad,
            grad_scale,
            ends,
            out,
            rows,
            columns,
            width,
            experts,
            *strides(x),
            *scale.stride(),
            *strides(grad),
            *grad_scale.stride(),
            out.stride(0),
            out.stride(1),
            ACCUMULATE=accumulate,
            PRECISION=precision(data.dtype),
            SPECIALIZED=config.specialized,
            TILE=TILE,
            PIECES=1 if config.specialized else TILE // PANEL,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    run(data, launch)
