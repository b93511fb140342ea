// Bulk copies: the destination is undefined from the instruction to a time that the copy engine chooses.
#pragma once
#include "mbarrier.cuh"

namespace fastscore::emulator {

inline void start_bulk_copy(Block& block, uint32_t dst, const void* src, uint32_t bytes, uint32_t bar,
                            const char* operation) {
  if (bytes == 0 || bytes % 16 != 0) fail("%s of %u bytes, not a multiple of 16", operation, bytes);
  if (reinterpret_cast<uintptr_t>(src) % 16 != 0) fail("%s from %p is not aligned to 16 bytes", operation, src);
  poison_destination(block, dst, bytes, operation);
  shared_bytes(block, bar, 8, 8, operation);
  start_asynchronous(operation, true, [=, &block] {
    if (block.running == 0) fail("%s to CTA %u, which has ended", operation, block.rank);
    memcpy(shared_bytes(block, dst, bytes, 16, operation), src, bytes);
    complete_bytes(block, bar, bytes);
  });
}

}  // namespace fastscore::emulator

namespace fastscore::ptx {

inline void bulk_copy(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar) {
  emulator::preempt();
  emulator::require_capability("bulk_copy", 9);
  emulator::start_bulk_copy(*emulator::current_thread().block, dst, src, bytes, bar, "bulk_copy");
}

// The CTAs of the mask receive the bytes at different times.
inline void bulk_copy_multicast(uint32_t dst, const void* src, uint32_t bytes, uint32_t bar, uint16_t mask) {
  emulator::preempt();
  emulator::require_capability("bulk_copy_multicast", 9);
  if (mask == 0 || mask >> emulator::machine.blocks.size() != 0)
    emulator::fail("bulk_copy_multicast: mask 0x%x in a cluster of %zu", mask, emulator::machine.blocks.size());
  for (emulator::Block& block : emulator::machine.blocks)
    if (mask >> block.rank & 1) emulator::start_bulk_copy(block, dst, src, bytes, bar, "bulk_copy_multicast");
}

}  // namespace fastscore::ptx
