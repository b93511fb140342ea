// Hopper, widths 64, 128 and 256: a warpgroup keeps 64 samples in registers from x_t to the prediction.
//
//   warpgroups 0..: consumers    eps -> x_t -> A operand --wgmma--> h -> row machine -> A operand --wgmma--> ... -> f
//   last warpgroup: producer     device memory --bulk copies--> weight stages, a row's vectors
//
// The accumulator of a product has the layout of the next one's A operand (common/fragment.cuh), so activations never
// leave the registers of their thread, and the only barriers are those of the ring. Consumers drift apart: while one
// multiplies, another runs the row machine. Weights stay in shared memory where they fit and pass through a ring where
// they do not, in clusters that share what they load (common/ring.cuh).
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

// What a width decides.
template <int H>
struct Chain {
  static constexpr int kConsumers = H == 64 ? 3 : 2;  // warpgroups
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kRegisters = kConsumers == 3 ? 160 : 240;  // a consumer's; the producer has 24
  // h takes H / 2 registers and its operand H / 4: beyond 128, a saved tile and eps do not fit beside them.
  static constexpr bool kNarrow = H <= 128;
};

template <int H, int D>
struct ChainEngine {
  static constexpr int kHidden = H, kData = D, kWidth = H;
  static constexpr bool kKeepsEps = Chain<H>::kNarrow;

  Weights weights;
  uint32_t scratch;  // this thread's first 16 bytes of its warpgroup's part
  int column, data_column;

  __device__ __forceinline__ void first(float (&h)[H / 2], const uint32_t (&a)[D / 4]) { multiply<H, D>(h, a); }
  __device__ __forceinline__ void hidden(float (&h)[H / 2]) {
    uint32_t a[H / 4];
    to_operand(a, h);
    multiply<H, H>(h, a);
  }
  __device__ __forceinline__ void last(float (&F)[D / 2], const float (&h)[H / 2]) {
    uint32_t a[H / 4];
    to_operand(a, h);
    multiply<D, H>(F, a);
  }
  __device__ __forceinline__ float2 row_sum(float2 v) { return quad_sum(v); }
  __device__ __forceinline__ auto saved() const {
    if constexpr (Chain<H>::kNarrow) {
      return SavedInRegisters<H, H == 64 ? 2 : 1>();
    } else {
      return SavedInShared<H>{scratch};
    }
  }

  // out = a W^T for K inputs and N outputs, tile after tile: 64 inputs, and of them up to 128 outputs at a time.
  template <int N, int K>
  __device__ __forceinline__ void multiply(float (&out)[N / 2], const uint32_t (&a)[K / 4]) {
    constexpr int kOutputs = N < 128 ? N : 128, kParts = N / kOutputs, kBlocks = (K + 63) / 64;
    int before = 0;
#pragma unroll
    for (int k = 0; k < kBlocks; ++k) {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint32_t tile = weights.wait();
        ptx::wgmma_fence();
        step<kOutputs, K, N / 2>(out, a, tile, k, part);
        ptx::wgmma_commit();
        if (k + part > 0) {
          ptx::wgmma_wait<1>();
          weights.release(before);
        }
        before = weights.at.stage;
        weights.advance();
      }
    }
    ptx::wgmma_wait<0>();
    weights.release(before);
    ptx::wgmma_hold(out);
  }

  // Multiply 64 inputs by one tile, 16 inputs an instruction.
  template <int Outputs, int K, int M>
  __device__ __forceinline__ static void step(float (&out)[M], const uint32_t (&a)[K / 4], uint32_t tile, int k,
                                              int part) {
    constexpr int kSteps = K < 64 ? K / 16 : 4;
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const uint32_t* const operand = a + 16 * k + 4 * i;
      const uint64_t b = ptx::wgmma_descriptor(tile + 32 * i);
      const bool more = k + i > 0;
      if (M == Outputs / 2 || part == 0) {
        ptx::wgmma<Outputs, 0>(out, operand[0], operand[1], operand[2], operand[3], b, more);
      } else {
        ptx::wgmma<Outputs, M - Outputs / 2>(out, operand[0], operand[1], operand[2], operand[3], b, more);
      }
    }
  }
};

template <int H, int D>
__device__ __forceinline__ void consume(const DensityMlp& p, const Barriers& barriers, uint32_t shared, int first,
                                        int end) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, warp = thread / 32, lane = thread % 32;
  const int column = 4 * (lane % 4);
  constexpr uint32_t kScratch = 256 * (Chain<H>::kNarrow ? D : H);
  const uint32_t scratch = shared + p.scratch_at + group * kScratch + 16 * thread;
  ChainEngine<H, D> engine{{p, barriers, shared, {}}, scratch, column, column};

  const int sample = (blockIdx.x * Chain<H>::kConsumers + group) * 64 + 16 * warp + lane / 4;
  consume_rows<D>(engine, p, barriers, shared, first, end, sample, true);
}

template <int H, int D>
__global__ void __launch_bounds__(Chain<H>::kThreads, 1)
    sm90_density_mlp_fwd_kernel(const __grid_constant__ DensityMlp p) {
#if FASTSCORE_HAS_WGMMA
  run_block<consume<H, D>, Chain<H>::kConsumers, Chain<H>::kRegisters>(p);
#endif
}

using Kernel = void(DensityMlp);

static Kernel* kernel_of(const Plan& plan) {
  constexpr Kernel* kKernels[3][3] = {
      {sm90_density_mlp_fwd_kernel<64, 16>, sm90_density_mlp_fwd_kernel<64, 64>, sm90_density_mlp_fwd_kernel<64, 128>},
      {sm90_density_mlp_fwd_kernel<128, 16>, sm90_density_mlp_fwd_kernel<128, 64>,
       sm90_density_mlp_fwd_kernel<128, 128>},
      {sm90_density_mlp_fwd_kernel<256, 16>, sm90_density_mlp_fwd_kernel<256, 64>,
       sm90_density_mlp_fwd_kernel<256, 128>}};
  return kKernels[plan.hidden / 128][plan.data / 64];
}

void sm90_density_mlp(const DensityMlp& p, const Plan& plan, int tiles, int splits, cudaStream_t stream) {
  launch("sm90_density_mlp", kernel_of(plan), p, plan, tiles, splits, stream);
}

int sm90_density_mlp_clusters(const Plan& plan) { return active_clusters("sm90_density_mlp", kernel_of(plan), plan); }

}  // namespace fastscore
