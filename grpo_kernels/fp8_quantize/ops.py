"""Schemas of quantisation. Imports torch alone, so that they exist before anything is traced."""

from __future__ import annotations

from grpo_kernels import _dispatch
from grpo_kernels.fp8_quantize.layout import empty_dequantized, empty_quantized

_PACKAGE = "grpo_kernels.fp8_quantize"

for _name in ("fp8_quantize", "fp8_dequantize"):
    _dispatch.register_backends(_name, cpu=("native",), cuda=("triton",), interpretable=True)

fp8_quantize = _dispatch.define(
    "fp8_quantize(Tensor x, bool square, bool power_of_two, bool rows, bool columns, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    package=_PACKAGE,
    definition="reference",
    fake=empty_quantized,
)
"""data, scale of x [(E,) M, K] where `rows`, and of its transpose where `columns`; [0] where not. Tiles of 128 elements
along the last axis of the result; square: of 128 x 128."""

fp8_dequantize = _dispatch.define(
    "fp8_dequantize(Tensor data, Tensor scale, ScalarType dtype, str backend) -> Tensor",
    package=_PACKAGE,
    definition="reference",
    fake=empty_dequantized,
)
"""data times the scale of its tiles: along each of the last two axes a scale for every element, or for every 128."""
