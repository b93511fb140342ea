// Moving registers between the warpgroups of a CTA (sm_90a).
#pragma once
#include <cuda_runtime.h>

namespace fastscore::ptx {

// Gives every thread of this warpgroup N registers, more than it had; waits until they are free.
template <int N>
__device__ __forceinline__ void registers_increase() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// Leaves every thread of this warpgroup N registers, fewer than it had.
template <int N>
__device__ __forceinline__ void registers_decrease() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

}  // namespace fastscore::ptx
