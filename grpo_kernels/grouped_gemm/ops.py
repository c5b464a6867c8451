"""Schemas of the grouped products. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels import _dispatch
from grpo_kernels._gemm import accumulation_dtype

_PACKAGE = "grpo_kernels.grouped_gemm"

_dispatch.register_backends("grouped_gemm", cpu=("native",), cuda=("triton",), interpretable=True)


def empty_output(x: Tensor, weight: Tensor, out_dtype: torch.dtype) -> Tensor:
    """[R, N], not yet written."""
    return x.new_empty((x.shape[0], weight.shape[1]), dtype=out_dtype)


def empty_weight_gradient(x: Tensor, grad: Tensor, offsets: Tensor, weight_dtype: torch.dtype) -> Tensor:
    """[E, N, K], not yet written."""
    return x.new_empty((offsets.shape[0], grad.shape[1], x.shape[1]), dtype=weight_dtype)


def empty_row_sum(grad: Tensor, offsets: Tensor) -> Tensor:
    """[E, N], not yet written."""
    return grad.new_empty((offsets.shape[0], grad.shape[1]), dtype=accumulation_dtype(grad.dtype))


grouped_gemm = _dispatch.define(
    "grouped_gemm(Tensor x, Tensor weight, Tensor offsets, Tensor? bias, ScalarType out_dtype, str backend) -> Tensor",
    package=_PACKAGE,
    definition="reference",
    fake=lambda x, weight, offsets, bias, out_dtype: empty_output(x, weight, out_dtype),
)
"""[R, N]: x[rows of e] @ weight[e].T + bias[e], and 0 in rows of no expert. x [R, K], weight [E, N, K] and bias [E, N]
are of one dtype. The gradient of x is the same product of the rows' gradients and weight.transpose(1, 2)."""

fp8_grouped_gemm = _dispatch.define(
    "fp8_grouped_gemm(Tensor data, Tensor scale, Tensor weight_data, Tensor weight_scale, Tensor offsets, "
    "Tensor? bias, ScalarType out_dtype, str backend) -> Tensor",
    package=_PACKAGE,
    definition="reference",
    fake=lambda data, scale, weight_data, weight_scale, offsets, bias, out_dtype: empty_output(
        data, weight_data, out_dtype
    ),
)
"""[R, N]: the same of e4m3 rows [R, K] with a scale for 1 x 128 of them, [R, K/128], and e4m3 weights [E, N, K] with
one for 128 x 128, [E, N/128, K/128]. The bias, of any floating dtype, is added in float32. The gradient of x is the
same product with the quantised rows of gradients and the quantised transpose of the weights."""

grouped_gemm_wgrad = _dispatch.define(
    "grouped_gemm_wgrad(Tensor x, Tensor grad, Tensor offsets, ScalarType weight_dtype, str backend) -> Tensor",
    package=_PACKAGE,
    definition="gradient_reference",
    fake=empty_weight_gradient,
)
"""[E, N, K]: grad[rows of e].T @ x[rows of e], 0 without rows. x [R, K] and grad [R, N] are of one dtype."""

# An op of its own: torch.compile cannot take one tensor from an op that may or may not write another.
grouped_gemm_wgrad_add_ = _dispatch.define(
    "grouped_gemm_wgrad_add_(Tensor x, Tensor grad, Tensor offsets, Tensor(a!) accumulator, str backend) -> ()",
    package=_PACKAGE,
    fake=lambda *_: None,
)
"""The same, added to an accumulator [E, N, K] of float32 (float64 for float64)."""

fp8_grouped_gemm_wgrad = _dispatch.define(
    "fp8_grouped_gemm_wgrad(Tensor data, Tensor scale, Tensor grad_data, Tensor grad_scale, Tensor offsets, "
    "ScalarType weight_dtype, str backend) -> Tensor",
    package=_PACKAGE,
    definition="gradient_reference",
    fake=lambda data, scale, grad_data, grad_scale, offsets, weight_dtype: empty_weight_gradient(
        data.t(), grad_data.t(), offsets, weight_dtype
    ),
)
"""[E, N, K]: the same of e4m3 operands that are quantised by tiles of 1 x 128 of their transposes, x^T [K, R] and
grad^T [N, R]. Segments with rows begin at multiples of 128 and end at one or at R: a tile belongs to one expert. Where
one does not, the CPU raises, and products of FP8 on a GPU give its expert NaN."""

fp8_grouped_gemm_wgrad_add_ = _dispatch.define(
    "fp8_grouped_gemm_wgrad_add_(Tensor data, Tensor scale, Tensor grad_data, Tensor grad_scale, Tensor offsets, "
    "Tensor(a!) accumulator, str backend) -> ()",
    package=_PACKAGE,
    fake=lambda *_: None,
)
"""The same, added to an accumulator [E, N, K] of float32."""

grouped_row_sum = _dispatch.define(
    "grouped_row_sum(Tensor grad, Tensor offsets, str backend) -> Tensor",
    package=_PACKAGE,
    definition="gradient_reference",
    fake=empty_row_sum,
)
"""[E, N] float32 (float64 for float64): the sum of the rows of each expert, the gradient of a bias."""
