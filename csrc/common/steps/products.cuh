// How a warpgroup of a chain multiplies: weights are tiles of 64 inputs and as many outputs as h has columns, in the
// order in which a row's evaluation reads them (fastscore/ops/weight_image.py).
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <ptx/wgmma.cuh>

namespace fastscore {

// 64 inputs, or fewer where the data have fewer: 16 an instruction, and each 16 inputs are two units of a descriptor's
// 16 bytes further. `first` products overwrite `out`.
template <int Outputs, int Offset, int K, int M>
__device__ __forceinline__ void multiply_tile(float (&out)[M], const uint32_t (&a)[K / 4], uint64_t tile, int k) {
  constexpr int kSteps = K < 64 ? K / 16 : 4;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const uint32_t* const operand = a + 16 * k + 4 * i;
    ptx::wgmma<Outputs, Offset>(out, operand[0], operand[1], operand[2], operand[3], tile + 2 * i, k + i > 0);
  }
}

// All weights lie in shared memory: a product waits for nothing but itself, and the next tile's address is a sum.
template <uint32_t StageBytes>
struct ResidentProduct {
  uint64_t begin;  // the first tile's descriptor
  uint64_t at;

  static constexpr uint64_t kStage = StageBytes >> 4;
  static_assert(StageBytes % 1024 == 0, "tiles start where the swizzle does");

  __device__ __forceinline__ explicit ResidentProduct(uint32_t weights)
      : begin(ptx::wgmma_descriptor(weights)), at(begin) {}

  __device__ __forceinline__ void restart() { at = begin; }

  template <int N, int K>
  __device__ __forceinline__ void multiply(float (&out)[N / 2], const uint32_t (&a)[K / 4]) {
    constexpr int kBlocks = (K + 63) / 64;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) multiply_tile<N, 0, K>(out, a, at + k * kStage, k);
    ptx::wgmma_commit();
    at += kBlocks * kStage;
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(out);
  }
};

}  // namespace fastscore
