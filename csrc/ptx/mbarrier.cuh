// Barriers in shared memory that count arrivals and the bytes of asynchronous copies (sm_90).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastscore::ptx {

// Initialises the barrier at `bar`, whose every phase takes `count` arrivals.
__device__ __forceinline__ void mbarrier_init(uint32_t bar, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// Makes initialised barriers visible to the cluster and to bulk copies.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Arrives, and lets the phase wait for `bytes` more bytes.
__device__ __forceinline__ void mbarrier_expect(uint32_t bar, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

// Arrives at a barrier of this CTA.
__device__ __forceinline__ void mbarrier_arrive(uint32_t bar) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrives at the barrier with the same offset in CTA `rank` of the cluster, after this thread's earlier reads: gives a
// buffer back, but hands no writes over. The form with .release.cluster would wait for a fence of the whole GPU.
__device__ __forceinline__ void mbarrier_arrive_remote(uint32_t bar, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(bar),
      "r"(rank)
      : "memory");
}

// Whether the phase with parity `phase` has completed; may suspend the thread for a while first. The form with
// .acquire.cluster would throw away the L1 cache, and copied bytes are visible without it.
__device__ __forceinline__ bool mbarrier_try_wait(uint32_t bar, uint32_t phase) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%1], %2;\n"
      "selp.u32 %0, 1, 0, complete;\n"
      "}"
      : "=r"(complete)
      : "r"(bar), "r"(phase)
      : "memory");
  return complete != 0;
}

// Waits until the phase with parity `phase` has completed.
__device__ __forceinline__ void mbarrier_wait(uint32_t bar, uint32_t phase) {
  while (!mbarrier_try_wait(bar, phase)) {
  }
}

}  // namespace fastscore::ptx
