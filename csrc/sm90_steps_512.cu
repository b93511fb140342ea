// Hopper, width 512, programs of steps: two warpgroups share 64 samples (common/steps/wide.cuh), and each has a ring of
// weights of its own (common/steps/rings.cuh).
//
//   warpgroups 0, 1: consumers      x_t, h --bfloat16--> A in shared memory --wgmma--> own columns of h -> steps
//   warpgroup 2: producer           device memory --bulk copies--> two rings, for two blocks at once; records
//
// Source: A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
#include <cuda_runtime.h>
#include <steps.h>

#include <common/steps/block.cuh>
#include <common/steps/launch.cuh>
#include <common/steps/one_block.cuh>
#include <common/steps/wide.cuh>

namespace fastscore {

constexpr int kThreads512 = 384;
[[maybe_unused]] constexpr int kTile512 = 64;
// h of 128 and a residual block's input of 64 leave 48 for all else.
constexpr int kRegisters512 = 240;
static_assert(128 * (2 * kRegisters512 + 24) <= 65536, "registers of a multiprocessor");
static_assert(SharedOperand::kBytes + SharedSums::kBytes == kWideScratchBytes, "as the plan divides shared memory");

// The producer thread: tile after tile, one for each ring. A record goes behind the first product's tiles, which need
// nothing of it, since it may have to wait for the row before.
__device__ __forceinline__ void produce_512(const Steps& p, const Barriers& barriers, uint32_t shared, Unit unit) {
  Position record, weights;
  for (; unit.left > 0; unit.advance(p)) {
    for (int tile = 0; tile < p.tiles; tile += Rings::kWarpgroups) {
      if (tile == Rings::kWarpgroups * Rings::kFirst) copy_record(p, barriers, shared, unit.row, record);
#pragma unroll
      for (int group = 0; group < Rings::kWarpgroups; ++group) {
        const int stage = group * Rings::kStages + weights.stage;
        ptx::mbarrier_wait(barriers.empty(stage), weights.phase ^ 1);
        ptx::mbarrier_expect(barriers.full(stage), Rings::kStageBytes);
        copy_stage<Rings::kStageBytes>(p, shared, stage, tile + group, barriers.full(stage));
      }
      weights.advance(Rings::kStages);
    }
  }
}

template <bool Padded>
__device__ __forceinline__ void consume_512(const Steps& p, const Barriers& barriers, uint32_t shared,
                                            const Unit& unit) {
  // The same for all lanes, as the compiler has to know: descriptors are made of it.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int thread = threadIdx.x % 128, lane = thread % 32, column = 4 * (lane % 4);
  const uint32_t operand = shared + p.scratch_at;
  using Chain = WideChain<Padded, Samples<64, false>, OneBlock>;
  const SharedSums sums(operand + SharedOperand::kBytes, group, thread);
  Chain chain{p,
              {Rings(barriers, operand, shared, group), sums},
              {p, 0, Chain::D * group + column, 0},
              SharedOperand(operand, thread),
              Chain::H * group + column};
  const int first = kTile512 * ptx::cluster_rank() + 16 * (thread / 32) + lane / 4;
  consume(chain, p, barriers, shared, unit, first, kTile512 * ptx::cluster_size());
}

template <bool Padded>
__global__ void __launch_bounds__(kThreads512, 1) sm90_steps_512_fwd_kernel(const __grid_constant__ Steps p) {
#if FASTSCORE_HAS_WGMMA
  const uint32_t shared = ptx::shared_address(ptx::shared_memory());
  const Barriers barriers{shared + p.barriers_at, p.barriers, p.record_stages};
  if (threadIdx.x == 0) barriers.initialize(4, 8);  // a ring is read by one warpgroup, a record by both
  ptx::cluster_sync();
  const Unit unit(p);
  if (threadIdx.x / 128 == Rings::kWarpgroups) {
    ptx::registers_decrease<24>();
    if (threadIdx.x % 128 == 0) produce_512(p, barriers, shared, unit);
  } else {
    ptx::registers_increase<kRegisters512>();
    consume_512<Padded>(p, barriers, shared, unit);
  }
  ptx::cluster_sync();  // others may still copy into this block, or release its stages
#endif
}

void sm90_steps_512(const Steps& p, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream) {
  const auto kernel = plan.padded ? sm90_steps_512_fwd_kernel<true> : sm90_steps_512_fwd_kernel<false>;
  launch_persistent("sm90_steps_512", kernel, p, plan, config, stream);
}

}  // namespace fastscore
