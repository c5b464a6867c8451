"""FP8 products of random problems on the GPU, against float64: `python -m python_tests.gpu.fp8_fuzz SECONDS`.

A process of its own: a kernel whose groups of warps wait for each other for ever cannot be interrupted.
"""

from __future__ import annotations

import sys
import time

import torch

import grpo_kernels
from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.fp8_quantize.layout import empty_data, empty_scale
from grpo_kernels.grouped_gemm import ops
from grpo_kernels.grouped_gemm._fp8_config_triton import FEW_ROWS
from python_tests.fp8_products import Problem, exact, exact_wgrad, problem, wgrad_problem

ACCUMULATOR = 2.0**-11
"""Of 14 bits that sums of 128 products have in the tensor core of sm_90, relative to all that is summed."""


def on_gpu(p: Problem) -> Problem:
    """The same in memory laid out alike."""
    data = empty_data(p.x.data.cuda(), (), *p.x.data.shape)
    data.copy_(p.x.data)
    scale = empty_scale(data, (), *p.x.data.shape, square=False).copy_(p.x.scale)
    weight = empty_data(data, tuple(p.weight.data.shape[:1]), *p.weight.data.shape[1:])
    weight.copy_(p.weight.data)
    return Problem(ScaledTensor(data, scale), ScaledTensor(weight, p.weight.scale.cuda()), p.offsets.cuda())


def excess(p: Problem) -> float:
    """How far the worst row's error, relative to the sizes of what it sums, exceeds the accumulator's; <= 0 is right.

    Raises:
        AssertionError: rows of no expert are not zero, or a second run gives other bits.
    """
    given = on_gpu(p)
    out, again = (
        grpo_kernels.grouped_gemm(given.x, given.weight, given.offsets, out_dtype=torch.float32) for _ in range(2)
    )
    if not torch.equal(out, again) or out[p.end :].any():
        raise AssertionError("equal calls differ, or rows of no expert are not zero")
    sizes = Problem(*(s._replace(data=s.data.float().abs().to(s.data.dtype)) for s in (p.x, p.weight)), p.offsets)
    error = (out.cpu().double() - exact(p)).abs()[: p.end].amax(1)
    size = exact(sizes)[: p.end].amax(1)
    return float((error / size - ACCUMULATOR).max()) if p.end else 0.0


def wgrad_excess(generator: torch.Generator) -> float:
    """The same of the weight's gradient of a random problem."""
    tiles = torch.randint(0, 4, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
    ends = (tiles.cumsum(0) * 128).tolist()
    width, columns = (int(torch.randint(1, 500, (), generator=generator)) for _ in range(2))
    p = wgrad_problem(ends, ends[-1] + 64, width, columns)
    operands = []
    for data, scale in (p.x, p.grad):
        placed = empty_data(data.cuda(), (), *data.shape)
        operands += [placed.copy_(data), empty_scale(placed, (), *data.shape, square=False).copy_(scale)]
    offsets = p.offsets.cuda()
    out, again = (ops.fp8_grouped_gemm_wgrad(*operands, offsets, torch.float32, "triton") for _ in range(2))
    total = torch.ones_like(out)
    ops.fp8_grouped_gemm_wgrad_add_(*operands, offsets, total, "triton")
    if not torch.equal(out, again) or not torch.equal(total, out + 1.0):
        raise AssertionError("equal calls differ, or an accumulator got another gradient")
    sizes = (s._replace(data=s.data.float().abs().to(s.data.dtype)) for s in (p.x, p.grad))
    size = exact_wgrad(p._replace(**dict(zip(("x", "grad"), sizes, strict=True)))).clamp_min(1e-30)
    error = (out.cpu().double() - exact_wgrad(p)).abs()
    return float((error.amax(-1) / size.amax(-1) - ACCUMULATOR).max())


def random_problem(generator: torch.Generator) -> Problem:
    """Few and many rows for an expert, empty experts, widths and columns that are multiples of nothing."""

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    experts = number(1, 12)
    most = (3, FEW_ROWS, 3 * FEW_ROWS)[number(0, 3)]
    sizes = torch.tensor([number(0, 2) * number(0, 2 * most) for _ in range(experts)])
    ends = sizes.cumsum(0).tolist()
    return problem(ends, max(1, ends[-1] + number(0, 2) * number(0, 200)), number(1, 700), number(1, 500))


def main() -> int:
    """Until the time is over; says how many problems there were."""
    torch.manual_seed(0)
    generator, end, count = torch.Generator().manual_seed(0), time.monotonic() + float(sys.argv[1]), 0
    while count == 0 or time.monotonic() < end:
        p = random_problem(generator)
        found = excess(p)
        if not found <= 0:
            shapes = list(p.x.data.shape), list(p.weight.data.shape), p.offsets.tolist()
            print(f"rows, weights, offsets {shapes}: error {found:.3e} above the accumulator's")
            return 1
        found = wgrad_excess(generator)
        if not found <= 0:
            print(f"weight's gradient: error {found:.3e} above the accumulator's")
            return 1
        count += 1
    print(f"{count} problems")
    return 0


if __name__ == "__main__":
    sys.exit(main())
