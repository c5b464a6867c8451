"""A Triton kernel that test_gates.py compiles with and without faults."""

from __future__ import annotations

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
else:

    @triton.jit
    def scale_kernel(source, target, stride, SUM: tl.constexpr, BLOCK: tl.constexpr):
        columns = tl.arange(0, BLOCK)
        x = tl.load(source + tl.program_id(0) * stride + columns)
        y = tl.load(source + tl.program_id(1) * stride + columns)
        for _ in range(stride):
            x = tl.exp2(x) * y + x
            y = tl.exp2(y) - x
        if SUM:
            x = x / tl.sum(x, axis=0)
        tl.store(target + tl.program_id(0) * stride + columns, x)


def launch(SUM: bool = False, stride: int = 16, **options: int) -> None:
    tensor = torch.empty(4, 4096, device="meta")
    scale_kernel[(4,)](tensor, tensor, stride, SUM=SUM, BLOCK=4096, num_warps=4, **options)
