// stmatrix: the lanes meet; what a lane holds it stores itself, for the proxies.
#pragma once
#include <cuda_runtime.h>

#include "emulator/memory.h"

namespace fastscore::ptx {

inline void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  struct {
    uint32_t address;
    uint32_t rows[4];  // of the lane's four registers
  } payload{address, {}};
  emulator::require_capability("stmatrix_x4", 9);
  emulator::Thread& thread = emulator::current_thread();
  emulator::shared_bytes(*thread.block, address, 16, 16, "stmatrix_x4");
  emulator::check_no_mbarrier(*thread.block, address, 16, "stmatrix_x4");
  emulator::warp_collective("stmatrix_x4", ~0u, payload, [](auto& lanes) {
    for (int lane = 0; lane < 32; lane++)
      for (int matrix = 0; matrix < 4; matrix++) lanes[lane]->rows[matrix] = lanes[8 * matrix + lane / 4]->address;
  });
  const uint32_t registers[4] = {r0, r1, r2, r3};
  for (int matrix = 0; matrix < 4; matrix++) {
    const uint32_t at = payload.rows[matrix] + thread.lane % 4 * 4;
    memcpy(emulator::shared_bytes(*thread.block, at, 4, 4, "stmatrix_x4"), &registers[matrix], 4);
    emulator::note_store(thread, at, 4);
  }
}

}  // namespace fastscore::ptx
