// The noise of given words, four elements a thread: an odd row has the sign -1.
#include <common/noise.cuh>

#include "launch.cuh"

constexpr int kDimensions = 16;

__global__ void noise_kernel(const uint32_t* keys, const uint32_t* points, float4* eps) {
  const int sample = blockIdx.x, row = threadIdx.x / 4, column = threadIdx.x % 4 * 4;
  const float sign = row % 2 == 0 ? 1.0f : -1.0f;
  eps[blockIdx.x * blockDim.x + threadIdx.x] =
      fastscore::make_eps<kDimensions>(keys, points, sample, row, column, sign);
}

extern "C" int run_noise(int samples, int rows, const uint32_t* keys, const uint32_t* points, float4* eps) {
  return launch(noise_kernel, samples, 4 * rows, 1, 0, keys, points, eps);
}
