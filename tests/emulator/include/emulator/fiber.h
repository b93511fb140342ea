// Fibers: every CUDA thread is a stack that runs until it has to wait.
#pragma once
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#if !defined(__x86_64__) || defined(FASTSCORE_UCONTEXT)
#define FASTSCORE_UCONTEXT
#include <ucontext.h>
#endif

namespace fastscore::emulator {

#if !defined(FASTSCORE_UCONTEXT)

// A suspended computation is its stack pointer; the registers that calls preserve are on the stack.
struct Context {
  void* stack_pointer = nullptr;
};

// Saves the registers that the System V ABI preserves, exchanges the stacks, and returns on the other one.
__attribute__((naked, noinline)) inline void exchange_stacks(void** /*save: rdi*/, void* /*load: rsi*/) {
  asm volatile(
      "pushq %rbp\n"
      "pushq %rbx\n"
      "pushq %r12\n"
      "pushq %r13\n"
      "pushq %r14\n"
      "pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n"
      "popq %r14\n"
      "popq %r13\n"
      "popq %r12\n"
      "popq %rbx\n"
      "popq %rbp\n"
      "ret\n");
}

inline void create_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack + bytes) & ~uintptr_t{15});
  *--top = nullptr;  // where entry, which never returns, would return to
  *--top = reinterpret_cast<void*>(entry);
  for (int saved = 0; saved < 6; saved++) *--top = nullptr;
  context.stack_pointer = top;
}

inline void switch_context(Context& from, Context& to) { exchange_stacks(&from.stack_pointer, to.stack_pointer); }

#else

struct Context {
  ucontext_t state;
};

inline void create_context(Context& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = bytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }

#endif

// Stacks for all threads of a cluster; pages that no thread touches cost nothing.
class Stacks {
 public:
  static constexpr size_t kBytes = 256 << 10;
  static constexpr uint64_t kCanary = 0x6b63617473666f21;  // at the low end of every stack

  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() { release(); }

  void reserve(size_t count) {
    if (count <= count_) return;
    release();
    void* memory =
        mmap(nullptr, count * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    count_ = count;
    for (size_t i = 0; i < count; i++) canary(i) = kCanary;
  }

  char* stack(size_t i) { return memory_ + i * kBytes; }
  uint64_t& canary(size_t i) { return *reinterpret_cast<uint64_t*>(stack(i)); }

 private:
  void release() {
    if (memory_) munmap(memory_, count_ * kBytes);
    memory_ = nullptr;
    count_ = 0;
  }

  char* memory_ = nullptr;
  size_t count_ = 0;
};

}  // namespace fastscore::emulator
