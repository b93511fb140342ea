// Hopper, width 1,024, programs of steps: two blocks share 64 samples, with half of the outputs each (common/steps/wide.cuh,
// block_pair.cuh), and two such pairs share the weights (common/steps/pair_rings.cuh).
//
//   warpgroups 0, 1: consumers  x_t, h --bfloat16--> A in shared memory --wgmma--> own columns of h -> steps
//   warpgroup 2: a thread a warp  two rings of weights; own half of A --bulk copy--> the partner; records
//
// Source: A Score-Based Density Formula (Li and Yan, 2024), https://arxiv.org/abs/2408.16765
#include <cuda_runtime.h>
#include <steps.h>

#include <common/steps/block.cuh>
#include <common/steps/block_pair.cuh>
#include <common/steps/launch.cuh>
#include <common/steps/wide.cuh>

namespace fastscore {

constexpr int kThreads1024 = 384;
[[maybe_unused]] constexpr int kTile1024 = 64;
// h of 128 and a residual block's input of 64 leave 48 for all else.
constexpr int kRegisters1024 = 240;
static_assert(128 * (2 * kRegisters1024 + 24) <= 65536, "registers of a multiprocessor");

// The last warpgroup: a thread of every warp has one thing to do.
__device__ __forceinline__ void supply_1024(const Steps& p, const Barriers& barriers, const Meetings& meetings,
                                            uint32_t shared, Unit unit) {
  const int warp = threadIdx.x / 32 % 4;
  if (warp < PairRings::kWarpgroups) {
    produce_ring(p, barriers, shared, unit, warp);
  } else if (warp == PairRings::kWarpgroups) {
    carry(p, meetings, shared + p.scratch_at, unit);
  } else {  // a row has two records, one for each half of the columns
    Position at;
    for (; unit.left > 0; unit.advance(p)) copy_record(p, barriers, shared, 2 * unit.row + Seat::half(), at);
  }
}

template <bool Padded>
__device__ __forceinline__ void consume_1024(const Steps& p, const Barriers& barriers, uint32_t shared,
                                             const Unit& unit) {
  // The same for all lanes, as the compiler has to know: descriptors are made of it.
  const int group = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  const int thread = threadIdx.x % 128, lane = thread % 32, column = 4 * (lane % 4);
  const uint32_t operand = shared + p.scratch_at;
  using Chain = WideChain<Padded, Samples<64, false>, BlockPair>;
  Chain chain{p,
              BlockPair(barriers, operand, shared, group, thread),
              {p, 0, Chain::D * group + column, 0},
              SharedOperand(operand, thread),
              Chain::H * group + column};
  const int first = kTile1024 * Seat::pair() + 16 * (thread / 32) + lane / 4;
  consume(chain, p, barriers, shared, unit, first, kTile1024 * Seat::sharers());
}

template <bool Padded>
__global__ void __launch_bounds__(kThreads1024, 1) sm90_steps_1024_fwd_kernel(const __grid_constant__ Steps p) {
#if FASTSCORE_HAS_WGMMA
  const uint32_t shared = ptx::shared_address(ptx::shared_memory());
  const Barriers barriers{shared + p.barriers_at, p.barriers, p.record_stages};
  const Meetings meetings{shared + p.scratch_at + 2 * kHalfBytes + kPairSumBytes};
  if (threadIdx.x == 0) {
    meetings.initialize();
    barriers.initialize(4, 8, Seat::sharers());  // a ring is read by one warpgroup, a record by both
  }
  ptx::cluster_sync();
  const Unit unit(p);
  if (threadIdx.x / 128 == PairRings::kWarpgroups) {
    ptx::registers_decrease<24>();
    if (threadIdx.x % 32 == 0) supply_1024(p, barriers, meetings, shared, unit);
  } else {
    ptx::registers_increase<kRegisters1024>();
    consume_1024<Padded>(p, barriers, shared, unit);
  }
  ptx::cluster_sync();  // others may still copy into this block, or release its stages
#endif
}

void sm90_steps_1024(const Steps& p, const StepsPlan& plan, const StepsConfig& config, cudaStream_t stream) {
  const auto kernel = plan.padded ? sm90_steps_1024_fwd_kernel<true> : sm90_steps_1024_fwd_kernel<false>;
  launch_persistent("sm90_steps_1024", kernel, p, plan, config, stream);
}

}  // namespace fastscore
