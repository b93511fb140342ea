// out[64][64] = a[64][64] b[64][64]^T by four warps. b comes as an image of shared memory: rows of 128 bytes, swizzled.
#include <ptx/cp_async.cuh>
#include <ptx/mma.cuh>
#include <ptx/shared.cuh>

#include "launch.cuh"

namespace ptx = fastscore::ptx;

enum Mistake { kNone, kNoCopyWait, kMisalignedRow, kDivergent };

__global__ __launch_bounds__(128) void mma_kernel(const uint32_t* a, const uint4* b_image, float* out, int planted) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
  uint32_t b_shared = ptx::shared_address(ptx::shared_memory());
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, column = 2 * (lane % 4);
  for (int i = threadIdx.x; i < 512; i += 128) ptx::cp_async_16(b_shared + 16 * i, b_image + i);
  ptx::cp_async_commit();
  if (!PLANTED(kNoCopyWait)) ptx::cp_async_wait<0>();
  __syncthreads();
  float d[32] = {};
#pragma unroll
  for (int k = 0; k < 4; k++) {
    uint32_t fragment[4];
#pragma unroll
    for (int i = 0; i < 4; i++) fragment[i] = a[((row + i % 2 * 8) * 64 + 16 * k + column + i / 2 * 8) / 2];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      // Lanes 0..7 and 8..15 name the rows of columns 16 k.. and 16 k + 8.., lanes 16.. those of the next 8 rows.
      int b_row = 16 * n + lane % 8 + lane / 16 * 8, unit = 2 * k + lane / 8 % 2;
      uint32_t address = b_shared + b_row * 128 + ((unit ^ b_row % 8) * 16), b[4];
      if (PLANTED(kMisalignedRow) && threadIdx.x == 70) address += 8;
      if (PLANTED(kDivergent) && threadIdx.x == 33) __syncwarp();
      ptx::ldmatrix_x4(b, address);
      ptx::mma_m16n8k16(d + 8 * n, fragment, b[0], b[1]);
      ptx::mma_m16n8k16(d + 8 * n + 4, fragment, b[2], b[3]);
    }
  }
#pragma unroll
  for (int i = 0; i < 32; i++) out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
#endif
}

extern "C" int run_mma(const uint32_t* a, const uint4* b_image, float* out, int planted) {
  return launch(mma_kernel, 1, 128, 1, 64 * 64 * 2, a, b_image, out, planted);
}
