// Hopper, width 64, programs of steps: three warpgroups keep 64 samples each in registers, and all weights are in shared
// memory.
//
//   warpgroups 0..2: consumers   eps -> x_t -> A operand --wgmma--> h -> steps -> A operand --wgmma--> ... -> f
//   warpgroup 3: producer        device memory --bulk copies--> weights, once; a row's record, three rows ahead
//
// The only barriers are those of the records. Blocks are persistent: each walks over its share of the pairs of a tile
// and a row (common/steps/units.cuh).
//
// Source: A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
#include <cuda_runtime.h>
#include <steps.h>

#include <common/steps/block.cuh>
#include <common/steps/launch.cuh>

namespace fastscore {

struct Width64 {
  static constexpr int kConsumers = 3;
  static constexpr bool kClusters = false;
  static constexpr int kRegisters = 160;  // h, y and eps of 32 each and an operand of 16 leave 48 for all else
  using Product = ResidentProduct<64 * 128>;

  template <int D, bool Padded, bool Kept, class... Arguments>
  __device__ __forceinline__ static auto chain(Arguments&&... arguments) {
    return make_chain<64, D, Padded, Kept, Product>(arguments...);
  }
};

template <int D, bool Padded, bool Kept>
__global__ void __launch_bounds__(128 * (Width64::kConsumers + 1), 1)
    sm90_steps_64_fwd_kernel(const __grid_constant__ Steps p) {
#if FASTSCORE_HAS_WGMMA
  run_chains<Width64, D, Padded, Kept>(p);
#endif
}

void sm90_steps_64(const Steps& p, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream) {
  for_variant<true>(plan, [&](auto data, auto padded, auto kept) {
    const auto kernel = sm90_steps_64_fwd_kernel<decltype(data)::value, decltype(padded)::value, decltype(kept)::value>;
    launch_persistent("sm90_steps_64", kernel, p, plan, config, stream);
  });
}

}  // namespace fastscore
