"""The product of FP8 operands, as the public function calls it: argument checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _checks, _dispatch
from grpo_kernels._autocast import no_autocast
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.fp8_quantize.layout import DATA_DTYPE, tiles
from grpo_kernels.grouped_gemm import ops, reference
from grpo_kernels.grouped_gemm.arguments import check_bias, check_offsets, check_rows, segment_ends

_OP = "grouped_gemm"
_RESULTS = (torch.bfloat16, torch.float16, torch.float32)


def product(
    x: ScaledTensor, weight: ScaledTensor, offsets: Tensor, bias: Tensor | None, out_dtype: torch.dtype | None
) -> Tensor:  # fmt: skip
    """[R, N]."""
    _check(x, weight, offsets, bias)
    out_dtype = torch.bfloat16 if out_dtype is None else out_dtype
    _checks.check_choice(_OP, "out_dtype", out_dtype, _RESULTS)
    added = None if bias is None else bias.detach()
    tensors = (x.data, x.scale.detach(), weight.data, weight.scale.detach(), offsets, added)
    backend = _dispatch.resolve(_OP, x.data)
    if backend != "reference":
        result: Tensor = ops.fp8_grouped_gemm(*tensors, out_dtype, backend)
        return result
    if x.data.device.type == "cpu" and not torch.compiler.is_compiling():
        segment_ends(_OP, offsets, len(x.data))
    with no_autocast(x.data.device.type):
        return reference.fp8_grouped_gemm(*tensors, out_dtype)


def _check(x: ScaledTensor, weight: ScaledTensor, offsets: Tensor, bias: Tensor | None) -> None:
    _check_field("x.data", x.data, DATA_DTYPE, "[R, K]")
    rows, inner = x.data.shape
    check_rows(_OP, "x.data", x.data)
    _check_field("weight.data", weight.data, DATA_DTYPE, "[E, N, K]")
    experts, columns, width = weight.data.shape
    if width != inner or 0 in (experts, columns, width):
        wanted = f"[E, N, K] = [E, N, {inner}] with E, N, K >= 1"
        raise ValueError(f"{_OP}: weight.data must have shape {wanted}, got {list(weight.data.shape)}")
    _check_field("x.scale", x.scale, torch.float32, "[R, K/128]")
    _checks.check_shape(_OP, "x.scale", x.scale, ("[R, K/128]", (rows, tiles(inner))))
    _check_field("weight.scale", weight.scale, torch.float32, "[E, N/128, K/128]")
    blocks = (experts, tiles(columns), tiles(inner))
    _checks.check_shape(_OP, "weight.scale", weight.scale, ("[E, N/128, K/128]", blocks))
    for name, tensor in (("x.scale", x.scale), ("weight.data", weight.data), ("weight.scale", weight.scale)):
        _checks.check_same_device(_OP, name, tensor, "x.data", x.data)
    check_offsets(_OP, offsets, experts, "x.data", x.data)
    if bias is not None:
        check_bias(_OP, bias, experts, columns, "x.data", x.data)


def _check_field(name: str, tensor: Tensor, dtype: torch.dtype, shape: str) -> None:
    _checks.check_tensor(_OP, name, tensor)
    _checks.check_dtype(_OP, name, tensor, (dtype,))
    _checks.check_ndim(_OP, name, tensor, shape)
