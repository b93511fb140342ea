// Asynchronous copies of many bytes from global to shared memory by the copy engine (sm_90).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastscore::ptx {

// Copies `bytes` (addresses and size multiples of 16) and counts them at the barrier `bar`.
__device__ __forceinline__ void bulk_copy(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
               "l"(src), "r"(bytes), "r"(bar)
               : "memory");
}

// Copies to the same offset, and counts at the same barrier, in every CTA of the cluster that is in `mask`.
__device__ __forceinline__ void bulk_copy_multicast(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar,
                                                    uint16_t mask) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1], %2, [%3], %4;" ::"r"(dst),
      "l"(src), "r"(bytes), "r"(bar), "h"(mask)
      : "memory");
}

}  // namespace fastscore::ptx
