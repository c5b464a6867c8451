// What the emulated CUDA runtime (cuda_runtime.h beside this file) asks of the scheduler (../emulator.cpp).
//
// Every CUDA thread is a fiber: a stack of its own, and a switch at each barrier, warp collective, atomic and fence. All of
// them run in one operating system thread, one at a time, in an order that the environment variable GK_EMULATOR_ORDER names:
//   0   block after block, and in a block always the thread of the lowest index that can run
//   1   the same from the other end
//   2.. up to four blocks at once, in random order; the number is the seed
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct dim3;

namespace emulator {

// Where in the source a thread is. As a default argument, here() is the place of the call.
struct Location {
  const char* file;
  int line;
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Something that the lanes of a warp do together: each brings a value, and gets a result made of all of them.
struct Lanes {
  uint64_t values[32];
  unsigned present;  // bit i: lane i takes part, and its value counts
};
struct Collective {
  const char* name;
  uint64_t (*result)(const Lanes& lanes, int lane, uint64_t argument);
};

// What a shuffle returns from a lane that takes no part: NaN as a floating-point number, and no sensible integer.
constexpr uint64_t kPoison = ~uint64_t(0);

// Waits until all lanes of `mask` are here, those aside that have left the kernel.
uint64_t meet(const Collective& collective, unsigned mask, uint64_t value, uint64_t argument, Location where);

// Waits for the whole block; returns how many threads brought `predicate`. All must wait at one place.
int barrier(const char* name, bool predicate, Location where);

// Another thread, or another block, may run now. One block of a launch pauses for as long as others can run: at a yield drawn
// among all of them, each taken once in `odds` times (0: never).
void yield(unsigned odds);

// Ends the launch with an error: what a thread did that CUDA does not define.
[[noreturn]] void fail(const char* message, Location where);

int lane();
int block_size();
void* dynamic_shared();

// Runs `body` once for every thread. Returns a cudaError_t; error_text() says more.
int launch(const void* kernel, const dim3& blocks, const dim3& threads, size_t shared_bytes, const std::function<void()>& body);
void allow_shared(const void* kernel, size_t bytes);
int take_error();
const char* error_text(int error);

}  // namespace emulator
