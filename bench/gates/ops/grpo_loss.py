"""Gates of csrc/grpo_loss: one block of 256 threads owns a segment of 1024 tokens."""

from __future__ import annotations

from bench.gates.gate import NO_BARRIER, Gate

CUDA = (
    # Two blocks a multiprocessor. Shared: a record of 32 sums for each of 8 warps, the result, a flag.
    Gate("loss_kernel", registers=128, threads=256, shared=2560),
    # The same with every surrogate: one block a multiprocessor.
    Gate("special_loss_kernel", registers=168, threads=256, shared=2560),
    # Five sums for each of 8 warps.
    Gate("row_sums_kernel", registers=40, threads=256, shared=320),
    # Every warp forms the row's sums for itself.
    Gate("share_kernel", registers=48, threads=256, instructions=(NO_BARRIER,)),
)
