// out[64][64] = a[64][64] b[64][64]^T, both operands put into shared memory by ordinary stores.
#include <ptx/shared.cuh>
#include <ptx/wgmma.cuh>

#include "launch.cuh"

namespace ptx = fastscore::ptx;

enum Mistake { kNone, kNoProxyFence, kStoreAfterFence };

__global__ __launch_bounds__(128) void proxy_kernel(const uint4* a, const uint4* b, float* out, int planted) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  uint32_t a_shared = ptx::shared_address(ptx::shared_memory()), b_shared = a_shared + 64 * 128;
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, column = 2 * (lane % 4);
  for (int i = threadIdx.x; i < 512; i += 128) {
    int unit = i % 8 ^ i / 8 % 8;  // of 16 bytes in a row of 128: the swizzle
    ptx::store_shared(a_shared + i / 8 * 128 + unit * 16, a[i]);
    ptx::store_shared(b_shared + i / 8 * 128 + unit * 16, b[i]);
  }
  if (!PLANTED(kNoProxyFence)) ptx::fence_proxy_async();
  if (PLANTED(kStoreAfterFence) && threadIdx.x == 5) ptx::store_shared(b_shared + 5 * 16, b[5]);
  ptx::named_barrier_sync(1, 128);
  float d[32];
  ptx::wgmma_fence();
#pragma unroll
  for (int k = 0; k < 4; k++)
    ptx::wgmma<64>(d, ptx::wgmma_descriptor(a_shared + 32 * k), ptx::wgmma_descriptor(b_shared + 32 * k), k > 0);
  ptx::wgmma_commit();
  ptx::wgmma_wait<0>();
  ptx::wgmma_hold(d);
#pragma unroll
  for (int i = 0; i < 32; i++) out[(row + i / 2 % 2 * 8) * 64 + i / 4 * 8 + column + i % 2] = d[i];
#endif
}

extern "C" int run_proxy(const uint4* a, const uint4* b, float* out, int planted) {
  return launch(proxy_kernel, 1, 128, 1, 2 * 64 * 128, a, b, out, planted);
}
