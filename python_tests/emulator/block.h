// What the scheduler knows about the threads and blocks that are running.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "cuda_runtime.h"
#include "fiber.h"

namespace emulator {

constexpr int kMaxThreads = 1024;

enum State : uint8_t { kReady, kMeeting, kAtBarrier, kLeft };

struct Thread {
  uint3 index;
  int number;
  State state;
  Stack stack;
  // What it waits for, and what came of it.
  const char* name;
  Location where;
  const Collective* collective;
  unsigned mask;
  uint64_t value, argument, result;
  bool predicate;

  int lane() const { return number % 32; }
};

// A block that is running, or the room for one.
struct Block {
  uint3 index;
  bool resident = false;
  int size;                            // its number of threads
  std::vector<Thread> threads;         // that many at least: their stacks are used again
  unsigned left[kMaxThreads / 32];     // a mask a warp: lanes that have left the kernel,
  unsigned meeting[kMaxThreads / 32];  // and lanes that wait in a collective
  int at_barrier, votes, finished;
  std::vector<int> order, rank;      // threads in the order of their turns, and its inverse
  uint64_t ready[kMaxThreads / 64];  // bit r: the thread of rank r can run
  std::vector<char> shared;          // its static shared memory while another block runs
  void* dynamic = nullptr;
};

struct Random {  // splitmix64
  uint64_t state = 0;
  uint64_t next() {
    uint64_t z = state += 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    return z ^ z >> 31;
  }
  unsigned below(unsigned n) { return unsigned(next() % n); }
  template <typename T>
  void shuffle(T* items, int count) {
    for (int i = count - 1; i > 0; --i) std::swap(items[i], items[below(unsigned(i + 1))]);
  }
};

}  // namespace emulator
