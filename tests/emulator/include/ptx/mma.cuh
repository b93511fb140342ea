// Tensor cores of a single warp: the lanes meet, and the last one computes for all.
#pragma once
#include <cuda_runtime.h>

#include "emulator/floats.h"
#include "emulator/memory.h"

namespace fastscore::ptx {

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  struct {
    uint32_t address, *out;
  } payload{address, r};
  emulator::Block& block = *emulator::current_thread().block;
  emulator::shared_bytes(block, address, 16, 16, "ldmatrix_x4");
  emulator::warp_collective("ldmatrix_x4", ~0u, payload, [&](auto& lanes) {
    for (int lane = 0; lane < 32; lane++)
      for (int matrix = 0; matrix < 4; matrix++) {
        uint32_t row = lanes[8 * matrix + lane / 4]->address;
        memcpy(&lanes[lane]->out[matrix], emulator::shared_bytes(block, row, 16, 16, "ldmatrix_x4") + lane % 4 * 4, 4);
      }
  });
}

// Lane l holds of a the rows l / 4 (a[0], a[2]) and l / 4 + 8 (a[1], a[3]), columns 2 (l % 4) and + 8 (a[2], a[3]); of
// b the column l / 4 and rows 2 (l % 4) and + 8 (b1); of d the rows of a and columns 2 (l % 4).
inline void mma_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1) {
  struct {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
  } payload{d, a, {b0, b1}};
  emulator::warp_collective("mma_m16n8k16", ~0u, payload, [](auto& lanes) {
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; lane++) {
      int row = lane / 4, column = 2 * (lane % 4);
      for (int i = 0; i < 4; i++)
        for (int half = 0; half < 2; half++)
          left[row + 8 * (i % 2)][column + 8 * (i / 2) + half] = emulator::from_bf16(lanes[lane]->a[i] >> 16 * half);
      for (int i = 0; i < 2; i++)
        for (int half = 0; half < 2; half++)
          right[column + 8 * i + half][row] = emulator::from_bf16(lanes[lane]->b[i] >> 16 * half);
    }
    float sums[16][8] = {};
    for (int m = 0; m < 16; m++)
      for (int k = 0; k < 16; k++)
        for (int n = 0; n < 8; n++) sums[m][n] += left[m][k] * right[k][n];
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) lanes[lane]->d[i] += sums[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  });
}

}  // namespace fastscore::ptx
