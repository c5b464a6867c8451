"""Definition of fp8_quantize and fp8_dequantize in plain PyTorch: what every kernel gives, bit for bit.

The encoding is integer arithmetic on float32's bits. PyTorch's own cast is not used for it: beyond 448 it saturates in
some versions and makes NaN in others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.fp8_quantize.layout import (
    TILE,
    empty_data,
    empty_dequantized,
    empty_quantized,
    empty_scale,
)

MAXIMUM = 448.0
"""The largest e4m3 number, 1.75 * 2^8."""
NAN_CODE = 0x7F

_SMALLEST_NORMAL = 0x3C800000  # float32's bits of 2^-6; below it e4m3 counts in steps of 2^-9
_REBIAS = (127 - 7) << 23
_MANTISSA = (1 << 23) - 1
_MAXIMUM_MANTISSA = 0x600000  # of 1.75 in float32


def encode(values: Tensor) -> Tensor:
    """The e4m3 codes, uint8, of float32 numbers: clamped to 448, rounded to nearest, ties to even. NaN is 0x7F."""
    bits = values.view(torch.int32)
    sign = (bits >> 24) & 0x80
    magnitude = values.abs().clamp(max=MAXIMUM).view(torch.int32)
    normal = (magnitude - _REBIAS + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20  # 3 of the 23 bits of the mantissa stay
    subnormal = (magnitude.view(torch.float32) * 512.0).round().to(torch.int32)  # ties to even; 8 is the first normal
    code = torch.where(magnitude < _SMALLEST_NORMAL, subnormal, normal) | sign
    return torch.where(values.isnan(), NAN_CODE, code).to(torch.uint8)


def tile_scale(amax: Tensor, power_of_two: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Of tiles' largest magnitudes, float32: the scale, and the number by which elements are multiplied (a power of
    two) or divided. NaN where the tile holds NaN or an infinity."""
    bounded = amax.clamp(min=eps)
    if power_of_two:
        bits = bounded.view(torch.int32)
        exponent = (bits >> 23) - 8 + ((bits & _MANTISSA) > _MAXIMUM_MANTISSA).to(torch.int32)  # biased by 127
        scale, inverse = (exponent << 23).view(torch.float32), ((254 - exponent) << 23).view(torch.float32)
    else:
        scale = bounded / MAXIMUM
        inverse = scale
    nan = ~amax.isfinite()
    return scale.masked_fill(nan, float("nan")), inverse.masked_fill(nan, float("nan"))


def _blocks(values: Tensor, square: bool) -> Tensor:
    """[..., rows, width] as [..., rows or its tiles, tiles, elements of a tile], missing elements 0."""
    *batch, rows, width = values.shape
    height = TILE if square else 1
    short = (-width % TILE, -rows % height)
    padded = torch.nn.functional.pad(values, (0, short[0], 0, short[1]))
    blocks = padded.reshape(*batch, (rows + short[1]) // height, height, (width + short[0]) // TILE, TILE)
    return blocks.transpose(-3, -2).flatten(-2)


def _spread(per_tile: Tensor, rows: int, width: int, square: bool) -> Tensor:
    """A number of each tile, for each of its elements: [..., rows, width]."""
    wide = per_tile.repeat_interleave(TILE, -1)[..., :width]
    return wide.repeat_interleave(TILE, -2)[..., :rows, :] if square else wide


def _quantize(x: Tensor, square: bool, power_of_two: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Data and scale of x, in their memory formats."""
    *leading, rows, width = x.shape
    batch = tuple(leading)
    values = x.to(torch.float32)
    data, scale = empty_data(x, batch, rows, width), empty_scale(x, batch, rows, width, square)
    if values.numel() == 0:
        return data, scale
    found, factor = tile_scale(_blocks(values.abs(), square).amax(-1), power_of_two, eps)
    factor = _spread(factor, rows, width, square)
    codes = encode(values * factor if power_of_two else values / factor)
    data.view(torch.uint8).copy_(codes)
    return data, scale.copy_(found)


def fp8_quantize(
    x: Tensor, square: bool, power_of_two: bool, rows: bool, columns: bool, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """data, scale of x where `rows`, and of its transpose where `columns`; [0] where not."""
    nothing = empty_quantized(x, square, power_of_two, False, False, eps)
    plain = _quantize(x, square, power_of_two, eps) if rows else nothing[:2]
    transposed = _quantize(x.transpose(-1, -2), square, power_of_two, eps) if columns else nothing[2:]
    return (*plain, *transposed)


def fp8_dequantize(data: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """data * scale, a float32 product, in `dtype`."""
    rows, width = data.shape[-2:]
    if scale.shape[-1] != width:
        scale = scale.repeat_interleave(TILE, -1)[..., :width]
    if scale.shape[-2] != rows:
        scale = scale.repeat_interleave(TILE, -2)[..., :rows, :]
    return empty_dequantized(data, scale, dtype).copy_(data.to(torch.float32) * scale)
