// Hopper, width 512: two warpgroups share 64 samples, each with half of the columns in its registers.
//
//   warpgroups 0, 1: consumers      x_t, h --bfloat16--> A in shared memory --wgmma--> own columns of h -> row machine
//   warpgroup 2: producer           device memory --bulk copies--> weight stages, a row's vectors
//
// A product needs all columns of h, of which a warpgroup has half: so its operand A goes through shared memory, written
// by both and read by both, with a barrier before (the last product has read A) and one behind (all of it is written).
// Sums over a row's columns are exchanged the same way. Weights always stream, to clusters of two or four blocks; every stage
// holds 128 outputs of 64 inputs, four stages make the 512 outputs, and a warpgroup multiplies by its two.
//
// Where A lies, eps lies too: from the last product to x_t of the next row nobody needs A.
//
// docs/kernels.md draws where each tile lives. Source: A Score-Based Density Formula (Li and Yan, 2024),
// https://arxiv.org/abs/2408.16765
#include <common/error.h>
#include <cuda_runtime.h>
#include <density_mlp.h>

#include <common/consumer.cuh>
#include <common/launch.cuh>
#include <ptx/wgmma.cuh>

namespace fastscore {

constexpr int kWide = 512, kWideData = 128;
constexpr int kGroups = 2, kWideThreads = 128 * (kGroups + 1);
constexpr uint32_t kBlockBytes = 64 * 128;               // 64 samples x 64 columns of A
constexpr uint32_t kNoiseAt = 2 * kBlockBytes;           // in A, behind x_t
constexpr uint32_t kSavesAt = kWide / 64 * kBlockBytes;  // behind A: what of a saved tile registers do not hold
constexpr int kKept = 8;                                 // groups of 16 columns of it that they do
constexpr uint32_t kSavedBytes = 2048 * (kWide / kGroups / 16 - kKept);  // a warpgroup's
constexpr uint32_t kSumsAt = kSavesAt + kGroups * kSavedBytes;           // two buffers of a sum a group and sample

static_assert(kSumsAt + 1024 == kWideScratch);

struct WideEngine {
  static constexpr int kHidden = kWide / kGroups, kData = kWideData / kGroups, kWidth = kWide;
  static constexpr bool kKeepsEps = false;

  Weights weights;
  uint32_t operand;  // address of A
  uint32_t scratch;  // this thread's first 16 bytes of its warpgroup's part of eps
  uint32_t saves;    // and of the saved tile
  int group, thread, column, data_column;
  int buffer;  // of sums, the next to be written

  __device__ __forceinline__ void first(float (&h)[kHidden / 2], const uint32_t (&a)[kData / 4]) {
    publish(a);
    multiply<kWideData>(h);
  }
  __device__ __forceinline__ void hidden(float (&h)[kHidden / 2]) {
    synchronize();
    uint32_t a[kHidden / 4];
    to_operand(a, h);
    publish(a);
    multiply<kWide>(h);
  }
  __device__ __forceinline__ void last(float (&F)[kData / 2], const float (&h)[kHidden / 2]) {
    synchronize();
    uint32_t a[kHidden / 4];
    to_operand(a, h);
    publish(a);
    multiply_last(F);
    synchronize();  // eps takes A's place
  }
  __device__ __forceinline__ SavedAsHalf<kHidden, kKept> saved() const { return {saves}; }

  __device__ __forceinline__ void synchronize() const { ptx::named_barrier_sync(1, 128 * kGroups); }

  // Add the other warpgroup's share. A buffer is written again two sums later, past a barrier that its reader has met.
  __device__ __forceinline__ float2 row_sum(float2 v) {
    v = quad_sum(v);
    const uint32_t sums = operand + kSumsAt + 512 * buffer, row = 4 * (16 * (thread / 32) + thread % 32 / 4);
    if (thread % 4 == 0) {
      ptx::store_shared(sums + 256 * group + row, v.x);
      ptx::store_shared(sums + 256 * group + row + 32, v.y);
    }
    buffer ^= 1;
    synchronize();
    const uint32_t other = sums + 256 * (group ^ 1) + row;
    const float2 w = make_float2(ptx::load_shared<float>(other), ptx::load_shared<float>(other + 32));
    // Both add in one order, or their rows would differ.
    return group == 0 ? make_float2(v.x + w.x, v.y + w.y) : make_float2(w.x + v.x, w.y + v.y);
  }

