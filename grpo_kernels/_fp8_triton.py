"""FP8 (e4m3) in Triton: scales of tiles, codes of numbers, numbers of codes. What every kernel that writes FP8 shares.

Codes are bytes. A device with FP8 instructions converts by them; others, and Triton's interpreter, whose conversion does
not round to nearest, compute the same codes with integers.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from grpo_kernels._launch import architecture

TILE = 128
"""Elements along a tile's axis, rows or columns."""

LARGEST = tl.constexpr(448.0)
_LARGEST_BITS = tl.constexpr(0x43E00000)
_INFINITY_BITS = tl.constexpr(0x7F800000)
_NAN_BITS = tl.constexpr(0x7FC00000)
_SMALLEST_NORMAL_BITS = tl.constexpr(0x3C800000)  # 2^-6


def encoding(tensor: Tensor) -> str:
    """How kernels on the tensor's device form codes, and read them: by "hardware" or as "integer"."""
    if triton.knobs.runtime.interpret or architecture(tensor) < 89:
        return "integer"
    return "hardware"


@triton.jit
def magnitude(x):
    """int32. Bits of |x| as a float32: they compare as the numbers do, infinity and then NaN above all others."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def tile_scale(largest, eps, POWER_OF_TWO: tl.constexpr):
    """(scale, factor) of tiles whose largest magnitude has these bits; `scaled` takes the factor.

    Both are NaN where the magnitude is not finite. POWER_OF_TWO: the smallest 2^k with largest <= 448 * 2^k, from its bits.
    """
    amax = tl.maximum(tl.minimum(largest, _INFINITY_BITS).to(tl.float32, bitcast=True), eps)
    nan = tl.full(largest.shape, _NAN_BITS, tl.int32)
    if POWER_OF_TWO:
        bits = amax.to(tl.int32, bitcast=True)
        exponent = (bits >> 23) - tl.where((bits & 0x7FFFFF) > 0x600000, 7, 8)
        scale = exponent << 23
        factor = (254 - exponent) << 23
    else:
        scale = tl.div_rn(amax, tl.full(largest.shape, LARGEST, tl.float32)).to(tl.int32, bitcast=True)
        factor = scale
    finite = largest < _INFINITY_BITS
    scale = tl.where(finite, scale, nan).to(tl.float32, bitcast=True)
    factor = tl.where(finite, factor, nan).to(tl.float32, bitcast=True)
    return scale, factor


@triton.jit
def scaled(x, factor, POWER_OF_TWO: tl.constexpr):
    """x over its tile's scale, in float32. By a power of two that is exact."""
    wide = x.to(tl.float32)
    if POWER_OF_TWO:
        value = wide * factor
    else:
        value = tl.div_rn(wide, factor)
    return value


@triton.jit
def encode(value, ENCODE: tl.constexpr):
    """uint8. The e4m3 code of a float32: to nearest, ties to even; at most 448; 0x7F for NaN."""
    if ENCODE == "hardware":
        inside = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        code = inside.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        # |value| + 2^20 * (its own power of two) keeps three bits behind the point of the mantissa, and rounds as the
        # format does. Below 2^-6 the power stays: these are the subnormal numbers.
        bits = value.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        inside = tl.minimum(size, _LARGEST_BITS)
        power = tl.maximum(inside & 0x7F800000, _SMALLEST_NORMAL_BITS)
        large = power + (20 << 23)
        rounded = inside.to(tl.float32, bitcast=True) + large.to(tl.float32, bitcast=True)
        eighths = rounded.to(tl.int32, bitcast=True) - large
        number = eighths + ((power - _SMALLEST_NORMAL_BITS) >> 20)
        number = tl.where(size > _INFINITY_BITS, 0x7F, number | ((bits >> 24) & 0x80))
        code = number.to(tl.uint8)
    return code


@triton.jit
def decode(code, ENCODE: tl.constexpr):
    """float32. The number of an e4m3 code, NaN for 0x7F and 0xFF."""
    if ENCODE == "hardware":
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        wide = code.to(tl.int16)
        half = (((wide & 0x80) << 8) | ((wide & 0x7F) << 7)).to(tl.float16, bitcast=True)  # its number over 2^8
        value = tl.where((wide & 0x7F) == 0x7F, float("nan"), half.to(tl.float32) * 256.0)
    return value


@triton.jit
def write_tiles(
    value,
    data,
    scale,
    line,
    place,
    lines,
    places,
    data_stride,
    scale_stride,
    tile,
    eps,
    AXIS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ENCODE: tl.constexpr,
):
    """Quantises values whose tiles lie along AXIS and fill it, and writes them with that axis dense: turned where it is 0.

    line, place: indices across and along the tiles, of which `lines` and `places` exist. Scales of neighbouring lines lie
    side by side, those of the next tile scale_stride further.
    """
    found, factor = tile_scale(tl.max(magnitude(value), axis=AXIS), eps, POWER_OF_TWO)
    code = encode(scaled(value, tl.expand_dims(factor, AXIS), POWER_OF_TWO), ENCODE)
    if AXIS == 0:
        code = tl.trans(code)
    exists = line < lines
    line = line.to(tl.int64)
    tl.store(
        data + line[:, None] * data_stride + place[None, :], code, mask=exists[:, None] & (place < places)[None, :]
    )
    tl.store(scale + tile.to(tl.int64) * scale_stride + line, found, mask=exists)
