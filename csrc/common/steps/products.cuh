// How a warpgroup of a chain multiplies: weights are tiles of 64 inputs and all outputs, in stages, in the order in which
// a row's evaluation reads them (fastscore/ops/weight_image.py).
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/ring.cuh>
#include <ptx/cluster.cuh>
#include <ptx/wgmma.cuh>

namespace fastscore {

// 64 inputs, or fewer where the data have fewer: 16 an instruction, and each 16 inputs are two units of a descriptor's
// 16 bytes further.
template <int Outputs, int Offset, int K, int M>
__device__ __forceinline__ void multiply_tile(float (&out)[M], const uint32_t (&a)[K / 4], uint64_t tile, int k) {
  constexpr int kSteps = K < 64 ? K / 16 : 4;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const uint32_t* const operand = a + 16 * k + 4 * i;
    ptx::wgmma<Outputs, Offset>(out, operand[0], operand[1], operand[2], operand[3], tile + 2 * i, k + i > 0);
  }
}

// How the tiles of N outputs x 64 inputs of a product with K inputs lie in stages: as many in one as it holds.
template <uint32_t StageBytes, int N, int K>
struct Tiles {
  static constexpr uint32_t kBytes = 128 * N;
  static constexpr int kCount = (K + 63) / 64, kEach = StageBytes / kBytes, kStages = (kCount + kEach - 1) / kEach;
  static_assert(StageBytes % 1024 == 0 && kEach > 0, "tiles start where the swizzle does");
};

// Arrive at the barrier `empty` of every block of the cluster, a lane at each.
__device__ __forceinline__ void release_stage(uint32_t empty) {
  const uint32_t lane = threadIdx.x % 32;
  if (lane < ptx::cluster_size()) ptx::mbarrier_arrive_remote(empty, lane);
}

// All weights lie in shared memory: a product waits for nothing but itself, and the next tile's address is a sum.
template <uint32_t StageBytes>
struct ResidentProduct {
  uint64_t begin;  // the first tile's descriptor
  uint64_t at;

  __device__ __forceinline__ ResidentProduct(const Steps&, const Barriers& barriers, uint32_t weights)
      : begin(ptx::wgmma_descriptor(weights)), at(begin) {
    ptx::mbarrier_wait(barriers.full(0), 0);
  }

  __device__ __forceinline__ void restart() { at = begin; }

  template <int N, int K>
  __device__ __forceinline__ void multiply(float (&out)[N / 2], const uint32_t (&a)[K / 4]) {
    using Here = Tiles<StageBytes, N, K>;
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < Here::kCount; ++k) multiply_tile<N, 0, K>(out, a, at + k * (Here::kBytes >> 4), k);
    ptx::wgmma_commit();
    at += Here::kStages * (StageBytes >> 4);
    ptx::wgmma_wait<0>();
    ptx::wgmma_hold(out);
  }
};

// Weights pass through a ring of stages, or, where they may, stay in as many as there are: then no stage is released, and
// none waited for twice. A warpgroup that multiplies by a stage holds the one before until that product is done.
template <uint32_t StageBytes, bool MayStay>
struct RingProduct {
  const Steps& p;
  // Of the present stage: its full barrier and its descriptor, which move on together; the parity of the turn.
  uint32_t full, first_full;
  uint64_t tiles, first_tiles;
  uint32_t phase = 0;

  __device__ __forceinline__ RingProduct(const Steps& p, const Barriers& barriers, uint32_t weights)
      : p(p), full(barriers.full(0)), first_full(full), tiles(ptx::wgmma_descriptor(weights)), first_tiles(tiles) {}

  __device__ __forceinline__ void restart() {}  // a row ends where the next begins

  template <int N, int K>
  __device__ __forceinline__ void multiply(float (&out)[N / 2], const uint32_t (&a)[K / 4]) {
    using Here = Tiles<StageBytes, N, K>;
    uint32_t before = 0;
#pragma unroll
    for (int stage = 0; stage < Here::kStages; ++stage) {
      ptx::mbarrier_wait(full, phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int k = stage * Here::kEach; k < Here::kCount && k < (stage + 1) * Here::kEach; ++k) {
        multiply_tile<N, 0, K>(out, a, tiles + (k - stage * Here::kEach) * (Here::kBytes >> 4), k);
      }
      ptx::wgmma_commit();
      if (stage > 0) {
        ptx::wgmma_wait<1>();
        release(before);
      }
      before = full;
      advance();
    }
    ptx::wgmma_wait<0>();
    release(before);
    ptx::wgmma_hold(out);
  }

  __device__ __forceinline__ bool stay() const { return MayStay && p.stages >= p.tiles; }

  __device__ __forceinline__ void advance() {
    full += 8, tiles += StageBytes >> 4;
    if (full != first_full + 8 * p.stages) return;
    full = first_full, tiles = first_tiles;
    phase ^= !stay();
  }

  // Say that this warp reads a stage no more, to every block that copies into it: a lane tells one of them.
  __device__ __forceinline__ void release(uint32_t stage) const {
    if (!stay()) release_stage(stage + 8 * p.stages);
  }
};

}  // namespace fastscore