  // Write the thread's share of an operand into A, and wait until all of A is there.
  template <int M>
  __device__ __forceinline__ void publish(const uint32_t (&a)[M]) const {
    constexpr int kBlocks = M / 16;   // of 64 columns; a warpgroup has that many
    const int row = thread % 32 / 4;  // of eight; the swizzle depends on nothing else
    const uint32_t line = operand + kBlocks * group * kBlockBytes + 128 * (16 * (thread / 32) + row) + 4 * (thread % 4);
#pragma unroll
    for (int q = 0; q < M / 4; ++q) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // positions 16 q + 8 half ..
        const uint32_t at = line + q / 4 * kBlockBytes + 16 * ((2 * (q % 4) + half) ^ row);
        ptx::store_shared(at, a[4 * q + 2 * half]);
        ptx::store_shared(at + 1024, a[4 * q + 2 * half + 1]);  // eight rows further
      }
    }
    ptx::fence_proxy_async();
    synchronize();
  }

  // h = A W^T, the warpgroup's columns: of four stages two are its own, and it releases all four.
  template <int K>
  __device__ __forceinline__ void multiply(float (&h)[kHidden / 2]) {
    int before = 0;
#pragma unroll
    for (int k = 0; k < K / 64; ++k) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const Position own = weights.ahead(2 * group + part);
        const uint32_t tile = weights.wait(own);
        ptx::wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint64_t a = ptx::wgmma_descriptor(operand + k * kBlockBytes + 32 * i);
          const uint64_t b = ptx::wgmma_descriptor(tile + 32 * i);
          if (part == 0) {
            ptx::wgmma<128, 0>(h, a, b, k + i > 0);
          } else {
            ptx::wgmma<128, 64>(h, a, b, k + i > 0);
          }
        }
        ptx::wgmma_commit();
        if (k + part > 0) {
          ptx::wgmma_wait<1>();
          weights.release(before);
        }
        before = own.stage;
      }
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const Position other = weights.ahead(2 * (group ^ 1) + part);
        weights.wait(other);
        __syncwarp();  // a lane that still looks at the barrier would miss the phase that it waits for
        weights.release(other.stage);
      }
      weights.at = weights.ahead(4);
    }
    ptx::wgmma_wait<0>();
    weights.release(before);
    ptx::wgmma_hold(h);
  }

  // F = A W^T, 64 dimensions a warpgroup: both read every stage.
  __device__ __forceinline__ void multiply_last(float (&F)[kData / 2]) {
    int before = 0;
#pragma unroll
    for (int k = 0; k < kWide / 64; ++k) {
      const uint32_t tile = weights.wait() + group * kBlockBytes;
      ptx::wgmma_fence();
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t a = ptx::wgmma_descriptor(operand + k * kBlockBytes + 32 * i);
        ptx::wgmma<64>(F, a, ptx::wgmma_descriptor(tile + 32 * i), k + i > 0);
      }
      ptx::wgmma_commit();
      if (k > 0) {
        ptx::wgmma_wait<1>();
        weights.release(before);
      }
      before = weights.at.stage;
      weights.advance();
    }
    ptx::wgmma_wait<0>();
    weights.release(before);
    ptx::wgmma_hold(F);
  }
};

__device__ __forceinline__ void consume_wide(const DensityMlp& p, const Barriers& barriers, uint32_t shared, int first,
                                             int end) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32, column = 4 * (lane % 4);
  const uint32_t operand = shared + p.scratch_at;
  WideEngine engine{{p, barriers, shared, {}}};
  engine.operand = operand;
  engine.scratch = operand + kNoiseAt + 256 * WideEngine::kData * group + 16 * thread;
  engine.saves = operand + kSavesAt + kSavedBytes * group + 16 * thread;
  engine.group = group, engine.thread = thread, engine.buffer = 0;
  engine.column = WideEngine::kHidden * group + column;
  engine.data_column = WideEngine::kData * group + column;
  const int sample = blockIdx.x * 64 + 16 * (thread / 32) + lane / 4;
  consume_rows<kWideData>(engine, p, barriers, shared, first, end, sample, group == 0);
}

__global__ void __launch_bounds__(kWideThreads, 1)
    sm90_density_mlp_wide_fwd_kernel(const __grid_constant__ DensityMlp p) {
#if FASTSCORE_HAS_WGMMA
  run_block<consume_wide, kGroups, 240>(p);
#endif
}

void sm90_density_mlp_wide(const DensityMlp& p, const Plan& plan, int tiles, int splits, cudaStream_t stream) {
  launch("sm90_density_mlp_wide", sm90_density_mlp_wide_fwd_kernel, p, plan, tiles, splits, stream);
}

int sm90_density_mlp_wide_clusters(const Plan& plan) {
  return active_clusters("sm90_density_mlp_wide", sm90_density_mlp_wide_fwd_kernel, plan);
}

}  // namespace fastscore
