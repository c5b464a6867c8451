"""Tensors in eight bits with a scale for every tile, and back."""

from grpo_kernels.fp8_quantize.api import ScaledTensor, fp8_dequantize, fp8_quantize

__all__ = ["ScaledTensor", "fp8_dequantize", "fp8_quantize"]
