// Transposes a tile of bytes.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "common/e4m3.h"

namespace grpo_kernels {
namespace GK_ISA {

constexpr int64_t kSquare = 16;

// out[column][row] = in[row][column] of 16 x 16 bytes; both tiles have rows of kTile bytes.
#if defined(__x86_64__)
inline void transpose_square(const uint8_t* in, uint8_t* out) {
  __m128i rows[kSquare], mixed[kSquare];
  for (int i = 0; i < kSquare; ++i) rows[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * kTile));
  for (int round = 0; round < 4; ++round) {  // each interleaves the first half of the rows with the second
    for (int i = 0; i < kSquare / 2; ++i) {
      mixed[2 * i] = _mm_unpacklo_epi8(rows[i], rows[i + kSquare / 2]);
      mixed[2 * i + 1] = _mm_unpackhi_epi8(rows[i], rows[i + kSquare / 2]);
    }
    for (int i = 0; i < kSquare; ++i) rows[i] = mixed[i];
  }
  for (int i = 0; i < kSquare; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * kTile), rows[i]);
}
#else
inline void transpose_square(const uint8_t* in, uint8_t* out) {
  for (int row = 0; row < kSquare; ++row) {
    for (int column = 0; column < kSquare; ++column) out[column * kTile + row] = in[row * kTile + column];
  }
}
#endif

// The first `rows` x `columns` bytes of a tile; more may be written, to multiples of 16.
inline void transpose_tile(const uint8_t* in, int64_t rows, int64_t columns, uint8_t* out) {
  for (int64_t row = 0; row < rows; row += kSquare) {
    for (int64_t column = 0; column < columns; column += kSquare) {
      transpose_square(in + row * kTile + column, out + column * kTile + row);
    }
  }
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
