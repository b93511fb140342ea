// Two pairs of warps exchange values through shared memory, each pair at a barrier of its own:
// out[t] = in[t ^ 32] + sum of in over the warp of t.
#include <ptx/shared.cuh>

#include "launch.cuh"

namespace ptx = fastscore::ptx;

enum Mistake { kNone, kNoBarrier, kOtherCount, kOneWarpMissing, kDivergent };

__global__ __launch_bounds__(128) void barriers_kernel(const float* in, float* out, int planted) {
  uint32_t values = ptx::shared_address(ptx::shared_memory());
  int pair = threadIdx.x / 64;
  float value = in[threadIdx.x], sum = value;
  ptx::store_shared(values + 4 * threadIdx.x, value);
  bool missing = PLANTED(kNoBarrier) || (PLANTED(kOneWarpMissing) && threadIdx.x < 32);
  int threads = PLANTED(kOtherCount) && threadIdx.x >= 96 ? 96 : 64;
  if (!missing) ptx::named_barrier_sync(1 + pair, threads);
  float other = ptx::load_shared<float>(values + 4 * (threadIdx.x ^ 32));
  if (PLANTED(kDivergent) && threadIdx.x == 40) __syncwarp();
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) sum += __shfl_xor_sync(~0u, sum, offset);
  out[threadIdx.x] = other + sum;
}

extern "C" int run_barriers(const float* in, float* out, int planted) {
  return launch(barriers_kernel, 1, 128, 1, 128 * 4, in, out, planted);
}

extern "C" int run_barriers_configured(int threads, int shared_bytes, const float* in, float* out) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  return cudaLaunchKernelEx(&config, barriers_kernel, in, out, 0);
}
