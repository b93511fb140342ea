// A phase of an mbarrier completes when all arrivals and all expected bytes have come; then the next one starts.
#pragma once
#include <cuda_runtime.h>

#include "emulator/memory.h"

namespace fastscore::emulator {

inline Mbarrier& mbarrier_at(Block& block, uint32_t bar, const char* operation) {
  shared_bytes(block, bar, 8, 8, operation);
  auto found = block.mbarriers.find(bar);
  if (found == block.mbarriers.end()) fail("%s at 0x%x, where no mbarrier was initialised", operation, bar);
  return found->second;
}

inline void complete_phase_if_done(Mbarrier& mbarrier) {
  if (mbarrier.pending != 0 || mbarrier.bytes != 0) return;
  mbarrier.phase ^= 1;
  mbarrier.pending = mbarrier.count;
  wake_all(mbarrier.waiting);
}

inline void arrive_at_mbarrier(Block& block, uint32_t bar, uint32_t bytes, const char* operation) {
  Mbarrier& mbarrier = mbarrier_at(block, bar, operation);
  if (mbarrier.pending == 0)
    fail("%s at 0x%x: the phase already has its %u arrivals and waits for %lld bytes", operation, bar, mbarrier.count,
         static_cast<long long>(mbarrier.bytes));
  mbarrier.bytes += bytes;
  if (mbarrier.bytes >= 1 << 20) fail("%s at 0x%x: a phase counts less than 2^20 bytes", operation, bar);
  mbarrier.pending--;
  complete_phase_if_done(mbarrier);
}

// A bulk copy delivered its bytes; this may come before the arrival that expects them.
inline void complete_bytes(Block& block, uint32_t bar, uint32_t bytes) {
  Mbarrier& mbarrier = mbarrier_at(block, bar, "completion of a bulk copy");
  mbarrier.bytes -= bytes;
  if (mbarrier.pending == 0 && mbarrier.bytes < 0)
    fail("bulk copies delivered %lld bytes more than the mbarrier at 0x%x expects",
         -static_cast<long long>(mbarrier.bytes), bar);
  complete_phase_if_done(mbarrier);
}

}  // namespace fastscore::emulator

namespace fastscore::ptx {

inline void mbarrier_init(uint32_t bar, uint32_t count) {
  emulator::require_capability("mbarrier_init", 9);
  emulator::Block& block = *emulator::current_thread().block;
  emulator::shared_bytes(block, bar, 8, 8, "mbarrier_init");
  if (count == 0 || count >= 1 << 20) emulator::fail("mbarrier_init at 0x%x with count %u", bar, count);
  auto [mbarrier, is_new] = block.mbarriers.try_emplace(bar);
  if (!is_new) emulator::fail("mbarrier_init at 0x%x, where there is one already", bar);
  mbarrier->second.count = mbarrier->second.pending = count;
  emulator::writer_of(block, bar) = emulator::writer_of(block, bar + 4) = emulator::kMbarrier;
}

inline void mbarrier_init_fence() {}

inline void mbarrier_expect(uint32_t bar, uint32_t bytes) {
  emulator::preempt();
  emulator::arrive_at_mbarrier(*emulator::current_thread().block, bar, bytes, "mbarrier_expect");
}

inline void mbarrier_arrive(uint32_t bar) {
  emulator::preempt();
  emulator::arrive_at_mbarrier(*emulator::current_thread().block, bar, 0, "mbarrier_arrive");
}

inline void mbarrier_arrive_remote(uint32_t bar, uint32_t rank) {
  emulator::preempt();
  if (rank >= emulator::machine.blocks.size())
    emulator::fail("mbarrier_arrive_remote: no CTA %u in a cluster of %zu", rank, emulator::machine.blocks.size());
  emulator::Block& block = emulator::machine.blocks[rank];
  if (block.running == 0) emulator::fail("mbarrier_arrive_remote at 0x%x in CTA %u, which has ended", bar, rank);
  emulator::arrive_at_mbarrier(block, bar, 0, "mbarrier_arrive_remote");
}

// Suspends the thread until a phase completes, then looks again: like the hardware, it misses a phase if the next one
// has completed before it looked.
inline bool mbarrier_try_wait(uint32_t bar, uint32_t phase) {
  emulator::preempt();
  if (phase > 1) emulator::fail("mbarrier_wait at 0x%x: the phase is a parity, not %u", bar, phase);
  emulator::Thread& thread = emulator::current_thread();
  emulator::Mbarrier& mbarrier = emulator::mbarrier_at(*thread.block, bar, "mbarrier_wait");
  if (mbarrier.phase == phase) {
    mbarrier.waiting.push_back(&thread);
    emulator::block("mbarrier_wait", bar, phase);
  }
  return mbarrier.phase != phase;
}

inline void mbarrier_wait(uint32_t bar, uint32_t phase) {
  while (!mbarrier_try_wait(bar, phase)) {
  }
}

}  // namespace fastscore::ptx
