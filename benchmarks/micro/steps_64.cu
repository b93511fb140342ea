// Width 64 as steps with two or four warpgroups, where csrc/sm90_steps_64.cu has three: the same chain with other registers
// and another share of shared memory. With four, h, y, eps and an operand leave 8 of 120 registers, so some spill, and keys
// and x find no place in shared memory.
#include <cuda_runtime.h>
#include <steps.h>

#include <common/steps/block.cuh>
#include <common/steps/launch.cuh>
#include <stdexcept>

#include "launch.cuh"

namespace fastscore {

template <int Consumers, int Registers>
struct Warpgroups {
  static constexpr int kConsumers = Consumers, kRegisters = Registers;
  static constexpr bool kClusters = false;
  using Product = ResidentProduct<64 * 128>;

  template <int D, bool Padded, bool Kept, class... Arguments>
  __device__ __forceinline__ static auto chain(Arguments&&... arguments) {
    return make_chain<64, D, Padded, Kept, Product>(arguments...);
  }
};

template <class Width, int D, bool Kept>
__global__ void __launch_bounds__(128 * (Width::kConsumers + 1), 1) steps_64_kernel(const __grid_constant__ Steps p) {
#if FASTSCORE_HAS_WGMMA
  run_chains<Width, D, false, Kept>(p);
#endif
}

// Divide shared memory between all weights, keys and x where they are kept, and two records.
template <class Width, int D, bool Kept>
void launch_64(Steps p, int linears, cudaStream_t stream) {
  StepsPlan plan = {};
  plan.parts = 1;
  plan.samples = 64 * Width::kConsumers, plan.threads = 128 * (Width::kConsumers + 1);
  p.tiles = p.stages = linears, p.barriers = 1, p.record_stages = 2;
  p.scratch_at = linears * 64 * 128;
  p.records_at = p.scratch_at + (Kept ? 12 * plan.samples * D : 0);
  p.barriers_at = p.records_at + p.record_stages * ((4 * p.record + 127) / 128 * 128);
  plan.shared_bytes = p.barriers_at + 16 * (p.barriers + p.record_stages);
  launch_persistent("steps of 64", steps_64_kernel<Width, D, Kept>, p, plan, {1, 0}, stream);
}

// What reads the arguments (csrc/steps.cpp) names the launches of all widths, which nothing here calls.
[[gnu::weak]] void sm90_steps_64(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {}
[[gnu::weak]] void sm90_steps_128(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {}
[[gnu::weak]] void sm90_steps_256(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {}
[[gnu::weak]] void sm90_steps_512(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {}
[[gnu::weak]] void sm90_steps_1024(const Steps&, const StepsPlan&, const StepsConfig&, cudaStream_t) {}

}  // namespace fastscore

// The arguments of fastscore._C.steps for a network without padding.
extern "C" const char* micro_steps_64(int warpgroups, int data, int linears, const uint64_t* pointers,
                                      const int32_t* sizes, const int32_t* columns, const char* steps, int bytes,
                                      uint64_t stream) {
  using namespace fastscore;
  return guarded([&] {
    const Steps p = step_arguments(pointers, sizes, columns, steps, bytes);
    const auto at = pointer<CUstream_st>(stream);
    using Two = Warpgroups<2, 240>;
    using Four = Warpgroups<4, 120>;
    if (warpgroups != 2 && warpgroups != 4) throw std::runtime_error("two or four warpgroups");
    if (data == 16)
      return warpgroups == 2 ? launch_64<Two, 16, true>(p, linears, at) : launch_64<Four, 16, true>(p, linears, at);
    return warpgroups == 2 ? launch_64<Two, 64, true>(p, linears, at) : launch_64<Four, 64, false>(p, linears, at);
  });
}
