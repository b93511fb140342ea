// The weights of width 512: a ring of four stages for each of the two warpgroups, which has half of the outputs.
//
// A stage has tiles of 32 inputs (64-byte swizzle). The first and the last product fill two stages each and all others
// sixteen, so every product starts at a stage that is known when compiled: 0 the first, 2 all others. Stage and parity are
// constants of the unrolled loop, and a warpgroup waits for, and releases, nothing but its own tiles.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/ring.cuh>
#include <common/steps/products.cuh>
#include <ptx/wgmma.cuh>

namespace fastscore {

struct Rings {
  static constexpr int kStages = 4, kWarpgroups = 2;         // of a ring; rings
  static constexpr uint32_t kStageBytes = 256 * 32 * 2;      // 256 outputs x 32 inputs
  static constexpr int kFirst = 2, kHidden = 16, kLast = 2;  // stages of a product
  static_assert((kFirst + kLast) % kStages == 0 && kHidden % kStages == 0, "a row ends where the next begins");

  uint32_t full, empty;  // barriers of the warpgroup's first stage
  uint64_t a, begin;     // descriptors of the operand and of that stage
  uint32_t phase = 0;

  __device__ __forceinline__ Rings(const Barriers& barriers, uint32_t operand, uint32_t weights, int group)
      : full(barriers.full(group * kStages)),
        empty(barriers.empty(group * kStages)),
        a(ptx::wgmma_descriptor(operand)),
        begin(ptx::wgmma_descriptor_64(weights + group * kStages * kStageBytes)) {}

  // out = A W^T of the warpgroup's N outputs, whose tiles fill `Stages` stages from number `From` of its ring on.
  template <int N, int From, int Stages>
  __device__ __forceinline__ void multiply(float (&out)[N / 2]) {
    constexpr int kTileBytes = 64 * N, kTiles = kStageBytes / kTileBytes;
#pragma unroll
    for (int j = 0; j < Stages; ++j) {
      const int at = From + j, stage = at % kStages;
      ptx::mbarrier_wait(full + 8 * stage, phase ^ (at / kStages % 2));
      ptx::wgmma_fence();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int k = j * kTiles + tile;  // of 32 inputs: half a line of the operand's blocks of 64
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t inputs = k / 2 * 8192 + k % 2 * 64 + 32 * i;
          const uint32_t outputs = stage * kStageBytes + tile * kTileBytes + 32 * i;
          ptx::wgmma<N>(out, a + (inputs >> 4), begin + (outputs >> 4), k + i > 0);
        }
      }
      ptx::wgmma_commit();
      if (j > 0) {
        ptx::wgmma_wait<1>();
        release_stage(empty + 8 * ((at - 1) % kStages));
      }
    }
    ptx::wgmma_wait<0>();
    release_stage(empty + 8 * ((From + Stages - 1) % kStages));
    ptx::wgmma_hold(out);
    if ((From + Stages) / kStages % 2 == 1) phase ^= 1;  // so many turns further
  }
};

}  // namespace fastscore
