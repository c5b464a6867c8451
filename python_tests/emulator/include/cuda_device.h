// The device's functions: barriers, warp collectives, atomics, loads and bits.
#pragma once

// --- barriers and fences -----------------------------------------------------------------------------------------------------

using GKLocation = emulator::Location;

inline void __syncthreads(GKLocation where = GKLocation::here()) { emulator::barrier("__syncthreads", false, where); }
inline int __syncthreads_count(int predicate, GKLocation where = GKLocation::here()) {
  return emulator::barrier("__syncthreads_count", predicate != 0, where);
}
inline int __syncthreads_or(int predicate, GKLocation where = GKLocation::here()) {
  return emulator::barrier("__syncthreads_or", predicate != 0, where) != 0;
}
inline int __syncthreads_and(int predicate, GKLocation where = GKLocation::here()) {
  return emulator::barrier("__syncthreads_and", predicate != 0, where) == emulator::block_size();
}
inline void __threadfence_block() { emulator::yield(16); }
inline void __threadfence() { emulator::yield(16); }
inline void __threadfence_system() { emulator::yield(16); }
inline void __nanosleep(unsigned) { emulator::yield(16); }
[[noreturn]] inline void __trap(GKLocation where = GKLocation::here()) { emulator::fail("__trap", where); }

// --- warp collectives --------------------------------------------------------------------------------------------------------

namespace emulator {

extern const Collective kSyncWarp, kBallot, kMatchAny, kMatchAll, kShfl, kShflUp, kShflDown, kShflXor;
extern const Collective kReduceAdd, kReduceAnd, kReduceOr, kReduceXor, kReduceMin, kReduceMax, kReduceMinSigned,
    kReduceMaxSigned;

template <typename T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "warp collectives move 4 or 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof(T));
  return value;
}

template <typename T>
T shuffle(const Collective& kind, unsigned mask, T value, unsigned lane_or_offset, int width, Location where) {
  static_assert(std::is_arithmetic<T>::value, "shuffles take numbers");
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) fail("the width of a shuffle must be 1, 2, 4, 8, 16 or 32", where);
  return from_bits<T>(meet(kind, mask, to_bits(value), uint64_t(lane_or_offset) << 32 | unsigned(width), where));
}

}  // namespace emulator

