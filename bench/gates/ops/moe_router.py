"""Gates of csrc/moe_router: one warp owns a token, with 1 to 32 experts a lane; a second launch sums over tokens."""

from __future__ import annotations

from bench.gates.gate import NO_BARRIER, WIDE_STORES, Gate

CUDA = (
    # Two blocks a multiprocessor up to 512 experts; beyond, a lane's logits, terms and keys take up to 168 registers.
    # Shared, without what is dynamic: a tally and a count for each warp.
    Gate("route_kernel", registers=168, threads=256, shared=320),
    # Two tables of 32 sums for each of 32 warps, of integers and of doubles.
    Gate("sum_kernel", registers=64, threads=1024, shared=12288),
    # Eight rows of E floats, on the way from the order of the lanes to that of memory.
    Gate("gradient_kernel", registers=168, threads=256, shared=32768, instructions=(WIDE_STORES, NO_BARRIER)),
)
