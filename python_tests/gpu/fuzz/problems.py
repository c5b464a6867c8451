"""Random arguments of the registered ops, on the CPU: sizes that are multiples of nothing, no rows, padding, NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_kernels.fp8_quantize import reference as fp8
from grpo_kernels.grouped_gemm._fp8_config_triton import FEW_ROWS
from grpo_kernels.moe_permute.reference import build_permutation
from python_tests.fp8_products import problem, wgrad_problem

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class OpCall(NamedTuple):
    """A registered op and its arguments, without the backend."""

    op: str
    arguments: tuple[Any, ...]


class Dice:
    """Choices that one seed decides."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        """low <= n < high."""
        return int(torch.randint(low, high, (), generator=self._generator))

    def one_of(self, *values: Any) -> Any:
        return values[self.number(0, len(values))]

    def flags(self, count: int) -> tuple[bool, ...]:
        return tuple(bool(self.number(0, 2)) for _ in range(count))


def product(dice: Dice) -> OpCall:
    """Few and many rows for an expert, empty experts; a bias or none."""
    experts = dice.number(1, 12)
    most = dice.one_of(3, FEW_ROWS, 3 * FEW_ROWS)
    sizes = torch.tensor([dice.number(0, 2) * dice.number(0, 2 * most) for _ in range(experts)])
    ends = sizes.cumsum(0).tolist()
    rows = max(1, ends[-1] + dice.number(0, 2) * dice.number(0, 200))
    columns = dice.number(1, 500)
    p = problem(ends, rows, dice.number(1, 700), columns)
    bias = (torch.randn(experts, columns) * 100).to(dice.one_of(*_NARROW)) if dice.number(0, 2) else None
    offsets = p.offsets.to(dice.one_of(torch.int32, torch.int64))
    out_dtype = dice.one_of(torch.float32, torch.bfloat16)
    return OpCall("fp8_grouped_gemm", (*p.x, *p.weight, offsets, bias, out_dtype))


def wgrad(dice: Dice) -> OpCall:
    """Of a few tiles of rows for each expert; into an accumulator or not."""
    tiles = torch.tensor([dice.number(0, 4) for _ in range(dice.number(1, 9))])
    ends = (tiles.cumsum(0) * 128).tolist()
    width, columns = dice.number(1, 500), dice.number(1, 500)
    p = wgrad_problem(ends, ends[-1] + 64, width, columns)
    operands = (*p.x, *p.grad, p.offsets)
    if dice.number(0, 2):
        return OpCall("fp8_grouped_gemm_wgrad_add_", (*operands, torch.randn(len(ends), columns, width)))
    return OpCall("fp8_grouped_gemm_wgrad", (*operands, dice.one_of(torch.float32, torch.bfloat16)))


def _activation(dice: Dice) -> tuple[bool, float, float, bool]:
    interleaved = bool(dice.number(0, 2))
    if dice.number(0, 2):
        return True, 1.702, dice.one_of(7.0, 0.7), interleaved
    return False, 1.0, 1.0, interleaved


def _routes(dice: Dice, rows: int) -> tuple[Tensor, Tensor]:
    """inv_map [rows], some of it padding, and the weights of the slots."""
    top_k = dice.number(1, 5)
    tokens = -(-rows // top_k) + dice.number(0, 3)
    inv_map = torch.randperm(tokens * top_k)[:rows].int()
    inv_map[torch.rand(rows) < dice.one_of(0.0, 0.3)] = -1
    return inv_map, torch.rand(tokens, top_k)


def _rows_of(dice: Dice, width: int, decades: float) -> Tensor:
    return torch.randn(dice.one_of(0, dice.number(1, 300)), width) * 10 ** (decades * torch.randn(1, width))


def _spoilt(dice: Dice, values: Tensor, inv_map: Tensor) -> Tensor:
    """NaN in padding, and once elsewhere."""
    values[inv_map < 0] = float("nan")
    if len(values) and dice.number(0, 4) == 0:
        values[dice.number(0, len(values)), dice.number(0, values.shape[1])] = float("nan")
    return values


def glu(dice: Dice) -> OpCall:
    values = _rows_of(dice, 2 * dice.number(1, 400), dice.one_of(0.0, 0.5))
    inv_map, _ = _routes(dice, len(values))
    preact = _spoilt(dice, values, inv_map).to(dice.one_of(*_NARROW))
    return OpCall("moe_glu_quantize", (preact, inv_map, *_activation(dice), bool(dice.number(0, 2)), 1e-12))


def glu_backward(dice: Dice) -> OpCall:
    """Any set of outputs that can be asked for; a gradient of any size."""
    width = dice.number(1, 400)
    values = _rows_of(dice, 2 * width, dice.one_of(0.0, 0.5))
    rows = len(values)
    inv_map, weights = _routes(dice, rows)
    data, scale = fp8.fp8_quantize(_spoilt(dice, values, inv_map), False, True, True, False, 1e-12)[:2]
    needs = dice.flags(6)
    grad = None
    if any((*needs[:3], needs[5])) or dice.number(0, 2):
        grad = torch.randn(rows, width) * dice.one_of(1.0, 1e-9)
        grad = _spoilt(dice, grad, inv_map).to(dice.one_of(torch.float32, torch.bfloat16))
    terms = torch.randn(rows) if dice.number(0, 2) else None
    dtype = dice.one_of(*_NARROW)
    arguments = (data, scale, grad, inv_map, weights, terms, *_activation(dice), *needs, 1e-12, 1e-30, dtype)
    return OpCall("moe_glu_backward_quantize", arguments)


def random_bits(rows: int, width: int, spread: int) -> Tensor:
    """float32 numbers of random bits whose exponents lie within so many powers of two of their row's."""
    bits = torch.randint(-(2**31), 2**31, (rows, width)).to(torch.int32)
    lowest = torch.randint(1, 255 - spread, (rows, 1))
    exponent = (lowest + torch.randint(0, spread + 1, (rows, width))).to(torch.int32)
    return ((bits & ~(0xFF << 23)) | (exponent << 23)).view(torch.float32)


