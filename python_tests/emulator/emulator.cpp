// The scheduler: which thread of which block runs next, who waits for whom, and what went wrong.
#include "emulator.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "block.h"
#include "cuda_runtime.h"
#include "messages.h"

uint3 threadIdx, blockIdx;
dim3 blockDim(1, 1, 1), gridDim(1, 1, 1);

extern "C" char gk_shared_begin[], gk_shared_end[];  // shared.ld

namespace emulator {
namespace {

constexpr int kMaxResident = 4, kPatience = 1000;
constexpr size_t kMaxShared = 227 << 10, kDefaultShared = 48 << 10;

std::mutex one_launch;
int error_code = cudaSuccess;
std::string last_text;
std::map<const void*, size_t> allowed_shared;

Block blocks[kMaxResident];
Block* active;  // whose shared memory is in place
Block* lazy;    // pauses where that can be fatal: others know of it already, but it has not written everything
unsigned candidates;
int patience;  // how often others get a turn before it; without a limit, those that wait for it would wait for ever
Thread* current;
Stack scheduler;
const std::function<void()>* body;
Random random_numbers;
long order_number;
bool failed, yielded;

// The first error stays until it is taken.
int set_error(int code, const std::string& text) {
  if (error_code == cudaSuccess) {
    error_code = code;
    last_text = text;
  }
  return code;
}

// --- turns -------------------------------------------------------------------------------------------------------------------

void make_ready(Block& b, Thread& t) {
  const int rank = b.rank[t.number];
  t.state = kReady;
  b.ready[rank / 64] |= uint64_t(1) << rank % 64;
}

void make_wait(Block& b, Thread& t, State state) {
  const int rank = b.rank[t.number];
  t.state = state;
  b.ready[rank / 64] &= ~(uint64_t(1) << rank % 64);
}

// Everybody can run: the moment to draw a new order of turns.
void start_turns(Block& b) {
  const int count = b.size;
  b.order.resize(count);
  b.rank.resize(count);
  for (int i = 0; i < count; ++i) b.order[i] = order_number == 1 ? count - 1 - i : i;
  if (order_number > 1 && random_numbers.below(2) == 0) {
    random_numbers.shuffle(b.order.data(), count);
  } else if (order_number > 1) {  // a warp far ahead of the others
    int warps[kMaxThreads / 32];
    const int number = (count + 31) / 32;
    for (int w = 0; w < number; ++w) warps[w] = w;
    random_numbers.shuffle(warps, number);
    for (int w = 0, i = 0; w < number; ++w) {
      for (int t = warps[w] * 32; t < std::min(count, warps[w] * 32 + 32); ++t) b.order[i++] = t;
    }
  }
  std::fill(std::begin(b.ready), std::end(b.ready), 0);
  for (int i = 0; i < count; ++i) {
    b.rank[b.order[i]] = i;
    make_ready(b, b.threads[b.order[i]]);
  }
}

// The thread whose turn is next, from a place in the order on; null if none can run.
Thread* next_thread(Block& b, int start) {
  uint64_t from = ~uint64_t(0) << start % 64;
  for (int i = 0, word = start / 64; i <= kMaxThreads / 64; ++i, word = (word + 1) % (kMaxThreads / 64), from = ~uint64_t(0)) {
    const uint64_t bits = b.ready[word] & from;
    if (bits != 0) return &b.threads[b.order[word * 64 + __builtin_ctzll(bits)]];
  }
  return nullptr;
}

// --- warps -------------------------------------------------------------------------------------------------------------------

// Lets the lanes of a collective go if all of them have come.
void complete(Block& b, Thread& t) {
  const int base = t.number - t.lane();
  const unsigned wanted = t.mask & ~b.left[base / 32];
  if (wanted & ~b.meeting[base / 32]) return;
  Lanes lanes;
  lanes.present = wanted;
  for (unsigned rest = wanted; rest != 0; rest &= rest - 1) {
    const int lane = __builtin_ctz(rest);
    const Thread& other = b.threads[base + lane];
    if (other.collective != t.collective || other.mask != t.mask) return;
    lanes.values[lane] = other.value;
  }
  for (unsigned rest = wanted; rest != 0; rest &= rest - 1) {
    Thread& other = b.threads[base + __builtin_ctz(rest)];
    other.result = other.collective->result(lanes, other.lane(), other.argument);
    make_ready(b, other);
  }
  b.meeting[base / 32] &= ~wanted;
}

// --- blocks ------------------------------------------------------------------------------------------------------------------

void run_thread() {
  current->stack.arrived(&scheduler);
  (*body)();
  Block& b = *active;
  Thread& t = *current;
  make_wait(b, t, kLeft);
  ++b.finished;
  const int base = t.number - t.lane();
  b.left[base / 32] |= 1u << t.lane();
  for (int i = base; i < base + 32 && i < b.size; ++i) {
    if (b.threads[i].state == kMeeting) complete(b, b.threads[i]);
  }
  t.stack.enter(scheduler, true);
}

// Copies past address sanitizer, whose forbidden zones lie between the variables; memcpy would be checked.
__attribute__((no_sanitize("address"), optimize("no-tree-loop-distribute-patterns"))) void copy_words(char* to,
                                                                                                      const char* from,
                                                                                                      size_t bytes) {
  auto* target = reinterpret_cast<uint64_t*>(to);
  const auto* source = reinterpret_cast<const uint64_t*>(from);
  for (size_t i = 0; i < bytes / 8; ++i) target[i] = source[i];
}

void activate(Block& b) {
  if (active == &b) return;
  const size_t size = size_t(gk_shared_end - gk_shared_begin);
  if (active != nullptr) copy_words(active->shared.data(), gk_shared_begin, size);
  copy_words(gk_shared_begin, b.shared.data(), size);
  active = &b;
  blockIdx = b.index;
}

void free_dynamic(Block& b) {
  free(b.dynamic);
  b.dynamic = nullptr;
}

void start_block(Block& b, unsigned number, size_t shared_bytes) {
  const unsigned rows = number / gridDim.x;
  b.index = {number % gridDim.x, rows % gridDim.y, rows / gridDim.y};
  b.resident = true;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  b.size = int(count);
  if (b.threads.size() < count) b.threads.resize(count);
  std::fill(std::begin(b.left), std::end(b.left), 0);
  if (count % 32 != 0) b.left[count / 32] = ~0u << count % 32;  // lanes that the last warp does not have
  std::fill(std::begin(b.meeting), std::end(b.meeting), 0);
  b.at_barrier = b.votes = b.finished = 0;
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = b.threads[i];
    const unsigned line = i / blockDim.x;
    t.index = {i % blockDim.x, line % blockDim.y, line / blockDim.y};
    t.number = int(i);
    t.stack.start(run_thread);
  }
  start_turns(b);
  b.shared.assign(size_t(gk_shared_end - gk_shared_begin), char(0xff));
  if (shared_bytes > 0 && posix_memalign(&b.dynamic, 16, shared_bytes) == 0) memset(b.dynamic, 0xff, shared_bytes);
}

// Runs the active block until it is another one's turn. False when the launch has failed.
bool run_block() {
  Block& b = *active;
  int start = 0;
  do {
    Thread* t = next_thread(b, start);
    if (t == nullptr) {
      set_error(cudaErrorLaunchFailure, stuck_text(b));
      return false;
    }
    yielded = false;
    current = t;
    threadIdx = t->index;
    scheduler.enter(t->stack);
    if (failed) return false;
    if (b.finished == b.size) {
      b.resident = false;
      active = nullptr;
      free_dynamic(b);
      return true;
    }
    start = yielded ? int(random_numbers.below(unsigned(b.size))) : 0;
  } while (order_number < 2 || (lazy != &b && random_numbers.below(yielded ? 2 : 64) != 0));
  return true;
}

// The block to run next, of those that are resident. The lazy one waits as long as others can run.
Block* choose_block(int rooms) {
  if (lazy != nullptr && (!lazy->resident || --patience == 0)) {
    lazy = nullptr;
    patience = kPatience;
  }
  Block* running[kMaxResident];
  unsigned count = 0;
  for (int i = 0; i < rooms; ++i) {
    if (blocks[i].resident && &blocks[i] != lazy) running[count++] = &blocks[i];
  }
  return count > 0 ? running[count == 1 ? 0 : random_numbers.below(count)] : lazy;
}

void run_grid(size_t shared_bytes) {
  const unsigned count = gridDim.x * gridDim.y * gridDim.z;
  std::vector<unsigned> waiting(count);  // the next one is at the end
  for (unsigned i = 0; i < count; ++i) waiting[i] = order_number == 1 ? i : count - 1 - i;
  if (order_number > 1) random_numbers.shuffle(waiting.data(), int(count));
  const int rooms = order_number < 2 ? 1 : 2 + int(order_number % 3);
  do {
    for (int i = 0; i < rooms && !waiting.empty(); ++i) {
      if (blocks[i].resident) continue;
      start_block(blocks[i], waiting.back(), shared_bytes);
      waiting.pop_back();
    }
    Block* next = choose_block(rooms);
    if (next == nullptr) return;
    activate(*next);
  } while (run_block());
}

int check_shape(const void* kernel, const dim3& grid, const dim3& threads, size_t shared_bytes) {
  const uint64_t count = uint64_t(threads.x) * threads.y * threads.z;
  const bool good_grid =
      grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535;
  if (!good_grid || count < 1 || count > kMaxThreads || threads.z > 64) {
    return set_error(cudaErrorInvalidConfiguration, "a launch of (" + std::to_string(grid.x) + ", " + std::to_string(grid.y) +
                                                        ", " + std::to_string(grid.z) + ") blocks of " + std::to_string(count) +
                                                        " threads");
  }
  const auto allowed = allowed_shared.find(kernel);
  const size_t limit = allowed == allowed_shared.end() ? kDefaultShared : std::min(allowed->second, kMaxShared);
  if (shared_bytes > limit) {
    return set_error(cudaErrorInvalidValue,
                     std::to_string(shared_bytes) + " bytes of dynamic shared memory, of at most " + std::to_string(limit));
  }
  return cudaSuccess;
}

}  // namespace

