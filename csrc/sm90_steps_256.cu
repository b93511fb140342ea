// Hopper, width 256, programs of steps: two warpgroups keep 64 samples each in registers, weights pass through a ring of
// eight stages of 16 KB, and products go by halves (common/steps/halves.cuh).
//
//   warpgroups 0, 1: consumers   eps -> x_t -> A operand --wgmma--> h -> steps -> A operand --wgmma--> ... -> f
//                                h of a residual block's input <--float16--> shared memory
//   warpgroup 2: producer        device memory --bulk copies--> weights, for two blocks at once; records
//
// Source: A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
#include <cuda_runtime.h>
#include <steps.h>

#include <common/steps/block.cuh>
#include <common/steps/halves.cuh>
#include <common/steps/launch.cuh>

namespace fastscore {

struct Width256 {
  static constexpr int kConsumers = 2;
  static constexpr bool kClusters = true;
  static constexpr int kRegisters = 240;  // h of 128 and an operand of 64 leave 48 for all else
  using Product = HalvesProduct;

  template <int D, bool Padded, bool Kept>
  __device__ __forceinline__ static auto chain(const Steps& p, const Barriers& barriers, uint32_t shared, int group,
                                               int thread, int column) {
    static_assert(!Kept, "saved tiles take the place of keys and x");
    const uint32_t place = shared + p.scratch_at + group * HalfTile::kBytes + 16 * thread;
    return HalvesChain<D, Padded, Samples<D, false>>{
        p, HalvesProduct(p, barriers, shared), {p, 0, column, 0}, {place}, column};
  }
};

template <int D, bool Padded>
__global__ void __launch_bounds__(128 * (Width256::kConsumers + 1), 1)
    sm90_steps_256_fwd_kernel(const __grid_constant__ Steps p) {
#if FASTSCORE_HAS_WGMMA
  run_chains<Width256, D, Padded, false>(p);
#endif
}

void sm90_steps_256(const Steps& p, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream) {
  for_variant<false>(plan, [&](auto data, auto padded, auto) {
    const auto kernel = sm90_steps_256_fwd_kernel<decltype(data)::value, decltype(padded)::value>;
    launch_persistent("sm90_steps_256", kernel, p, plan, config, stream);
  });
}

}  // namespace fastscore
