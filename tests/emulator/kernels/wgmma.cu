// out[64][N] = a[64][K] b[N][K]^T by one warpgroup. b (and a, if it is not in registers) come as images of shared
// memory: blocks of 64 columns, in each the rows of 128 bytes, swizzled.
#include <ptx/bulk_copy.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/shared.cuh>
#include <ptx/wgmma.cuh>

#include "launch.cuh"

namespace ptx = fastscore::ptx;

enum Mistake { kNone, kNoCopyWait, kNoWait, kNoCommit, kNoFence, kOtherDescriptor };

template <int N, int K, bool A_IN_REGISTERS>
__global__ __launch_bounds__(128) void wgmma_kernel(const uint32_t* a, const uint8_t* a_image, const uint8_t* b_image,
                                                    float* out, int planted) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  constexpr uint32_t a_bytes = 64 * K * 2, b_bytes = N * K * 2;
  uint32_t a_shared = ptx::shared_address(ptx::shared_memory()), b_shared = a_shared + a_bytes;
  uint32_t full = b_shared + b_bytes;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, column = 2 * (lane % 4);
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(full, 1);
    ptx::mbarrier_init_fence();
    ptx::mbarrier_expect(full, a_bytes + b_bytes);
    ptx::bulk_copy(a_shared, a_image, a_bytes, full);
    ptx::bulk_copy(b_shared, b_image, b_bytes, full);
  }
  __syncthreads();
  if (!PLANTED(kNoCopyWait)) ptx::mbarrier_wait(full, 0);
  constexpr int OFFSET = 4;  // the accumulators need not start the array
  float d[N / 2 + OFFSET];
  uint32_t fragments[K / 4];
#pragma unroll
  for (int i = 0; i < K / 4; i++) {
    int k = i / 4 * 16 + column + i % 4 / 2 * 8, m = row + i % 2 * 8;
    fragments[i] = a[(m * K + k) / 2];
  }
#pragma unroll
  for (int block = 0; block < K / 64; block++) {  // a group each; one is in flight while the next is issued
    if (!PLANTED(kNoFence)) ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < 4; k++) {
      uint64_t b = ptx::wgmma_descriptor(b_shared + block * N * 128 + k * 32);
      if (PLANTED(kOtherDescriptor) && threadIdx.x == 77) b += 2;
      if constexpr (A_IN_REGISTERS) {
        const uint32_t* f = fragments + 16 * block + 4 * k;
        ptx::wgmma<N, OFFSET>(d, f[0], f[1], f[2], f[3], b, block + k > 0);
      } else {
        ptx::wgmma<N, OFFSET>(d, ptx::wgmma_descriptor(a_shared + block * 64 * 128 + k * 32), b, block + k > 0);
      }
    }
    if (!PLANTED(kNoCommit)) ptx::wgmma_commit();
    if (block > 0) ptx::wgmma_wait<1>();
  }
  if (!PLANTED(kNoWait)) ptx::wgmma_wait<0>();
  ptx::wgmma_hold(d);
#pragma unroll
  for (int c = 0; c < N / 8; c++)
#pragma unroll
    for (int i = 0; i < 4; i++) out[(row + i / 2 * 8) * N + 8 * c + column + i % 2] = d[OFFSET + 4 * c + i];
  if (PLANTED(kNoWait)) ptx::wgmma_wait<0>();
  if (PLANTED(kNoCopyWait)) ptx::mbarrier_wait(full, 0);
#endif
}

template <int N, int K>
int launch_wgmma(bool a_in_registers, const uint32_t* a, const uint8_t* a_image, const uint8_t* b_image, float* out,
                 int planted) {
  size_t bytes = (64 + N) * K * 2 + 8;
  if (a_in_registers) return launch(wgmma_kernel<N, K, true>, 1, 128, 1, bytes, a, a_image, b_image, out, planted);
  return launch(wgmma_kernel<N, K, false>, 1, 128, 1, bytes, a, a_image, b_image, out, planted);
}

extern "C" int run_wgmma(int n, bool a_in_registers, const uint32_t* a, const uint8_t* a_image, const uint8_t* b_image,
                         float* out, int planted) {
  if (n == 16) return launch_wgmma<16, 192>(a_in_registers, a, a_image, b_image, out, planted);
  if (n == 32) return launch_wgmma<32, 192>(a_in_registers, a, a_image, b_image, out, planted);
  if (n == 64) return launch_wgmma<64, 192>(a_in_registers, a, a_image, b_image, out, planted);
  if (n == 128) return launch_wgmma<128, 192>(a_in_registers, a, a_image, b_image, out, planted);
  return launch_wgmma<256, 192>(a_in_registers, a, a_image, b_image, out, planted);
}
