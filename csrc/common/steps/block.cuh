// What a block does with its units: one warpgroup copies weights and records; the others wait for a record, evaluate,
// give it back, store.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/ring.cuh>
#include <common/steps/chain.cuh>
#include <common/steps/products.cuh>
#include <common/steps/record.cuh>
#include <common/steps/samples.cuh>
#include <common/steps/units.cuh>
#include <ptx/registers.cuh>

namespace fastscore {

__device__ __forceinline__ uint32_t record_bytes(const Steps& p) { return (4 * p.record + 127) / 128 * 128; }

// A row's record on its way into the next of its stages, once that is free.
__device__ __forceinline__ void copy_record(const Steps& p, const Barriers& barriers, uint32_t shared, int row,
                                            Position& at) {
  const uint32_t full = barriers.table_full(at.stage);
  ptx::mbarrier_wait(barriers.table_empty(at.stage), at.phase ^ 1);
  ptx::mbarrier_expect(full, 4 * p.record);
  ptx::bulk_copy(shared + p.records_at + at.stage * record_bytes(p), p.records + static_cast<size_t>(row) * p.record,
                 4 * p.record, full);
  at.advance(p.record_stages);
}

// The next `StageBytes` of weights into their stage: every block of a cluster copies its share into all of them.
template <uint32_t StageBytes>
__device__ __forceinline__ void copy_stage(const Steps& p, uint32_t shared, uint32_t stage, int tile, uint32_t full) {
  const uint32_t blocks = ptx::cluster_size(), share = StageBytes / blocks, own = ptx::cluster_rank() * share;
  const uint32_t target = shared + stage * StageBytes + own;
  const uint8_t* source = p.weights + static_cast<size_t>(tile) * StageBytes + own;
  if (blocks == 1) {
    ptx::bulk_copy(target, source, share, full);
  } else {
    ptx::bulk_copy_multicast(target, source, share, full, static_cast<uint16_t>((1u << blocks) - 1));
  }
}

// The producer thread where weights stay: all of them at one barrier, then record after record.
template <uint32_t StageBytes>
__device__ __forceinline__ void produce(const ResidentProduct<StageBytes>*, const Steps& p, const Barriers& barriers,
                                        uint32_t shared, Unit unit) {
  ptx::mbarrier_expect(barriers.full(0), p.tiles * StageBytes);
  for (int tile = 0; tile < p.tiles; ++tile) copy_stage<StageBytes>(p, shared, tile, tile, barriers.full(0));
  Position record;
  for (; unit.left > 0; unit.advance(p)) copy_record(p, barriers, shared, unit.row, record);
}

// The same where they pass through a ring: all of them again behind every record, unless there is a stage for each.
template <uint32_t StageBytes, bool MayStay>
__device__ __forceinline__ void produce(const RingProduct<StageBytes, MayStay>*, const Steps& p,
                                        const Barriers& barriers, uint32_t shared, Unit unit) {
  const bool resident = MayStay && p.stages >= p.tiles;
  Position record, weights;
  for (bool first = true; unit.left > 0; unit.advance(p), first = false) {
    copy_record(p, barriers, shared, unit.row, record);
    if (resident && !first) continue;
    for (int tile = 0; tile < p.tiles; ++tile) {
      if (!resident) ptx::mbarrier_wait(barriers.empty(weights.stage), weights.phase ^ 1);
      ptx::mbarrier_expect(barriers.full(weights.stage), StageBytes);
      copy_stage<StageBytes>(p, shared, weights.stage, tile, barriers.full(weights.stage));
      weights.advance(p.stages);
    }
  }
}

// Write f of the thread's two rows of the tile, whose samples are `sample` and `sample` + 8: one lane of the four does.
__device__ __forceinline__ void store(const Steps& p, int sample, int row, float2 f) {
  if (threadIdx.x % 4 != 0) return;
  if (sample < p.batch) p.f[static_cast<size_t>(sample) * p.rows + row] = f.x;
  if (sample + 8 < p.batch) p.f[static_cast<size_t>(sample + 8) * p.rows + row] = f.y;
}

// A consumer warp's side. `first` is the sample of the thread's first row in tile 0, `samples` those of a cluster's tile.
template <class Chain>
__device__ __forceinline__ void consume(Chain& chain, const Steps& p, const Barriers& barriers, uint32_t shared,
                                        Unit unit, int first, int samples) {
  Position at;
  bool turned = true;
  for (; unit.left > 0; turned = unit.advance(p)) {
    const int sample = first + unit.tile * samples;
    if (turned) chain.samples.take(sample);
    ptx::mbarrier_wait(barriers.table_full(at.stage), at.phase);
    const float2 f = chain.evaluate(shared + p.records_at + at.stage * record_bytes(p));
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barriers.table_empty(at.stage));
    at.advance(p.record_stages);
    if (chain.stores()) store(p, sample, unit.row, f);
  }
}

// A chain whose keys and x have places in shared memory, or none.
template <int H, int D, bool Padded, bool Kept, class Product>
__device__ __forceinline__ auto make_chain(const Steps& p, const Barriers& barriers, uint32_t shared, int group,
                                           int thread, int column) {
  const uint32_t place = shared + p.scratch_at + group * kSampleBytes<D> + 16 * thread;
  return Chain<H, D, Padded, Product, Samples<D, Kept>>{p, Product(p, barriers, shared), {p, place, column, 0}, column};
}

// A block of warpgroups that keep 64 samples each in registers. A `Width` has
//   kConsumers, kRegisters  warpgroups, and registers of their threads; the producer's have 24
//   kClusters               whether blocks form clusters
//   Product                 how they multiply
//   chain<D, Padded, Kept>  what evaluates rows for a thread
template <class Width, int D, bool Padded, bool Kept>
__device__ __forceinline__ void run_chains(const Steps& p) {
  constexpr int kConsumers = Width::kConsumers, kSamples = 64 * kConsumers;
  static_assert(128 * (kConsumers * Width::kRegisters + 24) <= 65536, "registers of a multiprocessor");
  const uint32_t shared = ptx::shared_address(ptx::shared_memory());
  const Barriers barriers{shared + p.barriers_at, p.barriers, p.record_stages};
  if (threadIdx.x == 0) barriers.initialize(4 * kConsumers, 4 * kConsumers);
  ptx::cluster_sync();
  const Unit unit(p);
  const int group = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32, column = 4 * (lane % 4);
  if (group == kConsumers) {
    ptx::registers_decrease<24>();
    if (thread == 0) produce(static_cast<const typename Width::Product*>(nullptr), p, barriers, shared, unit);
  } else {
    ptx::registers_increase<Width::kRegisters>();
    auto chain = Width::template chain<D, Padded, Kept>(p, barriers, shared, group, thread, column);
    const int blocks = Width::kClusters ? ptx::cluster_size() : 1, rank = Width::kClusters ? ptx::cluster_rank() : 0;
    const int first = kSamples * rank + 64 * group + 16 * (thread / 32) + lane / 4;
    consume(chain, p, barriers, shared, unit, first, kSamples * blocks);
  }
  ptx::cluster_sync();  // others may still copy into this block, or release its stages
}

}  // namespace fastscore