def quantize(dice: Dice) -> OpCall:
    """Any bits, some tiles with NaN and infinities among them."""
    shape = dice.number(1, 300), dice.number(1, 600)
    x = random_bits(*shape, dice.one_of(3, 24, 240))
    if dice.number(0, 2):
        x[dice.number(0, shape[0]), dice.number(0, shape[1])] = dice.one_of(float("nan"), float("-inf"))
    x = x.to(dice.one_of(*_NARROW))
    rows, columns = dice.one_of((True, False), (False, True), (True, True))
    eps = dice.one_of(1e-12, 1e-30, 1e-4)
    return OpCall("fp8_quantize", (x, *dice.flags(2), rows, columns, eps))


def move(dice: Dice) -> OpCall:
    tokens, top_k, experts = dice.number(1, 200), dice.number(1, 5), dice.number(5, 20)
    ids = torch.rand(tokens, experts).topk(top_k).indices
    ids[torch.rand(ids.shape) < 0.2] = -1
    alignment = dice.one_of(1, 16, 128)
    first = dice.number(0, 3)
    row_id_map, inv_map, _, _ = build_permutation(ids, experts, first, experts, alignment)
    x = random_bits(tokens, dice.number(1, 600), 24).to(dice.one_of(*_NARROW))
    columns = alignment == 128 and bool(dice.number(0, 2))
    return OpCall("moe_permute_quantize", (x, row_id_map, inv_map, bool(dice.number(0, 2)), columns, 1e-12))


PROBLEMS: dict[str, Callable[[Dice], OpCall]] = {
    "product": product,
    "wgrad": wgrad,
    "quantize": quantize,
    "move": move,
    "glu": glu,
    "glu_backward": glu_backward,
}
