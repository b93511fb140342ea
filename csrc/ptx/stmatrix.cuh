// Storing matrices of 16-bit values from the registers of a warp, as products leave them (sm_90).
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace fastscore::ptx {

// Stores four 8x8 matrices of 16-bit values; lane 8 i + j gives the address of row j of matrix i, and lane l holds of
// every matrix row l / 4, columns 2 (l % 4) and the next.
__device__ __forceinline__ void stmatrix_x4(uint32_t address, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(r0), "r"(r1),
               "r"(r2), "r"(r3)
               : "memory");
}

}  // namespace fastscore::ptx
