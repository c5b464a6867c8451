"""Gates of csrc/group_advantages: one warp owns a group, four warps a block; batch statistics take one block of 32."""

from __future__ import annotations

from bench.gates.gate import NO_BARRIER, Gate

CUDA = (
    # A block of 1024 threads cannot be launched with more registers a thread.
    Gate("group_advantages_kernel", registers=64, threads=1024, shared=24),
    # Warps work alone: no shared memory, no barrier. 40 registers leave room for 48 of 64 warps.
    Gate("informative_groups_kernel", registers=40, threads=128, instructions=(NO_BARRIER,)),
    Gate("group_rank_kernel", registers=40, threads=128, instructions=(NO_BARRIER,)),
)
