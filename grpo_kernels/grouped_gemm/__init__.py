"""Products of the rows of every expert with its own weight: the linear layers of a mixture of experts."""

from grpo_kernels.grouped_gemm.api import grouped_gemm

__all__ = ["grouped_gemm"]
