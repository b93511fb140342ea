// Writing into the shared memory of another CTA of the cluster, asynchronously: what arrives is counted at an mbarrier
// there, and who waits for that sees it, without a fence of the whole GPU on either side (sm_90).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastscore::ptx {

// Address, in the window of the cluster, of what has that address in CTA `rank`.
__device__ __forceinline__ uint32_t remote_address(uint32_t address, uint32_t rank) {
  uint32_t remote;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(address), "r"(rank));
  return remote;
}

// Stores 8 bytes at the same offset in CTA `rank`, and counts them at its barrier `bar`.
__device__ __forceinline__ void store_remote(uint32_t address, float2 value, uint32_t bar, uint32_t rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   remote_address(address, rank)),
               "f"(value.x), "f"(value.y), "r"(remote_address(bar, rank))
               : "memory");
}

// Copies `bytes` of this CTA's shared memory (addresses and size multiples of 16) to that address in CTA `rank`, and
// counts them at its barrier `bar`. The copy engine reads past the ordinary stores, as wgmma does.
__device__ __forceinline__ void bulk_copy_remote(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar,
                                                 uint32_t rank) {
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   remote_address(dst, rank)),
               "r"(src), "r"(bytes), "r"(remote_address(bar, rank))
               : "memory");
}

}  // namespace fastscore::ptx