// --- what kernels call -------------------------------------------------------------------------------------------------------

void fail(const char* message, Location where) {
  failed = true;
  set_error(cudaErrorLaunchFailure, std::string(message) + " (" + text_of(where) + ", thread " + text_of(current->index) +
                                        " of block " + text_of(active->index) + ")");
  current->stack.enter(scheduler, true);
  abort();  // never entered again
}

uint64_t meet(const Collective& collective, unsigned mask, uint64_t value, uint64_t argument, Location where) {
  Thread& t = *current;
  t.name = collective.name;
  t.where = where;
  if (!(mask >> t.lane() & 1u)) {
    fail((std::string(t.name) + ": the mask " + hexadecimal(mask) + " leaves out the calling lane").c_str(), where);
  }
  t.collective = &collective;
  t.mask = mask;
  t.value = value;
  t.argument = argument;
  make_wait(*active, t, kMeeting);
  active->meeting[t.number / 32] |= 1u << t.lane();
  complete(*active, t);
  t.stack.enter(scheduler);
  return t.result;
}

int barrier(const char* name, bool predicate, Location where) {
  Block& b = *active;
  Thread& t = *current;
  t.name = name;
  t.where = where;
  t.predicate = predicate;
  make_wait(b, t, kAtBarrier);
  if (++b.at_barrier == block_size()) {
    bool together = true;
    int votes = 0;
    for (int i = 0; i < b.size; ++i) {
      const Thread& other = b.threads[i];
      together &= other.where.line == where.line && strcmp(other.where.file, where.file) == 0 && strcmp(other.name, name) == 0;
      votes += other.predicate;
    }
    if (together) {  // else nobody can run, which the scheduler reports
      b.at_barrier = 0;
      b.votes = votes;
      start_turns(b);
    }
  }
  t.stack.enter(scheduler);
  return b.votes;
}

