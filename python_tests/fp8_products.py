"""Products of FP8 operands: problems, what they stand for in any precision, and a model of how tiles are dealt out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_kernels.fp8_quantize import ScaledTensor
from grpo_kernels.fp8_quantize.layout import aligned, empty_scale, tiles

NAN_CODE = 0x7F


class Problem(NamedTuple):
    """Experts and their rows. Rows of no expert, and the memory between rows, hold NaN."""

    x: ScaledTensor
    weight: ScaledTensor
    offsets: Tensor

    @property
    def end(self) -> int:
        return int(self.offsets[-1])


def spaced(numbers: Tensor) -> Tensor:
    """In e4m3, rows at a distance of 16 bytes, NaN between them."""
    *outer, width = numbers.shape
    codes = torch.full((*outer, aligned(width, 16)), NAN_CODE, dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes[..., :width] = numbers.clamp(-448, 448).to(codes.dtype)
    return codes[..., :width]


def problem(
    ends: Sequence[int],
    rows: int,
    width: int = 200,
    columns: int = 72,
    decades: float = 1.0,
    power_of_two: bool = False,
) -> Problem:
    """Scales lie within so many decades of 1, up or down."""
    experts = len(ends)

    def scales(*shape: int) -> Tensor:
        found = 10.0 ** ((torch.rand(shape) * 2 - 1) * decades)
        return torch.exp2(found.log2().round()) if power_of_two else found

    data, weight = (spaced(torch.randn(shape) * 100) for shape in ((rows, width), (experts, columns, width)))
    scale = empty_scale(data, (), rows, width, square=False).copy_(scales(rows, tiles(width)))
    data.view(torch.uint8)[ends[-1] :] = NAN_CODE
    scale[ends[-1] :] = float("nan")
    weight_scale = scales(experts, tiles(columns), tiles(width))
    return Problem(ScaledTensor(data, scale), ScaledTensor(weight, weight_scale), torch.tensor(ends))


def widened(scaled: ScaledTensor, dtype: torch.dtype) -> Tensor:
    """What the codes stand for, formed in `dtype`."""
    data, scale = scaled
    wide = scale.to(dtype)
    for axis in (-2, -1):
        if scale.shape[axis] != data.shape[axis]:
            wide = wide.repeat_interleave(128, axis).narrow(axis, 0, data.shape[axis])
    return data.to(dtype) * wide


def exact(p: Problem, dtype: torch.dtype = torch.float64) -> Tensor:
    """[R, N]. The experts in turn, then zeros."""
    x, weight = widened(p.x, dtype), widened(p.weight, dtype)
    starts = [0, *p.offsets.tolist()]
    parts = [x[start:end] @ weight[e].T for e, (start, end) in enumerate(itertools.pairwise(starts))]
    return torch.cat([*parts, x.new_zeros(len(x) - p.end, weight.shape[1])])


def with_bias(p: Problem, product: Tensor, bias: Tensor) -> Tensor:
    """[R, N]. The product with every row's bias added in its dtype; rows of no expert as they were."""
    owner = torch.bucketize(torch.arange(p.end), p.offsets, right=True)
    return torch.cat([product[: p.end] + bias.to(product.dtype)[owner], product[p.end :]])


class WgradProblem(NamedTuple):
    """Transposed operands, x^T [K, R] and grad^T [N, R], whose tiles belong to one expert each. The rest holds NaN."""

    x: ScaledTensor
    grad: ScaledTensor
    offsets: Tensor


def wgrad_problem(ends: Sequence[int], rows: int, width: int = 72, columns: int = 40) -> WgradProblem:
    made = []
    for height in (width, columns):
        data = spaced(torch.randn(height, rows) * 100)
        scale = empty_scale(data, (), height, rows, square=False).copy_(torch.rand(height, tiles(rows)) + 0.1)
        data.view(torch.uint8)[:, ends[-1] :] = NAN_CODE
        scale[:, tiles(ends[-1]) :] = float("nan")
        made.append(ScaledTensor(data, scale))
    return WgradProblem(*made, torch.tensor(ends))


def exact_wgrad(p: WgradProblem, dtype: torch.dtype = torch.float64) -> Tensor:
    """[E, N, K]."""
    x, grad = widened_rows(p.x, dtype), widened_rows(p.grad, dtype)
    segments = itertools.pairwise([0, *p.offsets.tolist()])
    return torch.stack([grad[:, start:end] @ x[:, start:end].T for start, end in segments])


def widened_rows(scaled: ScaledTensor, dtype: torch.dtype) -> Tensor:
    """As `widened`, of a matrix that may have as few columns as tiles."""
    return scaled.data.to(dtype) * scaled.scale.to(dtype).repeat_interleave(128, 1)[:, : scaled.data.shape[1]]


# --- the model of the schedule ---------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """Rows of one expert, -1: of none."""

    expert: int
    first: int
    end: int


def tile_list(offsets: Sequence[int], rows: int, block_m: int) -> list[Tile]:
    """What the table on the device holds."""
    found, start = [], 0
    for expert, given in enumerate([*offsets, rows]):
        end = max(start, min(max(given, 0), rows))
        owner = expert if expert < len(offsets) else -1
        found += [Tile(owner, row, min(row + block_m, end)) for row in range(start, end, block_m)]
        start = end
    return found


def position(item: int, row_blocks: int, columns: int, group: int) -> tuple[int, int]:
    """(row block, block of columns) of a work item."""
    first = item // (group * columns) * group
    size = min(row_blocks - first, group)
    rest = item - first * columns
    return first + rest % size, rest // size


def walks(row_blocks: int, columns: int, group: int, programs: int) -> list[list[tuple[int, int]]]:
    """What every program does, in its order."""
    items = range(row_blocks * columns)
    return [
        [position(item, row_blocks, columns, group) for item in items[program::programs]] for program in range(programs)
    ]
