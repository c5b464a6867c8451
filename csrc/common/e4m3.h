// e4m3 (four bits of exponent, three of mantissa, no infinity): conversion, tiles and their scale. Integer arithmetic on
// float's bits without branches, so that loops vectorise; every processor gives the same bits.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/macros.h"

namespace grpo_kernels {
namespace GK_ISA {

constexpr int64_t kTile = 128;  // elements that share a scale
constexpr uint32_t kMagnitudeBits = 0x7fffffffu;
constexpr uint32_t kInfinityBits = 0x7f800000u;  // of a float; NaN is above
constexpr float kE4m3Maximum = 448.0f;           // 1.75 * 2^8

GK_HOST_DEVICE int64_t tiles(int64_t size) { return (size + kTile - 1) / kTile; }

// Elements of the tile that starts at `begin`.
GK_HOST_DEVICE int64_t tile_size(int64_t begin, int64_t size) { return size - begin < kTile ? size - begin : kTile; }

// Rounded to nearest, ties to even; beyond 448 it is 448, NaN is 0x7f.
GK_HOST_DEVICE uint8_t e4m3_encode(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t exact = bits & kMagnitudeBits;
  const uint32_t magnitude = exact > 0x43e00000u ? 0x43e00000u : exact;  // 448
  // Normal results: rebias the exponent and round the low 20 bits. Subnormal results are multiples of 2^-9: let an addition to
  // a number with that last place do the rounding.
  const uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20;
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 16384.0f) - 0x46800000u;
  uint32_t code = magnitude < 0x3c800000u ? subnormal : normal;
  code |= (bits >> 24) & 0x80u;
  return uint8_t(exact > kInfinityBits ? 0x7fu : code);
}

GK_HOST_DEVICE float e4m3_decode(uint8_t code) {
  const uint32_t magnitude = code & 0x7fu;
  const float subnormal = float(int32_t(magnitude)) * 0.001953125f;  // 2^-9
  uint32_t bits = magnitude < 8u ? float_to_bits(subnormal) : (magnitude << 20) + 0x3c000000u;
  bits = magnitude == 0x7fu ? 0x7fc00000u : bits;
  return bits_to_float(bits | uint32_t(code & 0x80u) << 24);
}

// The scale of a tile from the bits of its largest magnitude, and the number that elements are multiplied (power of two) or
// divided by. Bits, because the largest of them is a NaN's if there is one: such a tile, and one with an infinity, is NaN.
template <bool kPowerOfTwo>
GK_HOST_DEVICE float e4m3_scale(uint32_t amax_bits, float eps, float& factor) {
  const float amax = bits_to_float(amax_bits);
  const uint32_t bits = float_to_bits(amax < eps ? eps : amax);
  const uint32_t exponent = (bits >> 23) - ((bits & 0x7fffffu) > 0x600000u ? 7u : 8u);  // of the smallest 2^k >= amax / 448
  const bool bad = amax_bits >= kInfinityBits;
  const float scale = kPowerOfTwo ? bits_to_float(exponent << 23) : bits_to_float(bits) / kE4m3Maximum;
  const float divisor = kPowerOfTwo ? bits_to_float((254u - exponent) << 23) : scale;
  const float nan = bits_to_float(0x7fc00000u);
  factor = bad ? nan : divisor;
  return bad ? nan : scale;
}

// An element of a tile as e4m3.
template <bool kPowerOfTwo>
GK_HOST_DEVICE uint8_t e4m3_scaled(float value, float factor) {
  return e4m3_encode(kPowerOfTwo ? value * factor : value / factor);
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
