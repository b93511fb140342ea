// Hopper, width 128, programs of steps: two warpgroups keep 64 samples each in registers; weights stay in shared memory, or
// pass through a ring of seven stages of 16 KB for an adaLN network.
//
//   warpgroups 0, 1: consumers   eps -> x_t -> A operand --wgmma--> h -> steps -> A operand --wgmma--> ... -> f
//   warpgroup 2: producer        device memory --bulk copies--> weights, for two blocks at once; records
//
// A product takes two stages, so in a ring of seven the warpgroups may be three products apart: while one multiplies, the
// other runs what lies between two products.
//
// Source: A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
#include <cuda_runtime.h>
#include <steps.h>

#include <common/steps/block.cuh>
#include <common/steps/launch.cuh>

namespace fastscore {

struct Width128 {
  static constexpr int kConsumers = 2;
  static constexpr bool kClusters = true;
  static constexpr int kRegisters = 240;  // h and y of 64 each, eps and an operand of 32 each leave 48 for all else
  using Product = RingProduct<128 * 128, true>;

  template <int D, bool Padded, bool Kept, class... Arguments>
  __device__ __forceinline__ static auto chain(Arguments&&... arguments) {
    return make_chain<128, D, Padded, Kept, Product>(arguments...);
  }
};

template <int D, bool Padded, bool Kept>
__global__ void __launch_bounds__(128 * (Width128::kConsumers + 1), 1)
    sm90_steps_128_fwd_kernel(const __grid_constant__ Steps p) {
#if FASTSCORE_HAS_WGMMA
  run_chains<Width128, D, Padded, Kept>(p);
#endif
}

void sm90_steps_128(const Steps& p, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream) {
  for_variant<true>(plan, [&](auto data, auto padded, auto kept) {
    const auto kernel =
        sm90_steps_128_fwd_kernel<decltype(data)::value, decltype(padded)::value, decltype(kept)::value>;
    launch_persistent("sm90_steps_128", kernel, p, plan, config, stream);
  });
}

}  // namespace fastscore
