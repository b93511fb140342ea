// setmaxnreg: only the rule that all warps of a warpgroup execute it with the same number.
#pragma once
#include <cuda_runtime.h>

namespace fastscore::emulator {

inline void set_registers(int count, const char* operation) {
  require_capability(operation, 9);
  Thread& thread = current_thread();
  Warpgroup& warpgroup = thread.block->warpgroups[thread.id / kWarpgroupSize];
  if (warpgroup.registers.arrived == 0) warpgroup.register_count = count;
  if (warpgroup.register_count != count)
    fail("%s<%d> where another warp of the warpgroup has %d", operation, count, warpgroup.register_count);
  meet(warpgroup.registers, kWarpgroupSize, operation, count);
}

}  // namespace fastscore::emulator

namespace fastscore::ptx {

template <int N>
void registers_increase() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  emulator::set_registers(N, "registers_increase");
}

template <int N>
void registers_decrease() {
  static_assert(N >= 24 && N <= 256 && N % 8 == 0);
  emulator::set_registers(N, "registers_decrease");
}

}  // namespace fastscore::ptx
