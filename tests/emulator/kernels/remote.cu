// Two CTAs exchange their halves: out[2][128], of every number its own and the partner's, four times it, from a copy and
// from stores that arrive by themselves.
#include <ptx/cluster.cuh>
#include <ptx/mbarrier.cuh>
#include <ptx/remote.cuh>
#include <ptx/shared.cuh>

#include "launch.cuh"

namespace ptx = fastscore::ptx;

enum Mistake { kNone, kNoWait, kNoProxyFence, kOverwritten, kWrongRank };

__global__ __launch_bounds__(128) void remote_kernel(const float* values, float* out, int planted) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t own = ptx::shared_address(ptx::shared_memory()), copied = own + 512, stored = own + 1024;
  const uint32_t bar = own + 1536, rank = ptx::cluster_rank();
  const uint32_t partner = PLANTED(kWrongRank) ? 2 : rank ^ 1, t = threadIdx.x;
  if (t == 0) {
    ptx::mbarrier_init(bar, 1);
    ptx::mbarrier_init_fence();
  }
  ptx::cluster_sync();
  const float value = values[128 * rank + t];
  ptx::store_shared(own + 4 * t, value);
  if (!PLANTED(kNoProxyFence)) ptx::fence_proxy_async();
  ptx::named_barrier_sync(1, 128);
  if (t == 0) {
    ptx::mbarrier_expect(bar, 1024);
    ptx::bulk_copy_remote(copied, own, 512, bar, partner);
  }
  if (t % 2 == 0) {
    ptx::store_remote(stored + 4 * t, make_float2(3 * value, 3 * ptx::load_shared<float>(own + 4 * t + 4)), bar,
                      partner);
  }
  if (PLANTED(kOverwritten)) ptx::store_shared(own + 4 * t, 0.0f);
  if (!PLANTED(kNoWait)) ptx::mbarrier_wait(bar, 0);
  const float there = ptx::load_shared<float>(copied + 4 * t) + ptx::load_shared<float>(stored + 4 * t);
  out[128 * rank + t] = value + there;
  ptx::cluster_sync();
#endif
}

extern "C" int run_remote(const float* values, float* out, int planted) {
  return launch(remote_kernel, 2, 128, 2, 1544, values, out, planted);
}
