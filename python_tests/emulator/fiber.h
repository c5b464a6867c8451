// A fiber: a stack, and the switch from one stack to another. Address sanitizer is told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

// emulator_switch(&left, entered): pushes the registers that a call preserves, stores the stack pointer in `left`, takes
// `entered` for it and pops them there. (swapcontext would do, but asks the kernel for the signal mask each time.)
#if defined(__x86_64__)
asm(R"(
  .text
  .type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_switch, .-emulator_switch
)");
constexpr int kReturnWord = 6, kFrameWords = 8;  // six registers and the address to return to; a call leaves the stack so
#else
#error "the emulator knows how to switch stacks on x86-64 only"
#endif
extern "C" void emulator_switch(void** left, void* entered);

namespace emulator {

class Stack {
 public:
  void* pointer = nullptr;  // while it is not running

  // A stack that starts in `entry`, which must not return.
  void start(void (*entry)()) {
    if (base_ == nullptr) allocate();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(base_, kSize);  // what a fiber left behind that never came to its end
#endif
    auto* words = reinterpret_cast<uintptr_t*>(base_ + kSize) - kFrameWords;
    for (int i = 0; i < kFrameWords; ++i) words[i] = 0;
    words[kReturnWord] = reinterpret_cast<uintptr_t>(entry);
    pointer = words;
  }

  // From this stack to another. `last`: this one is not entered again.
  void enter(Stack& other, bool last = false) {
    (void)last;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(last ? nullptr : &frames_, other.base_, other.size_);
    emulator_switch(&pointer, other.pointer);
    arrived();
#else
    emulator_switch(&pointer, other.pointer);
#endif
  }

  // What a new stack does first; `from` is the one it was entered from.
  void arrived(Stack* from = nullptr) {
    (void)from;
#if defined(__SANITIZE_ADDRESS__)
    const void* base;
    size_t size;
    __sanitizer_finish_switch_fiber(frames_, &base, &size);
    if (from == nullptr) return;
    from->base_ = static_cast<char*>(const_cast<void*>(base));
    from->size_ = size;
#endif
  }

 private:
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kSize = 256 << 10;
#else
  static constexpr size_t kSize = 64 << 10;
#endif

  // The page below the stack cannot be touched: an overflow ends the process instead of reaching a neighbour.
  void allocate() {
    const auto page = size_t(sysconf(_SC_PAGESIZE));
    void* memory = mmap(nullptr, kSize + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
    base_ = static_cast<char*>(memory) + page;
    size_ = kSize;
  }

  char* base_ = nullptr;
  size_t size_ = 0;
  void* frames_ = nullptr;  // address sanitizer's
};

}  // namespace emulator
