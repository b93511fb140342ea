// Math only, width 512: 64 samples, two warpgroups with 256 outputs each, both operands in shared memory, 256 outputs an
// instruction, as in the kernel of steps (csrc/common/steps/wide.cuh and rings.cuh). The weights lie there from the
// beginning; eight stages of 16 KB hold a quarter of a product's, so their 128 inputs take the place of all 512.
//
//   without an epilogue   h = A [W W W W]^T, again and again
//   with one              h = act(scale (A [W W W W]^T) + bias), A = h rounded to bfloat16, act(u) = u + u tanh u
//
// The epilogue writes A between two barriers of both warpgroups, as there. What it costs to wait for stages and to release
// them is not in here: the parities of those waits are constants, and the barriers of stages that stay have others.
#include <cuda_runtime.h>
#include <steps.h>

#include <common/steps/operands.cuh>
#include <common/steps/rings.cuh>
#include <common/steps/wide.cuh>
#include <ptx/bulk_copy.cuh>

#include "launch.cuh"
#include "span.cuh"

namespace fastscore {

struct Products512 {
  static constexpr int kStages = 4, kThreads = 256;  // stages of a warpgroup
  static constexpr uint32_t kOperandAt = 2 * kStages * Rings::kStageBytes;
  static constexpr uint32_t kBiasAt = kOperandAt + SharedOperand::kBytes, kBarrierAt = kBiasAt + 4 * 512;

  const uint8_t* weights;  // (512, 128): an image of two rings (fastscore/ops/weight_image.py)
  const float* x;          // (64, 512)
  const float* bias;       // (512)
  float* h;                // out, (blocks, 64, 512)
  Span* spans;
  float scale;
  int32_t rounds;
};

// A stage of one warpgroup, then one of the other, into the place of each.
__device__ __forceinline__ void copy_all_stages(const Products512& m, uint32_t shared, uint32_t barrier) {
  ptx::mbarrier_expect(barrier, 2 * Products512::kStages * Rings::kStageBytes);
  for (int i = 0; i < 2 * Products512::kStages; ++i) {
    const int stage = i % 2 * Products512::kStages + i / 2;
    ptx::bulk_copy(shared + stage * Rings::kStageBytes, m.weights + i * Rings::kStageBytes, Rings::kStageBytes,
                   barrier);
  }
}

// Write a warpgroup's columns, once both have read what they replace.
__device__ __forceinline__ void publish(const SharedOperand& operand, const float (&h)[128], int group) {
#pragma unroll
  for (int q = 0; q < 16; ++q) operand.store(4 * group, q, get(h, q, 0), get(h, q, 1));
  ptx::fence_proxy_async();
  ptx::named_barrier_sync(1, Products512::kThreads);
}

// As Rings::multiply: one group of 32 inputs is in flight while the next is issued.
__device__ __forceinline__ void multiply_wide(float (&h)[128], uint64_t a, uint64_t begin) {
#pragma unroll
  for (int k = 0; k < Rings::kHidden; ++k) {
    ptx::wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t inputs = k / 2 * SharedOperand::kBlockBytes + k % 2 * 64 + 32 * i;
      const uint32_t outputs = k % Products512::kStages * Rings::kStageBytes + 32 * i;
      ptx::wgmma<256>(h, a + (inputs >> 4), begin + (outputs >> 4), k + i > 0);
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
    copy_all_stages(m, shared, barrier);
  }
  for (int i = threadIdx.x; i < 512; i += M::kThreads) ptx::store_shared(shared + M::kBiasAt + 4 * i, m.bias[i]);
  __syncthreads();
  // The same for all lanes, as the compiler has to know: descriptors are made of it.
  const int group = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  const int thread = threadIdx.x % 128, lane = thread % 32, column = 256 * group + 4 * (lane % 4);
  const int sample = 16 * (thread / 32) + lane / 4;
  float h[128];
#pragma unroll
  for (int q = 0; q < 16; ++q) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      set(h, q, i, __ldg(reinterpret_cast<const float4*>(m.x + 512 * (sample + 8 * i) + 16 * q + column)));
    }
  }
  const SharedOperand operand(shared + M::kOperandAt, thread);
  publish(operand, h, group);
  ptx::mbarrier_wait(barrier, 0);
  const uint64_t a = ptx::wgmma_descriptor(shared + M::kOperandAt);
  const uint64_t begin = ptx::wgmma_descriptor_64(shared + group * M::kStages * Rings::kStageBytes);
  const Record bias{shared + M::kBiasAt, static_cast<uint32_t>(4 * column)};
  const Span start = now();
#pragma unroll 1
  for (int round = 0; round < m.rounds; ++round) {
    multiply_wide(h, a, begin);
    if constexpr (Epilogue) {
#pragma unroll
      for (int q = 0; q < 16; ++q) {
        const float4 b = bias.vector(0, q);
        update(h, q, b, b, [&](float z, float w) {
          const float u = fmaf(z, m.scale, w);
          return fmaf(u, ptx::tanh_approx(u), u);
        });
      }
      ptx::named_barrier_sync(1, M::kThreads);  // both have read A
      publish(operand, h, group);
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
