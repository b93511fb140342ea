// cp.async: the destination is undefined until the group is waited for, or the copy happens to be made before.
#pragma once
#include <cuda_runtime.h>

#include "emulator/memory.h"

namespace fastscore::emulator {

inline void perform_oldest_copies(Thread& thread) {
  for (const ThreadCopy& copy : thread.copies.front()) {
    memcpy(shared_bytes(*thread.block, copy.dst, 16, 16, "cp_async_16"), copy.src, 16);
    note_store(thread, copy.dst, 16);  // cp.async is not of the asynchronous proxy
  }
  thread.copies.pop_front();
}

}  // namespace fastscore::emulator

namespace fastscore::ptx {

inline void cp_async_16(uint32_t dst, const void* src) {
  emulator::Thread& thread = emulator::current_thread();
  if (reinterpret_cast<uintptr_t>(src) % 16 != 0) emulator::fail("cp_async_16 from %p is not aligned to 16 bytes", src);
  emulator::poison_destination(*thread.block, dst, 16, "cp_async_16");
  thread.copies.back().push_back({dst, src});
}

inline void cp_async_commit() {
  emulator::Thread& thread = emulator::current_thread();
  thread.copies.emplace_back();
  if (emulator::machine.schedule != emulator::Schedule::in_order && emulator::one_in(4))
    emulator::perform_oldest_copies(thread);
}

template <int N>
void cp_async_wait() {
  emulator::Thread& thread = emulator::current_thread();
  while (thread.copies.size() > N + 1) emulator::perform_oldest_copies(thread);
}

}  // namespace fastscore::ptx
