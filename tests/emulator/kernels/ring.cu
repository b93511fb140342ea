// Tiles of floats stream through a ring of shared memory from a producer to a warpgroup that adds them up:
// out[cta][t] = sum over i of tiles[i][t]. In a cluster every CTA loads its share of a tile for all of them.
#include <ptx/bulk_copy.cuh>
#include <ptx/cluster.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/registers.cuh>
#include <ptx/shared.cuh>

#include "launch.cuh"

namespace ptx = fastscore::ptx;

enum Mistake {
  kNone,
  kNoFullWait,
  kNoEmptyWait,
  kNoRelease,
  kOverArrive,
  kOutOfBounds,
  kMisalignedLoad,
  kMisalignedCopy,
  kCopyOverBarrier,
  kNoInit,
  kThreeWarps,
  kNoFinalSync,
  kNoFirstSync
};

constexpr int kStages = 3, kWidth = 128;
constexpr uint32_t kTileBytes = kWidth * 4;

template <int CLUSTER>
__global__ __launch_bounds__(256, 1) void ring_kernel(const float* tiles, int count, float* out, int planted) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  uint32_t ring = ptx::shared_address(ptx::shared_memory()), full = ring + kStages * kTileBytes;
  uint32_t empty = full + 8 * kStages, rank = CLUSTER > 1 ? ptx::cluster_rank() : 0;
  int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; stage++) {
      ptx::mbarrier_init(full + 8 * stage, 1);
      if (!PLANTED(kNoInit)) ptx::mbarrier_init(empty + 8 * stage, 4 * CLUSTER);
    }
    ptx::mbarrier_init_fence();
  }
  if (CLUSTER > 1 && !PLANTED(kNoFirstSync)) {
    ptx::cluster_sync();
  } else {
    __syncthreads();
  }
  if (threadIdx.x < 128) {
    if (!PLANTED(kThreeWarps) || threadIdx.x >= 32) ptx::registers_decrease<24>();
    for (int i = 0; threadIdx.x == 0 && i < count; i++) {
      int stage = i % kStages, round = i / kStages;
      uint32_t share = kTileBytes / CLUSTER, destination = ring + stage * kTileBytes + rank * share;
      const float* source = tiles + i * kWidth + rank * share / 4;
      if (PLANTED(kMisalignedCopy)) source++;
      if (PLANTED(kCopyOverBarrier) && stage == kStages - 1) destination += 16;
      // The first round finds the ring empty: the phase before phase 0 counts as completed.
      if (!PLANTED(kNoEmptyWait)) ptx::mbarrier_wait(empty + 8 * stage, (round + 1) % 2);
      ptx::mbarrier_expect(full + 8 * stage, kTileBytes);
      if (PLANTED(kOverArrive)) ptx::mbarrier_arrive(full + 8 * stage);
      if constexpr (CLUSTER > 1) {
        ptx::bulk_copy_multicast(destination, source, share, full + 8 * stage, (1 << CLUSTER) - 1);
      } else {
        ptx::bulk_copy(destination, source, share, full + 8 * stage);
      }
    }
  } else {
    ptx::registers_increase<240>();
    uint32_t mine = 4 * (threadIdx.x - 128);
    if (PLANTED(kOutOfBounds)) mine += 1 << 16;
    if (PLANTED(kMisalignedLoad)) mine += 2;
    float sum = 0;
    for (int i = 0; i < count; i++) {
      int stage = i % kStages, round = i / kStages;
      if (!PLANTED(kNoFullWait)) ptx::mbarrier_wait(full + 8 * stage, round % 2);
      sum += ptx::load_shared<float>(ring + stage * kTileBytes + mine);
      __syncwarp();
      if (lane == 0 && !PLANTED(kNoRelease)) {
        for (uint32_t other = 0; other < CLUSTER; other++) {
          if constexpr (CLUSTER > 1) {
            ptx::mbarrier_arrive_remote(empty + 8 * stage, other);
          } else {
            ptx::mbarrier_arrive(empty + 8 * stage);
          }
        }
      }
    }
    out[blockIdx.x * kWidth + threadIdx.x - 128] = sum;
  }
  // No CTA ends while another may still arrive at its barriers.
  if (CLUSTER > 1 && !PLANTED(kNoFinalSync)) ptx::cluster_sync();
#endif
}

extern "C" int run_ring(int cluster, const float* tiles, int count, float* out, int blocks, int planted) {
  size_t bytes = kStages * (kTileBytes + 16);
  if (cluster == 2) return launch(ring_kernel<2>, blocks, 256, 2, bytes, tiles, count, out, planted);
  return launch(ring_kernel<1>, blocks, 256, 1, bytes, tiles, count, out, planted);
}
