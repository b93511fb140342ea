// The weights of width 1,024: as rings.cuh has them, in stages of half the size, of which a warpgroup has four as well.
//
// A stage is 256 outputs x 16 inputs (32-byte swizzle), a turn of the ring 64 inputs, which are a block of the operand. A
// block reads its own half of the operand first, in whose memory it lies first, and the partner's half behind it. Every
// product takes whole turns: stage and parity of a wait are constants of a turn.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/ring.cuh>
#include <common/steps/record.cuh>
#include <common/steps/units.cuh>
#include <ptx/wgmma.cuh>

namespace fastscore {

// Place in a cluster of two blocks, or of four: those of ranks 0, 1 and of 2, 3 divide the outputs between them, and
// those of ranks 0, 2 and of 1, 3 share weights.
struct Seat {
  __device__ __forceinline__ static uint32_t half() { return ptx::cluster_rank() % 2; }  // of the outputs
  __device__ __forceinline__ static uint32_t partner() { return ptx::cluster_rank() ^ 1; }
  __device__ __forceinline__ static uint32_t sharers() { return ptx::cluster_size() / 2; }
  __device__ __forceinline__ static uint32_t pair() { return ptx::cluster_rank() / 2; }
};

struct PairRings {
  static constexpr int kStages = 4, kWarpgroups = 2;         // of a ring; rings
  static constexpr uint32_t kStageBytes = 256 * 16 * 2;      // 256 outputs x 16 inputs
  static constexpr int kFirst = 1, kHidden = 16, kLast = 1;  // turns of a product
  static constexpr uint32_t kBlock = 64 * 128 >> 4;          // 64 columns of the operand, in a descriptor's units

  uint32_t full, empty;  // barriers of the warpgroup's first stage
  uint32_t a, begin;  // lower halves of the descriptors of the operand and of that stage: the upper ones are constants
  uint32_t phase = 0;

  __device__ __forceinline__ PairRings(const Barriers& barriers, uint32_t operand, uint32_t weights, int group)
      : full(barriers.full(group * kStages)),
        empty(barriers.empty(group * kStages)),
        a(static_cast<uint32_t>(ptx::wgmma_descriptor(operand))),
        begin(static_cast<uint32_t>(ptx::wgmma_descriptor_32(weights + group * kStages * kStageBytes))) {}

  // out = A W^T of 256 outputs and 64 inputs a turn; call receive() before the second half of them.
  template <int Turns, class Receive>
  __device__ __forceinline__ void multiply(float (&out)[128], Receive&& receive) {
    uint32_t block = a;
#pragma unroll 1
    for (int turn = 0; turn < Turns; ++turn, block += kBlock) {
      if (Turns > 1 && turn == Turns / 2) receive();
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        ptx::mbarrier_wait(full + 8 * stage, phase);
        ptx::wgmma_fence();
        const uint32_t weights = begin + stage * (kStageBytes >> 4);
        ptx::wgmma<256>(out, of_operand(block + 2 * stage), of_weights(weights), turn + stage > 0);
        ptx::wgmma_commit();
        if (turn + stage > 0) {
          ptx::wgmma_wait<1>();
          release((stage + kStages - 1) % kStages);
        }
      }
      phase ^= 1;
    }
    finish(out);
  }

  // The same of N outputs and 1,024 inputs in one turn: a stage has tiles of 16 inputs for 256 of them.
  template <int N, class Receive>
  __device__ __forceinline__ void multiply_few(float (&out)[N / 2], Receive&& receive) {
    constexpr int kTileBytes = 32 * N, kTiles = kStageBytes / kTileBytes;
    static_assert(kStages * kTiles * 16 == 1024);
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      if (stage == kStages / 2) receive();
      ptx::mbarrier_wait(full + 8 * stage, phase);
      ptx::wgmma_fence();
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const int k = stage * kTiles + tile;
        const uint32_t weights = begin + stage * (kStageBytes >> 4) + tile * (kTileBytes >> 4);
        ptx::wgmma<N>(out, of_operand(a + k / 4 * kBlock + 2 * (k % 4)), of_weights(weights), k > 0);
      }
      ptx::wgmma_commit();
      if (stage > 0) {
        ptx::wgmma_wait<1>();
        release(stage - 1);
      }
    }
    phase ^= 1;
    finish(out);
  }

 private:
  __device__ __forceinline__ static uint64_t of_operand(uint32_t low) {
    return (ptx::wgmma_descriptor(0) & ~uint64_t{0xffffffff}) | low;
  }
  __device__ __forceinline__ static uint64_t of_weights(uint32_t low) {
    return (ptx::wgmma_descriptor_32(0) & ~uint64_t{0xffffffff}) | low;
  }

  template <int M>
  __device__ __forceinline__ void finish(float (&out)[M]) const {
    ptx::wgmma_wait<0>();
    release(kStages - 1);
    ptx::wgmma_hold(out);
  }

  // Say that this warp reads a stage no more, to every block that copies into it: a lane tells one of them.
  __device__ __forceinline__ void release(int stage) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < Seat::sharers()) ptx::mbarrier_arrive_remote(empty + 8 * stage, 2 * lane + Seat::half());
  }
};

// The producer thread of a ring: blocks that share weights copy a part of every stage each, into all of them.
__device__ __forceinline__ void produce_ring(const Steps& p, const Barriers& barriers, uint32_t shared, Unit unit,
                                             int group) {
  const uint32_t blocks = Seat::sharers(), share = PairRings::kStageBytes / blocks, own = Seat::pair() * share;
  const auto mask = static_cast<uint16_t>((blocks == 1 ? 1u : 5u) << Seat::half());
  const uint8_t* weights = p.weights + static_cast<size_t>(Seat::half()) * p.tiles * PairRings::kStageBytes + own;
  Position at;
  for (; unit.left > 0; unit.advance(p)) {
    for (int tile = group; tile < p.tiles; tile += PairRings::kWarpgroups) {
      const int stage = group * PairRings::kStages + at.stage;
      const uint32_t full = barriers.full(stage), target = shared + stage * PairRings::kStageBytes + own;
      const uint8_t* source = weights + static_cast<size_t>(tile) * PairRings::kStageBytes;
      ptx::mbarrier_wait(barriers.empty(stage), at.phase ^ 1);
      ptx::mbarrier_expect(full, PairRings::kStageBytes);
      if (blocks == 1) {
        ptx::bulk_copy(target, source, share, full);
      } else {
        ptx::bulk_copy_multicast(target, source, share, full, mask);
      }
      at.advance(PairRings::kStages);
    }
  }
}

}  // namespace fastscore
