// Writing into another CTA's shared memory: what is written there is undefined from the instruction to a time that the
// hardware chooses, and the source of a copy is read at that time.
#pragma once
#include "mbarrier.cuh"

namespace fastscore::emulator {

inline Block& block_of_rank(uint32_t rank, const char* operation) {
  if (rank >= machine.blocks.size()) fail("%s: no CTA %u in a cluster of %zu", operation, rank, machine.blocks.size());
  return machine.blocks[rank];
}

// `read` gives the bytes when they arrive.
template <class Read>
void start_remote_write(uint32_t address, uint32_t bytes, uint32_t bar, uint32_t rank, const char* operation,
                        Read read) {
  require_capability(operation, 9);
  Block& block = block_of_rank(rank, operation);
  shared_bytes(block, bar, 8, 8, operation);
  uint8_t* memory = shared_bytes(block, address, bytes, bytes < 16 ? bytes : 16, operation);
  check_no_mbarrier(block, address, bytes, operation);
  memset(memory, kPoison, bytes);
  for (uint32_t at = address; at < address + bytes; at += 4) writer_of(block, at) = kClean;
  const auto perform = [=, &block] {
    if (block.running == 0) fail("%s to CTA %u, which has ended", operation, block.rank);
    read(memory);
    complete_bytes(block, bar, bytes);
  };
  start_asynchronous(operation, false, perform, bytes > 16);
}

}  // namespace fastscore::emulator

namespace fastscore::ptx {

inline void store_remote(uint32_t address, float2 value, uint32_t bar, uint32_t rank) {
  emulator::preempt();
  emulator::start_remote_write(address, 8, bar, rank, "store_remote",
                               [value](uint8_t* memory) { memcpy(memory, &value, 8); });
}

inline void bulk_copy_remote(uint32_t dst, uint32_t src, uint32_t bytes, uint32_t bar, uint32_t rank) {
  emulator::preempt();
  if (bytes == 0 || bytes % 16 != 0) emulator::fail("bulk_copy_remote of %u bytes, not a multiple of 16", bytes);
  emulator::Block& own = *emulator::current_thread().block;
  emulator::shared_bytes(own, src, bytes, 16, "bulk_copy_remote");
  emulator::start_remote_write(dst, bytes, bar, rank, "bulk_copy_remote", [=, &own](uint8_t* memory) {
    for (uint32_t at = 0; at < bytes; at += 16)
      memcpy(memory + at, emulator::asynchronous_read(own, src + at, "bulk_copy_remote"), 16);
  });
}

}  // namespace fastscore::ptx
