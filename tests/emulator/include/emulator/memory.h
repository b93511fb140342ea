// Shared memory with bounds, alignment and the proxy of the last writer.
#pragma once
#include <cstring>

#include "scheduler.h"

namespace fastscore::emulator {

// The bytes at `address` of the window of `block`; fails if they are outside or not aligned.
inline uint8_t* shared_bytes(Block& block, uint32_t address, uint32_t bytes, uint32_t alignment, const char* access) {
  if (address % alignment != 0) fail("%s at 0x%x is not aligned to %u bytes", access, address, alignment);
  if (address < kSharedBase || uint64_t{address} + bytes > uint64_t{kSharedBase} + block.memory_bytes)
    fail("%s of %u bytes at 0x%x is outside the %u bytes of shared memory at 0x%x", access, bytes, address,
         block.memory_bytes, kSharedBase);
  return block.memory + (address - kSharedBase);
}

inline uint16_t& writer_of(Block& block, uint32_t address) { return block.written[(address - kSharedBase) / 4]; }

// A store overwrites no barrier.
inline void check_no_mbarrier(Block& block, uint32_t address, uint32_t bytes, const char* access) {
  for (uint32_t at = address; at < address + bytes; at += 4)
    if (writer_of(block, at) == kMbarrier) fail("%s at 0x%x overwrites the mbarrier at 0x%x", access, address, at);
}

// Notes a store by ordinary instructions: the asynchronous proxy sees it after the writer's fence.proxy.async.
inline void note_store(Thread& thread, uint32_t address, uint32_t bytes) {
  for (uint32_t at = address; at < address + bytes; at += 4) {
    uint16_t& writer = writer_of(*thread.block, at);
    if (writer == thread.id + 1) continue;
    writer = static_cast<uint16_t>(thread.id + 1);
    thread.unfenced.push_back(at);
  }
}

inline void fence_stores(Thread& thread) {
  for (uint32_t at : thread.unfenced)
    if (uint16_t& writer = writer_of(*thread.block, at); writer == thread.id + 1) writer = kClean;
  thread.unfenced.clear();
}

// 16 bytes as wgmma reads them.
inline const uint8_t* asynchronous_read(Block& block, uint32_t address, const char* access) {
  const uint8_t* bytes = shared_bytes(block, address, 16, 16, access);
  for (uint32_t at = address; at < address + 16; at += 4)
    if (uint16_t writer = writer_of(block, at); writer != kClean) {
      if (writer == kMbarrier) fail("%s reads the mbarrier at 0x%x", access, at);
      fail("%s reads 0x%x, which thread %d wrote without fence_proxy_async", access, at, writer - 1);
    }
  return bytes;
}

// The destination of an asynchronous copy holds NaN until the copy is made.
inline void poison_destination(Block& block, uint32_t address, uint32_t bytes, const char* access) {
  uint8_t* memory = shared_bytes(block, address, bytes, 16, access);
  check_no_mbarrier(block, address, bytes, access);
  memset(memory, kPoison, bytes);
  for (uint32_t at = address; at < address + bytes; at += 4) writer_of(block, at) = kClean;
}

}  // namespace fastscore::emulator
