// Rounding to packed halves and back, and the special functions, one number a thread.
#include <ptx/convert.cuh>

#include "launch.cuh"

namespace ptx = fastscore::ptx;

__global__ void convert_kernel(const float* in, uint32_t* packed, float2* unpacked, float* functions) {
  int i = blockIdx.x * blockDim.x + threadIdx.x, n = gridDim.x * blockDim.x;
  float x = in[i], y = in[n - 1 - i];
  packed[2 * i] = ptx::pack_bf16(x, y);
  packed[2 * i + 1] = ptx::pack_f16(x, y);
  unpacked[i] = ptx::unpack_f16(packed[2 * i + 1]);
  float* f = functions + 6 * i;
  f[0] = ptx::tanh_approx(x), f[1] = ptx::exp2_approx(x), f[2] = ptx::log2_approx(x), f[3] = ptx::sqrt_approx(x);
  f[4] = ptx::rsqrt_approx(x), f[5] = ptx::reciprocal_approx(x);
}

extern "C" int run_convert(int blocks, const float* in, uint32_t* packed, float2* unpacked, float* functions) {
  return launch(convert_kernel, blocks, 128, 1, 0, in, packed, unpacked, functions);
}
