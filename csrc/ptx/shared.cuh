// Shared memory by its 32-bit address in the shared window.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastscore::ptx {

// Dynamic shared memory of this CTA, aligned to the 1024 bytes after which the 128-byte swizzle repeats.
__device__ __forceinline__ uint8_t* shared_memory() {
  extern __shared__ __align__(1024) uint8_t fastscore_shared[];
  return fastscore_shared;
}

// Address in the shared window of a generic pointer.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ld.shared of 4, 8 or 16 bytes; plain C++, so that the compiler may schedule it.
template <class T>
__device__ __forceinline__ T load_shared(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  return *static_cast<const T*>(__cvta_shared_to_generic(address));
}

// st.shared of 4, 8 or 16 bytes; plain C++, so that the compiler may schedule it.
template <class T>
__device__ __forceinline__ void store_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  *static_cast<T*>(__cvta_shared_to_generic(address)) = value;
}

// Makes this thread's earlier stores to shared memory visible to wgmma and bulk copies.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Waits at barrier `id` for `threads` threads, a multiple of 32.
__device__ __forceinline__ void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace fastscore::ptx
