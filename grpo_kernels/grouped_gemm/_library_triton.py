"""The grouped products through `torch.nn.functional.grouped_mm`, and what it leaves to be done.

It believes its offsets, leaves the rows of no expert as they were in memory, and may do so with the gradients of
experts without rows. Small kernels before and after it see to that.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from grpo_kernels._extension import pointer
from grpo_kernels._launch import architecture, programs, run
from grpo_kernels.grouped_gemm._config_triton import library_suits, segments
from grpo_kernels.grouped_gemm._kernels_triton import clear_empty_kernel, clear_tail_kernel, ends_kernel

_BLOCK = 2048
_PROGRAMS = 8  # on each multiprocessor


def _aligned(tensor: Tensor) -> bool:
    """Whether rows [R, K], or weights in either order, begin where the library's kernel can load them."""
    if tensor.ndim == 3 and tensor.stride(2) != 1:
        tensor = tensor.transpose(1, 2)
    *strides, last = tensor.stride()
    dense = last == 1 and strides[-1] >= tensor.shape[-1]
    return dense and all(number * tensor.element_size() % 16 == 0 for number in strides) and pointer(tensor) % 16 == 0


def suits(x: Tensor, other: Tensor, experts: int, out_dtype: torch.dtype) -> bool:
    """Whether the library is to multiply the rows `x` by weights [E, N, K], or by rows of gradients [R, N]."""
    if not x.is_cuda or not hasattr(F, "grouped_mm"):
        return False
    aligned = x.shape[1] % 8 == other.shape[1] % 8 == 0 and _aligned(x) and _aligned(other)
    return library_suits(architecture(x), x.dtype, out_dtype, x.shape[0], experts, aligned)


def _ends(offsets: Tensor, rows: int) -> Tensor:
    """[E] int32. The offsets, as they can be believed."""
    offsets = offsets.contiguous()
    ends = torch.empty_like(offsets, dtype=torch.int32)
    experts = len(offsets)
    run(offsets, lambda: ends_kernel[(1,)](offsets, ends, rows, experts, SEGMENTS=segments(experts)))
    return ends


def grouped_gemm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[R, N]. R and E are at least 1."""
    rows, (experts, columns, _) = len(x), weight.shape
    ends = _ends(offsets, rows)
    out = F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    grid = (programs(x, rows, _PROGRAMS),)
    run(x, lambda: clear_tail_kernel[grid](out, ends, rows, columns, experts, BLOCK=_BLOCK))
    return out


def grouped_gemm_wgrad(x: Tensor, grad: Tensor, offsets: Tensor) -> Tensor:
    """[E, N, K]."""
    ends = _ends(offsets, len(x))
    out = F.grouped_mm(grad.t(), x, offs=ends)
    size = out[0].numel()
    grid = (programs(x, -(-size // _BLOCK), _PROGRAMS),)
    run(x, lambda: clear_empty_kernel[grid](out, ends, len(ends), size, BLOCK=_BLOCK))
    return out
