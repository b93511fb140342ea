// How long a block works: cycles of its multiprocessor and nanoseconds. Their quotient is the clock under that load, which
// no query tells while it runs.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastscore {

struct Span {
  uint64_t cycles, nanoseconds;
};

// Both counters now. In the emulator, where there is no time, one step of each.
__device__ __forceinline__ Span now() {
  Span span;
#if defined(__CUDACC__)
  asm volatile("mov.u64 %0, %%clock64;\nmov.u64 %1, %%globaltimer;"
               : "=l"(span.cycles), "=l"(span.nanoseconds)::"memory");
#else
  static uint64_t steps = 0;
  span.cycles = span.nanoseconds = ++steps;
#endif
  return span;
}

// One thread of a block writes what passed since `start`.
__device__ __forceinline__ void write_since(const Span& start, Span* target) {
  const Span end = now();
  target->cycles = end.cycles - start.cycles;
  target->nanoseconds = end.nanoseconds - start.nanoseconds;
}

}  // namespace fastscore