void yield(unsigned odds) {
  if (order_number < 2) return;
  if (odds > 0 && random_numbers.below(odds) == 0 && random_numbers.below(++candidates) == 0) {
    lazy = active;  // in the end, every candidate had the same chance
  } else if (random_numbers.below(2) == 0) {
    return;
  }
  yielded = true;
  current->stack.enter(scheduler);
}

int lane() { return current->lane(); }
int block_size() { return active->size; }
void* dynamic_shared() { return active->dynamic; }

// --- what the host calls -----------------------------------------------------------------------------------------------------

int launch(const void* kernel, const dim3& grid, const dim3& threads, size_t shared_bytes,
           const std::function<void()>& function) {
  const std::lock_guard<std::mutex> lock(one_launch);
  if (error_code != cudaSuccess) return error_code;  // as on a GPU, nothing runs after a failure
  if (const int status = check_shape(kernel, grid, threads, shared_bytes)) return status;
  const char* asked = getenv("GK_EMULATOR_ORDER");
  order_number = asked == nullptr ? 0 : atol(asked);
  random_numbers.state = uint64_t(order_number) << 32;
  gridDim = grid;
  blockDim = threads;
  body = &function;
  active = lazy = nullptr;
  candidates = 0;
  patience = kPatience;
  failed = false;
  run_grid(shared_bytes);
  for (Block& b : blocks) {
    b.resident = false;
    free_dynamic(b);
  }
  return error_code;
}

void allow_shared(const void* kernel, size_t bytes) { allowed_shared[kernel] = bytes; }

int take_error() { return std::exchange(error_code, int(cudaSuccess)); }

const char* error_text(int error) { return error == cudaSuccess ? "no error" : last_text.c_str(); }

}  // namespace emulator
