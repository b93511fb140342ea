// Math only, width 256: the products of the kernel of steps (csrc/common/steps/halves.cuh) on a ring that is full from the
// beginning, so that no wait lasts. Operands in registers, 128 outputs an instruction, eight stages of 16 KB: one product.
//
//   without an epilogue   h = x W^T, again and again
//   with one              h = act(scale (a W^T) + bias), a = h rounded to bfloat16, where act(u) = u + u tanh u = silu(2 u)
//
// The epilogue follows the halves as it does there; waits and releases of stages are all there too, and cost what they do.
#include <cuda_runtime.h>
#include <steps.h>

#include <common/ring.cuh>
#include <common/steps/halves.cuh>
#include <ptx/registers.cuh>

#include "launch.cuh"
#include "span.cuh"

namespace fastscore {

struct Products256 {
  static constexpr int kConsumers = 2, kStages = 8;
  static constexpr uint32_t kStageBytes = 128 * 128, kBiasAt = kStages * kStageBytes, kBarriersAt = kBiasAt + 1024;

  const uint8_t* weights;  // (256, 256): an image by outputs (fastscore/ops/weight_image.py)
  const float* x;          // (128, 256)
  const float* bias;       // (256)
  float* h;                // out, (blocks, 128, 256)
  Span* spans;
  float scale;
  int32_t rounds;
};

template <bool Epilogue>
__device__ __forceinline__ void multiply_rounds(const Products256& m, HalvesProduct& product, uint32_t shared,
                                                float (&h)[128], uint32_t (&a)[64], int column) {
  const Record bias{shared + Products256::kBiasAt, static_cast<uint32_t>(4 * column)};
#pragma unroll 1
  for (int round = 0; round < m.rounds; ++round) {
    product.phase = 0;  // the same eight stages, whose first phase is over
    if (!Epilogue) {
      product.template by_halves<256>(h, a, [](int) {});
      continue;
    }
    product.template by_halves<256>(h, a, [&](int q) {
      const float4 b = bias.vector(0, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float &u = h[element(q, 0, i)], &v = h[element(q, 1, i)];
        u = fmaf(u, m.scale, component(b, i)), v = fmaf(v, m.scale, component(b, i));
        u = fmaf(u, ptx::tanh_approx(u), u), v = fmaf(v, ptx::tanh_approx(v), v);
      }
      pace(q);
    });
    to_operand(a, h);
  }
}

template <bool Epilogue>
__global__ void __launch_bounds__(128 * (Products256::kConsumers + 1), 1)
    products_256_kernel(const __grid_constant__ Steps p, const __grid_constant__ Products256 m) {
#if FASTSCORE_HAS_WGMMA
  using M = Products256;
  const uint32_t shared = ptx::shared_address(ptx::shared_memory());
  const Barriers barriers{shared + M::kBarriersAt, M::kStages, 0};
  if (threadIdx.x == 0) barriers.initialize(4 * M::kConsumers, 0);
  if (threadIdx.x < 256) ptx::store_shared(shared + M::kBiasAt + 4 * threadIdx.x, m.bias[threadIdx.x]);
  ptx::cluster_sync();
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32, column = 4 * (lane % 4);
  if (group == M::kConsumers) {
    ptx::registers_decrease<24>();
    for (int stage = 0; thread == 0 && stage < M::kStages; ++stage) {
      ptx::mbarrier_expect(barriers.full(stage), M::kStageBytes);
      ptx::bulk_copy(shared + stage * M::kStageBytes, m.weights + stage * M::kStageBytes, M::kStageBytes,
                     barriers.full(stage));
    }
  } else {
    ptx::registers_increase<240>();
    const int sample = 64 * group + 16 * (thread / 32) + lane / 4;
    float h[128];
#pragma unroll
    for (int q = 0; q < 16; ++q) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        set(h, q, i, __ldg(reinterpret_cast<const float4*>(m.x + 256 * (sample + 8 * i) + 16 * q + column)));
      }
    }
    uint32_t a[64];
    to_operand(a, h);
    HalvesProduct product(p, barriers, shared);
    for (int stage = 0; stage < M::kStages; ++stage) ptx::mbarrier_wait(barriers.full(stage), 0);
    const Span start = now();
    multiply_rounds<Epilogue>(m, product, shared, h, a, column);
    if (threadIdx.x == 0) write_since(start, m.spans + blockIdx.x);
#pragma unroll
    for (int q = 0; q < 16; ++q) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int line = 128 * blockIdx.x + sample + 8 * i;
        *reinterpret_cast<float4*>(m.h + static_cast<size_t>(256) * line + 16 * q + column) = get(h, q, i);
      }
    }
  }
#endif
}

}  // namespace fastscore

// pointers: weights, x, bias, h, spans. `blocks` in all, or 0: as many as run at once, which it is set to.
extern "C" const char* micro_products_256(const uint64_t* pointers, float scale, int rounds, int epilogue,
                                          int32_t* blocks, uint64_t stream) {
  using namespace fastscore;
  return guarded([&] {
    const Products256 m = {pointer<const uint8_t>(pointers[0]),
                           pointer<const float>(pointers[1]),
                           pointer<const float>(pointers[2]),
                           pointer<float>(pointers[3]),
                           pointer<Span>(pointers[4]),
                           scale,
                           rounds};
    Steps p = {};
    p.stages = Products256::kStages;
    Plan plan = {};
    plan.wgmma = true, plan.cluster = 1, plan.threads = 128 * (Products256::kConsumers + 1);
    plan.shared_bytes = Products256::kBarriersAt + 16 * Products256::kStages;
    const auto kernel = epilogue ? products_256_kernel<true> : products_256_kernel<false>;
    *blocks = launch_micro("products of 256", kernel, plan, *blocks, pointer<CUstream_st>(stream), p, m);
  });
}
