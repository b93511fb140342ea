// Ampere and later, widths 64 and 128: the same chain through registers by mma.sync, from the same image of the
// weights.
//
//   four warps: 64 samples             eps -> x_t -> A operand --mma.sync--> h -> row machine -> A operand --> ... -> f
//   all warps together: cp.async       device memory -> all weights, once; a row's vectors, two rows ahead
//
// mma.sync leaves its accumulator where wgmma does (common/fragment.cuh), and ldmatrix reads the 128-byte swizzle that
// wgmma wants, so everything but the product itself is Hopper's. There is no producer: every thread copies a share.
//
// docs/kernels.md draws where each tile lives. Source: A Score-Based Density Formula (Li and Yan, 2024),
// https://arxiv.org/abs/2408.16765
#include <common/error.h>
#include <cuda_runtime.h>
#include <density_mlp.h>

#include <common/launch.cuh>
#include <common/row_machine.cuh>
#include <ptx/cp_async.cuh>
#include <ptx/mma.cuh>

namespace fastscore {

constexpr int kMmaThreads = 256;
[[maybe_unused]] constexpr int kTableStages = 3;

template <int H, int D>
struct MmaEngine {
  static constexpr int kHidden = H, kData = D, kWidth = H;
  static constexpr bool kKeepsEps = true;

  const DensityMlp& p;
  uint32_t shared;   // address of the weights
  uint32_t scratch;  // this thread's first 16 bytes of its four warps' part
  int column, data_column;
  int tile;  // of the weights, the next to be read

  __device__ __forceinline__ void first(float (&h)[H / 2], const uint32_t (&a)[D / 4]) {
    tile = 0;
    multiply<H, D>(h, a);
  }
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
  __device__ __forceinline__ auto saved() const { return SavedInRegisters<H, H == 64 ? 2 : 1>(); }

  // out = a W^T for K inputs and N <= 128 outputs, 64 inputs a tile. A load brings 16 outputs x 16 inputs, as four
  // 8 x 8 matrices whose rows lie 128 bytes apart, 16-byte chunks swizzled by the row.
  template <int N, int K>
  __device__ __forceinline__ void multiply(float (&out)[N / 2], const uint32_t (&a)[K / 4]) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) out[i] = 0.0f;
    const int lane = threadIdx.x % 32, row = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
#pragma unroll
    for (int k = 0; k < K / 16; ++k) {
      const uint32_t base = shared + (tile + k / 4) * p.stage_bytes + row * 128;
      const uint32_t chunk = ((k % 4 * 2 + half) ^ (row % 8)) * 16;
#pragma unroll
      for (int n = 0; n < N / 16; ++n) {
        uint32_t b[4];
        ptx::ldmatrix_x4(b, base + 2048 * n + chunk);
        ptx::mma_m16n8k16(out + 8 * n, a + 4 * k, b[0], b[1]);
        ptx::mma_m16n8k16(out + 8 * n + 4, a + 4 * k, b[2], b[3]);
      }
    }
    tile += (K + 63) / 64;
  }
};

// Copy `bytes` to shared memory with all threads, 16 bytes each at a time.
__device__ __forceinline__ void copy(uint32_t target, const void* source, uint32_t bytes) {
  for (uint32_t i = 16 * threadIdx.x; i < bytes; i += 16 * kMmaThreads) {
    ptx::cp_async_16(target + i, static_cast<const uint8_t*>(source) + i);
  }
}

template <int H, int D>
__global__ void __launch_bounds__(kMmaThreads, 1) sm80_density_mlp_fwd_kernel(const __grid_constant__ DensityMlp p) {
#if !defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(FASTSCORE_EMULATOR)  // Hopper runs its own kernels
  const uint32_t shared = ptx::shared_address(ptx::shared_memory());
  const int first = blockIdx.y * p.rows_per_block, end = min(first + p.rows_per_block, p.rows_total);
  const uint32_t row_bytes = 4 * p.row_stride, table_bytes = (row_bytes + 127) / 128 * 128;
  auto table = [&](int row) { return shared + p.tables_at + (row - first) % kTableStages * table_bytes; };
  auto prefetch = [&](int row) {
    if (row < end) copy(table(row), p.row_table + static_cast<size_t>(row) * p.row_stride, row_bytes);
    ptx::cp_async_commit();
  };
  copy(shared, p.weights, p.tiles * p.stage_bytes);
  prefetch(first);
  prefetch(first + 1);

  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = threadIdx.x % 32, column = 4 * (lane % 4);
  MmaEngine<H, D> engine{p, shared, shared + p.scratch_at + group * 256 * D + 16 * thread, column, column};
  const int sample = (blockIdx.x * 2 + group) * 64 + thread / 32 * 16 + lane / 4;
  Vectors vectors{p, 0, 0, {min(sample, p.batch - 1), min(sample + 8, p.batch - 1)}};
#pragma unroll 1
  for (int row = first; row < end; ++row) {
    ptx::cp_async_wait<1>();
    __syncthreads();  // everyone's copies are here, and everyone is done with the row before
    prefetch(row + 2);
    vectors.row_table = table(row);
    vectors.row = row;
    const float2 f = quad_sum(evaluate_row<D>(engine, vectors));
    store(p, sample, row, f);
  }
#endif
}

using Kernel = void(DensityMlp);

static Kernel* kernel_of(const Plan& plan) {
  constexpr Kernel* kKernels[2][3] = {
      {sm80_density_mlp_fwd_kernel<64, 16>, sm80_density_mlp_fwd_kernel<64, 64>, sm80_density_mlp_fwd_kernel<64, 128>},
      {sm80_density_mlp_fwd_kernel<128, 16>, sm80_density_mlp_fwd_kernel<128, 64>,
       sm80_density_mlp_fwd_kernel<128, 128>}};
  return kKernels[plan.hidden / 128][plan.data / 64];
}

void sm80_density_mlp(const DensityMlp& p, const Plan& plan, int tiles, int splits, cudaStream_t stream) {
  launch("sm80_density_mlp", kernel_of(plan), p, plan, tiles, splits, stream);
}

int sm80_density_mlp_clusters(const Plan& plan) { return active_clusters("sm80_density_mlp", kernel_of(plan), plan); }

}  // namespace fastscore
