// Shared memory by its 32-bit address in the shared window, checked at every access.
#pragma once
#include <cuda_runtime.h>

#include "emulator/memory.h"

namespace fastscore::ptx {

inline uint8_t* shared_memory() { return emulator::current_thread().block->memory; }

inline uint32_t shared_address(const void* pointer) {
  const emulator::Block& block = *emulator::current_thread().block;
  ptrdiff_t offset = static_cast<const uint8_t*>(pointer) - block.memory;
  if (offset < 0 || offset > ptrdiff_t{block.memory_bytes}) emulator::fail("shared_address of another memory");
  return emulator::kSharedBase + static_cast<uint32_t>(offset);
}

template <class T>
T load_shared(uint32_t address) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  T value;
  memcpy(&value,
         emulator::shared_bytes(*emulator::current_thread().block, address, sizeof(T), sizeof(T), "load_shared"),
         sizeof(T));
  return value;
}

// The store is not yet visible to wgmma and bulk copies.
template <class T>
void store_shared(uint32_t address, T value) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  emulator::Thread& thread = emulator::current_thread();
  uint8_t* bytes = emulator::shared_bytes(*thread.block, address, sizeof(T), sizeof(T), "store_shared");
  emulator::check_no_mbarrier(*thread.block, address, sizeof(T), "store_shared");
  memcpy(bytes, &value, sizeof(T));
  emulator::note_store(thread, address, sizeof(T));
}

inline void fence_proxy_async() { emulator::fence_stores(emulator::current_thread()); }

inline void named_barrier_sync(int id, int threads) { emulator::meet_named(id, threads, "named_barrier_sync"); }

}  // namespace fastscore::ptx
