"""An H100 SXM as the floors assume it: what the design names, and what its maker publishes."""

from __future__ import annotations

ARCHITECTURE = 90
MULTIPROCESSORS = 132
CLOCK = 1.7e9
"""Clocks a second under load; 1.98e9 at most."""
HBM = 3.0e12
"""Bytes a second of reads and writes together, of 3.35e12 on paper: the design's figure."""
TENSOR = {"bf16": 800e12, "fp8": 1500e12}
"""Operations a second of dense products. bf16: the design's figure, of 989e12 on paper. fp8: what the fastest public
kernels reach (DeepGEMM names 1550e12), of 1979e12 on paper."""
FP32 = MULTIPROCESSORS * CLOCK * 128 * 2
"""Operations a second of multiply-adds outside the tensor cores."""
FP64 = FP32 / 2
TENSOR_PER_CLOCK = {"bf16": 4096, "fp8": 8192}
"""Operations of a multiprocessor in a clock, where nothing throttles it."""
LATENCY = 0.7e-6
"""Seconds from a load that memory answers to the use of its result, beside the loads of others."""

ISSUE = 128
"""Lanes for which the four schedulers of a multiprocessor issue in a clock: one warp's instruction each."""
LANES = {"FMA": 128, "ALU": 64, "XU": 16, "FP64": 64, "LSU": 32}
"""Lanes of a multiprocessor's units in a clock (CUDA programming guide, throughput of native arithmetic instructions,
compute capability 9.0): multiply-adds of float32; integer additions, comparisons, selections, shifts and logic;
exponentials, logarithms, reciprocals and conversions of width; float64; loads, stores and shuffles of up to 4 bytes."""


def seconds(lanes: float, lanes_per_clock: float) -> float:
    """Time that all multiprocessors take for so many lanes of work together."""
    return lanes / (lanes_per_clock * MULTIPROCESSORS * CLOCK)
