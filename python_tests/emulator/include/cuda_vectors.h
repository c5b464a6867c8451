// CUDA's vector types, with its alignments: a load of four floats from an address that is not a multiple of 16 is an error on
// a GPU, and one that -fsanitize=alignment sees here.
#pragma once

#define GK_VECTORS(base, type, align2, align4)                                \
  struct base##1 { type x; };                                                 \
  struct alignas(align2) base##2 { type x, y; };                              \
  struct base##3 { type x, y, z; };                                           \
  struct alignas(align4) base##4 { type x, y, z, w; };                        \
  inline base##1 make_##base##1(type x) { return {x}; }                       \
  inline base##2 make_##base##2(type x, type y) { return {x, y}; }            \
  inline base##3 make_##base##3(type x, type y, type z) { return {x, y, z}; } \
  inline base##4 make_##base##4(type x, type y, type z, type w) { return {x, y, z, w}; }

GK_VECTORS(char, signed char, 2, 4)
GK_VECTORS(uchar, unsigned char, 2, 4)
GK_VECTORS(short, short, 4, 8)
GK_VECTORS(ushort, unsigned short, 4, 8)
GK_VECTORS(int, int, 8, 16)
GK_VECTORS(uint, unsigned, 8, 16)
GK_VECTORS(longlong, long long, 16, 16)
GK_VECTORS(ulonglong, unsigned long long, 16, 16)
GK_VECTORS(float, float, 8, 16)
GK_VECTORS(double, double, 16, 16)
#undef GK_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