inline void __syncwarp(unsigned mask = 0xffffffffu, GKLocation where = GKLocation::here()) {
  emulator::meet(emulator::kSyncWarp, mask, 0, 0, where);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, GKLocation where = GKLocation::here()) {
  return emulator::shuffle(emulator::kShfl, mask, value, unsigned(source), width, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset, int width = 32, GKLocation where = GKLocation::here()) {
  return emulator::shuffle(emulator::kShflUp, mask, value, offset, width, where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = 32, GKLocation where = GKLocation::here()) {
  return emulator::shuffle(emulator::kShflDown, mask, value, offset, width, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, GKLocation where = GKLocation::here()) {
  return emulator::shuffle(emulator::kShflXor, mask, value, unsigned(lanes), width, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, GKLocation where = GKLocation::here()) {
  return unsigned(emulator::meet(emulator::kBallot, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, GKLocation where = GKLocation::here()) {
  return emulator::meet(emulator::kBallot, mask, predicate != 0, 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, GKLocation where = GKLocation::here()) {
  return emulator::meet(emulator::kBallot, mask, predicate == 0, 0, where) == 0;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, GKLocation where = GKLocation::here()) {
  return unsigned(emulator::meet(emulator::kMatchAny, mask, emulator::to_bits(value), 0, where));
}
template <typename T>
unsigned __match_all_sync(unsigned mask, T value, int* all, GKLocation where = GKLocation::here()) {
  const auto lanes = unsigned(emulator::meet(emulator::kMatchAll, mask, emulator::to_bits(value), 0, where));
  *all = lanes != 0;
  return lanes;
}

#define GK_REDUCE(name, type, collective)                                               \
  inline type name(unsigned mask, type value, GKLocation where = GKLocation::here()) {  \
    return type(emulator::meet(emulator::collective, mask, unsigned(value), 0, where)); \
  }
GK_REDUCE(__reduce_add_sync, int, kReduceAdd)
GK_REDUCE(__reduce_add_sync, unsigned, kReduceAdd)
GK_REDUCE(__reduce_min_sync, int, kReduceMinSigned)
GK_REDUCE(__reduce_min_sync, unsigned, kReduceMin)
GK_REDUCE(__reduce_max_sync, int, kReduceMaxSigned)
GK_REDUCE(__reduce_max_sync, unsigned, kReduceMax)
GK_REDUCE(__reduce_and_sync, unsigned, kReduceAnd)
GK_REDUCE(__reduce_or_sync, unsigned, kReduceOr)
GK_REDUCE(__reduce_xor_sync, unsigned, kReduceXor)
#undef GK_REDUCE

// Which lanes happen to run together is a property of the hardware: a kernel that asks cannot be checked here.
unsigned __activemask() __attribute__((error("the emulator has no __activemask: pass the mask that the algorithm implies")));

// --- atomics -----------------------------------------------------------------------------------------------------------------

namespace emulator {

template <typename T, typename Change>
T atomic(T* address, const Change& change) {
  yield(0);
  const T before = *address;
  *address = T(change(before));
  yield(1);  // now others know of it: what the block has not stored yet, it stores too late
  return before;
}

}  // namespace emulator

#define GK_ATOMICS(type)                                                             \
  inline type atomicAdd(type* p, type v) {                                           \
    return emulator::atomic(p, [=](type old) { return old + v; });                   \
  }                                                                                  \
  inline type atomicMin(type* p, type v) {                                           \
    return emulator::atomic(p, [=](type old) { return v < old ? v : old; });         \
  }                                                                                  \
  inline type atomicMax(type* p, type v) {                                           \
    return emulator::atomic(p, [=](type old) { return v > old ? v : old; });         \
  }                                                                                  \
  inline type atomicAnd(type* p, type v) {                                           \
    return emulator::atomic(p, [=](type old) { return old & v; });                   \
  }                                                                                  \
  inline type atomicOr(type* p, type v) {                                            \
    return emulator::atomic(p, [=](type old) { return old | v; });                   \
  }                                                                                  \
  inline type atomicXor(type* p, type v) {                                           \
    return emulator::atomic(p, [=](type old) { return old ^ v; });                   \
  }                                                                                  \
  inline type atomicExch(type* p, type v) {                                          \
    return emulator::atomic(p, [=](type) { return v; });                             \
  }                                                                                  \
  inline type atomicCAS(type* p, type expected, type v) {                            \
    return emulator::atomic(p, [=](type old) { return old == expected ? v : old; }); \
  }
GK_ATOMICS(int)
GK_ATOMICS(unsigned)
GK_ATOMICS(unsigned long long)
#undef GK_ATOMICS
inline int atomicSub(int* p, int v) { return atomicAdd(p, -v); }
inline unsigned atomicSub(unsigned* p, unsigned v) { return atomicAdd(p, 0u - v); }

// Sums of floating-point atomics depend on who comes first; the kernels do not use them.
float atomicAdd(float*, float) = delete;
double atomicAdd(double*, double) = delete;
float atomicExch(float*, float) = delete;

// --- loads, bits, arithmetic -------------------------------------------------------------------------------------------------

#define GK_LOAD(name)        \
  template <typename T>      \
  T name(const T* address) { \
    return *address;         \
  }
#define GK_STORE(name)             \
  template <typename T>            \
  void name(T* address, T value) { \
    *address = value;              \
  }
GK_LOAD(__ldg)
GK_LOAD(__ldca)
GK_LOAD(__ldcg)
GK_LOAD(__ldcs)
GK_LOAD(__ldlu)
GK_LOAD(__ldcv)
GK_STORE(__stwb)
GK_STORE(__stcg)
GK_STORE(__stcs)
GK_STORE(__stwt)
#undef GK_LOAD
#undef GK_STORE

inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
inline int __ffs(int v) { return __builtin_ffs(v); }
inline int __ffsll(long long v) { return __builtin_ffsll(v); }
inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
inline int __clzll(long long v) { return v == 0 ? 64 : __builtin_clzll((unsigned long long)(v)); }
inline unsigned __brev(unsigned v) {
  unsigned reversed = 0;
  for (int bit = 0; bit < 32; ++bit) reversed |= (v >> bit & 1u) << (31 - bit);
  return reversed;
}
inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
  const uint64_t bytes = uint64_t(high) << 32 | low;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned pick = selector >> (4 * i) & 0xfu;
    unsigned byte = unsigned(bytes >> (8 * (pick & 7u))) & 0xffu;
    if (pick & 8u) byte = byte & 0x80u ? 0xffu : 0u;
    result |= byte << (8 * i);
  }
  return result;
}
inline int __float_as_int(float v) { return emulator::from_bits<int>(emulator::to_bits(v)); }
inline unsigned __float_as_uint(float v) { return emulator::from_bits<unsigned>(emulator::to_bits(v)); }
inline float __int_as_float(int v) { return emulator::from_bits<float>(emulator::to_bits(v)); }
inline float __uint_as_float(unsigned v) { return emulator::from_bits<float>(emulator::to_bits(v)); }
inline long long __double_as_longlong(double v) { return emulator::from_bits<long long>(emulator::to_bits(v)); }
inline double __longlong_as_double(long long v) { return emulator::from_bits<double>(emulator::to_bits(v)); }

// The approximate functions of the hardware: here they are exact to rounding, so a budget that holds may still fail on a GPU.
inline float __expf(float v) { return ::expf(v); }
inline float __logf(float v) { return ::logf(v); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float v) { return 1.0f / v; }
inline float rsqrtf(float v) { return 1.0f / ::sqrtf(v); }
inline float __fmaf_rn(float a, float b, float c) { return ::fmaf(a, b, c); }
template <typename T, typename U>
auto min(T a, U b) -> decltype(a + b) {
  return b < a ? b : a;
}
template <typename T, typename U>
auto max(T a, U b) -> decltype(a + b) {
  return a < b ? b : a;
}
