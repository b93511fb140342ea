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
#include <common/error.h>
#include <cuda_runtime.h>
#include <steps.h>

#include <common/steps/block.cuh>
#include <common/steps/chain.cuh>
#include <common/steps/launch.cuh>
#include <common/steps/products.cuh>
#include <common/steps/samples.cuh>

namespace fastscore {

constexpr int kConsumers64 = 3, kThreads64 = 128 * (kConsumers64 + 1), kTile64 = 64 * kConsumers64;
constexpr uint32_t kStage64 = 64 * 128;  // bytes of 64 inputs x 64 outputs

// The register file: h, y and eps of 32 each and an operand of 16 leave 48 for everything else.
constexpr int kRegisters64 = 160;
static_assert(128 * (kConsumers64 * kRegisters64 + 24) <= 65536);

template <int D, bool Padded, bool Kept>
__device__ __forceinline__ void consume_64(const Steps& p, const Barriers& barriers, uint32_t shared,
                                           const Unit& unit) {
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32, column = 4 * (lane % 4);
  const uint32_t place = shared + p.samples_at + group * kSampleBytes<D> + 16 * thread;
  Chain<64, D, Padded, ResidentProduct<kStage64>, Samples<D, Kept>> chain{
      p, ResidentProduct<kStage64>(shared), {p, place, column, 0}, column};
  ptx::mbarrier_wait(barriers.full(0), 0);  // the weights
  consume(chain, p, barriers, shared, unit, 64 * group + 16 * (thread / 32) + lane / 4, kTile64);
}

template <int D, bool Padded, bool Kept>
__global__ void __launch_bounds__(kThreads64, 1) sm90_steps_64_fwd_kernel(const __grid_constant__ Steps p) {
#if FASTSCORE_HAS_WGMMA
  const uint32_t shared = ptx::shared_address(ptx::shared_memory());
  const Barriers barriers{shared + p.barriers_at, 1, p.record_stages};
  if (threadIdx.x == 0) barriers.initialize(1, 4 * kConsumers64);
  __syncthreads();
  const Unit unit(p, kTile64);
  if (threadIdx.x / 128 == kConsumers64) {
    ptx::registers_decrease<24>();
    if (threadIdx.x % 128 == 0) produce_resident<kStage64>(p, barriers, shared, unit);
  } else {
    ptx::registers_increase<kRegisters64>();
    consume_64<D, Padded, Kept>(p, barriers, shared, unit);
  }
#endif
}

template <int D, bool Padded>
void launch_64(const Steps& p, const StepsPlan& plan, int clusters, cudaStream_t stream) {
  auto kernel = sm90_steps_64_fwd_kernel<D, Padded, true>;
  if constexpr (D > 16) {
    if (!plan.kept) kernel = sm90_steps_64_fwd_kernel<D, Padded, false>;
  }
  launch_persistent("sm90_steps_64", kernel, p, plan, clusters, stream);
}

void sm90_steps_64(const Steps& p, const StepsPlan& plan, int clusters, cudaStream_t stream) {
  const auto launch = plan.data == 16 ? (plan.padded ? launch_64<16, true> : launch_64<16, false>)
                                      : (plan.padded ? launch_64<64, true> : launch_64<64, false>);
  launch(p, plan, clusters, stream);
}

}  // namespace fastscore
