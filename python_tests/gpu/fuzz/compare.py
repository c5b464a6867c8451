"""What results may be: equal bits, or whatever the roundings of an interval's ends enclose.

Rounding keeps order. A float32 result within `bound` of `value` is thus rounded, to a dtype or to the codes of FP8, to
something between what the ends are rounded to; the same holds for the scale that the largest of a tile gives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.fp8_quantize import reference as fp8
from grpo_kernels.fp8_quantize.layout import TILE, tiles
from python_tests.gpu.fuzz.glu import Bounded


def same_bits(name: str, found: Tensor, expected: Tensor) -> None:
    """But for what a NaN in float32 holds, and what lies between rows."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), f"{name}: another shape or dtype"
    a, b = found.contiguous(), expected.contiguous()
    if a.dtype == torch.float32:
        a, b = (t.masked_fill(t.isnan(), float("nan")) for t in (a, b))
    wrong = (a.reshape(-1).view(torch.uint8) != b.reshape(-1).view(torch.uint8)).sum().item()
    assert wrong == 0, f"{name}: {wrong} bytes of {a.numel() * a.element_size()} differ"


def _enclosed(name: str, found: Tensor, low: Tensor, high: Tensor) -> None:
    inside = (found >= low) & (found <= high) | (found.isnan() & low.isnan())
    if not inside.all():
        place = tuple((~inside).nonzero()[0].tolist())
        where = (
            f"{found[place].item():.9g} at {list(place)}, allowed {low[place].item():.9g} to {high[place].item():.9g}"
        )
        raise AssertionError(f"{name}: {(~inside).sum().item()} of {inside.numel()} are wrong, first {where}")


def within(name: str, found: Tensor, expected: Bounded) -> None:
    """Rounded to its dtype."""
    value, bound = expected
    _enclosed(name, found.double(), *((value + sign * bound).to(found.dtype).double() for sign in (-1, 1)))


def _scales(largest: Tensor, eps: float) -> Tensor:
    return fp8.tile_scale(largest.float(), True, eps)[0]


def quantized(name: str, data: Tensor, scale: Tensor, expected: Bounded, eps: float) -> None:
    """In tiles of 1 x 128 with powers of two for scales."""
    value, bound = expected
    rows, width = value.shape
    assert (data.shape, scale.shape) == ((rows, width), (rows, tiles(width))), f"{name}: another shape"
    ends = []
    for size in (value.abs() - bound, value.abs() + bound):
        padded = torch.nn.functional.pad(size.clamp(min=0), (0, -width % TILE))
        ends.append(_scales(padded.view(rows, tiles(width), TILE).amax(-1), eps))
    _enclosed(f"scale of {name}", scale, *ends)
    spread = scale.double().repeat_interleave(TILE, 1)[:, :width]
    codes = [fp8.encode(((value + sign * bound) / spread).float()) for sign in (-1, 1)]
    low, high = (code.view(torch.float8_e4m3fn).float() for code in codes)
    _enclosed(f"codes of {name}", data.float(), low, high)
