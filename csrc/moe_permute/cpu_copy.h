// Copies to memory that is not read again soon: past the caches, so that no line is fetched only to be overwritten.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "common/macros.h"

namespace grpo_kernels {
namespace GK_ISA {

constexpr int64_t kLine = 64;
constexpr int64_t kStreamedBytes = int64_t(4) << 20;  // smaller results stay in the caches, for whoever reads them next

#if defined(__x86_64__)
inline void stream_line(char* out, const char* in) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(out), _mm512_loadu_si512(in));
#elif defined(__AVX2__)
  for (int i = 0; i < kLine; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(out + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
  }
#else
  for (int i = 0; i < kLine; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(out + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i)));
  }
#endif
}

// Streamed stores are ordered by this alone.
inline void stream_end() { _mm_sfence(); }
#else
inline void stream_line(char* out, const char* in) { memcpy(out, in, kLine); }
inline void stream_end() {}
#endif

inline void copy_bytes(void* to, const void* from, int64_t bytes, bool streamed) {
  char* out = static_cast<char*>(to);
  const char* in = static_cast<const char*>(from);
  if (streamed && bytes >= 2 * kLine) {
    const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(out) % kLine);
    memcpy(out, in, size_t(head));
    int64_t i = head;
    for (; i + kLine <= bytes; i += kLine) stream_line(out + i, in + i);
    out += i, in += i, bytes -= i;
  }
  memcpy(out, in, size_t(bytes));
}

}  // namespace GK_ISA
}  // namespace grpo_kernels
