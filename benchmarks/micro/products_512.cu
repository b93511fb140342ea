// Math only, width 512: 64 samples, two warpgroups with 256 outputs each, both operands in shared memory, 256 outputs an
// instruction. The weights lie there from the beginning; 128 KB hold a quarter of a product's, so their 128 inputs take
// the place of all 512.
//
//   without an epilogue   h = A [W W W W]^T, again and again
//   with one              h = act(scale (A [W W W W]^T) + bias), A = h rounded to bfloat16, act(u) = u + u tanh u
//
// The epilogue writes A between two barriers of both warpgroups, as the kernels of width 512 do. There is no ring: what its
// waits and releases cost is not in here.
#include <cuda_runtime.h>
#include <density_mlp.h>

#include <common/fragment.cuh>
#include <ptx/bulk_copy.cuh>
#include <ptx/cluster.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/shared.cuh>
#include <ptx/wgmma.cuh>

#include "launch.cuh"
#include "span.cuh"

namespace fastscore {

struct Products512 {
  static constexpr int kGroups = 2, kThreads = 128 * kGroups;
  static constexpr uint32_t kBlockBytes = 64 * 128;         // 64 samples x 64 columns of A
  static constexpr uint32_t kTileBytes = 256 * 128;         // 256 outputs x 64 inputs
  static constexpr uint32_t kWeightBytes = 4 * kTileBytes;  // two of them a warpgroup
  static constexpr uint32_t kOperandAt = kWeightBytes, kBiasAt = kOperandAt + 8 * kBlockBytes;
  static constexpr uint32_t kBarrierAt = kBiasAt + 4 * 512;

  const uint8_t* weights;  // (512, 128): an image (fastscore/ops/weight_image.py)
  const float* x;          // (64, 512)
  const float* bias;       // (512)
  float* h;                // out, (blocks, 64, 512)
  Span* spans;
  float scale;
  int32_t rounds;
};

// Write a warpgroup's 256 columns, positions of the register layout, into A with the 128-byte swizzle.
__device__ __forceinline__ void publish(const float (&h)[128], uint32_t operand, int group, int thread) {
  const int row = thread % 32 / 4;
  const uint32_t line =
      operand + 4 * group * Products512::kBlockBytes + 128 * (16 * (thread / 32) + row) + 4 * (thread % 4);
#pragma unroll
  for (int q = 0; q < 16; ++q) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t at = line + q / 4 * Products512::kBlockBytes + 16 * ((2 * (q % 4) + half) ^ row);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // the thread's two rows, eight apart
        const int j = 8 * q + 4 * half + 2 * i;
        ptx::store_shared(at + 1024 * i, ptx::pack_bf16(h[j], h[j + 1]));
      }
    }
  }
  ptx::fence_proxy_async();
  ptx::named_barrier_sync(1, Products512::kThreads);
}

// h = A [W W W W]^T, a warpgroup's columns; one group of 64 inputs is in flight while the next is issued.
__device__ __forceinline__ void multiply_wide(float (&h)[128], uint64_t operand, uint64_t tiles) {
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      ptx::wgmma<256>(h, operand + k * (Products512::kBlockBytes >> 4) + 2 * i,
                      tiles + k % 2 * (2 * Products512::kTileBytes >> 4) + 2 * i, k + i > 0);
    }
    ptx::wgmma_commit();
    if (k > 0) ptx::wgmma_wait<1>();
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(h);
}

template <bool Epilogue>
__global__ void __launch_bounds__(Products512::kThreads, 1) products_512_kernel(const __grid_constant__ Products512 m) {
#if FASTSCORE_HAS_WGMMA
  using M = Products512;
  const uint32_t shared = ptx::shared_address(ptx::shared_memory()), barrier = shared + M::kBarrierAt;
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(barrier, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_expect(barrier, M::kWeightBytes);
    ptx::bulk_copy(shared, m.weights, M::kWeightBytes, barrier);
  }
  for (int i = threadIdx.x; i < 512; i += M::kThreads) ptx::store_shared(shared + M::kBiasAt + 4 * i, m.bias[i]);
  __syncthreads();
  const int group = __shfl_sync(~0u, threadIdx.x / 128, 0);  // the same in all lanes, which the compiler then knows
  const int thread = threadIdx.x % 128, lane = thread % 32, column = 256 * group + 4 * (lane % 4);
  const int sample = 16 * (thread / 32) + lane / 4;
  float h[128];
#pragma unroll
  for (int q = 0; q < 16; ++q) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 v = __ldg(reinterpret_cast<const float4*>(m.x + 512 * (sample + 8 * i) + 16 * q + column));
#pragma unroll
      for (int j = 0; j < 4; ++j) h[element(q, i, j)] = component(v, j);
    }
  }
  publish(h, shared + M::kOperandAt, group, thread);
  ptx::mbarrier_wait(barrier, 0);
  const uint64_t operand = ptx::wgmma_descriptor(shared + M::kOperandAt);
  const uint64_t tiles = ptx::wgmma_descriptor(shared + group * M::kTileBytes);
  const Span start = now();
#pragma unroll 1
  for (int round = 0; round < m.rounds; ++round) {
    multiply_wide(h, operand, tiles);
    if constexpr (Epilogue) {
#pragma unroll
      for (int q = 0; q < 16; ++q) {
        const float4 b = ptx::load_shared<float4>(shared + M::kBiasAt + 4 * (column + 16 * q));
        update(h, q, b, b, [&](float z, float w) {
          const float u = fmaf(z, m.scale, w);
          return fmaf(u, ptx::tanh_approx(u), u);
        });
      }
      ptx::named_barrier_sync(1, M::kThreads);  // both have read A
      publish(h, shared + M::kOperandAt, group, thread);
    }
  }
  if (threadIdx.x == 0) write_since(start, m.spans + blockIdx.x);
#pragma unroll
  for (int q = 0; q < 16; ++q) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int line = 64 * blockIdx.x + sample + 8 * i;
      *reinterpret_cast<float4*>(m.h + static_cast<size_t>(512) * line + 16 * q + column) = get(h, q, i);
    }
  }
#endif
}

}  // namespace fastscore

// pointers: weights, x, bias, h, spans. `blocks` in all, or 0: as many as run at once, which it is set to.
extern "C" const char* micro_products_512(const uint64_t* pointers, float scale, int rounds, int epilogue,
                                          int32_t* blocks, uint64_t stream) {
  using namespace fastscore;
  return guarded([&] {
    const Products512 m = {pointer<const uint8_t>(pointers[0]),
                           pointer<const float>(pointers[1]),
                           pointer<const float>(pointers[2]),
                           pointer<float>(pointers[3]),
                           pointer<Span>(pointers[4]),
                           scale,
                           rounds};
    Plan plan = {};
    plan.wgmma = true, plan.cluster = 1, plan.threads = Products512::kThreads;
    plan.shared_bytes = Products512::kBarrierAt + 8;
    const auto kernel = epilogue ? products_512_kernel<true> : products_512_kernel<false>;
    *blocks = launch_micro("products of 512", kernel, plan, *blocks, pointer<CUstream_st>(stream), m);
  });
}
