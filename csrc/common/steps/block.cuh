// What a block does with its units: one warpgroup copies weights and records; the others wait for a record, evaluate,
// give it back, store.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/ring.cuh>
#include <common/steps/record.cuh>
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

// The producer thread where weights stay: all of them at one barrier, then record after record.
template <uint32_t StageBytes>
__device__ __forceinline__ void produce_resident(const Steps& p, const Barriers& barriers, uint32_t shared, Unit unit) {
  ptx::mbarrier_expect(barriers.full(0), p.tiles * StageBytes);
  for (int tile = 0; tile < p.tiles; ++tile) {
    ptx::bulk_copy(shared + tile * StageBytes, p.weights + static_cast<size_t>(tile) * StageBytes, StageBytes,
                   barriers.full(0));
  }
  Position record;
  for (; unit.left > 0; unit.advance(p)) copy_record(p, barriers, shared, unit.row, record);
}

// Write f of the thread's two rows of the tile, whose samples are `sample` and `sample` + 8: one lane of the four does.
__device__ __forceinline__ void store(const Steps& p, int sample, int row, float2 f) {
  if (threadIdx.x % 4 != 0) return;
  if (sample < p.batch) p.f[static_cast<size_t>(sample) * p.rows + row] = f.x;
  if (sample + 8 < p.batch) p.f[static_cast<size_t>(sample + 8) * p.rows + row] = f.y;
}

// A consumer warp's side. `first` is the sample of the thread's first row in tile 0, `samples` those of a tile.
template <class Chain>
__device__ __forceinline__ void consume(Chain& chain, const Steps& p, const Barriers& barriers, uint32_t shared,
                                        Unit unit, int first, int samples) {
  Position at;
  bool turned = true;
  for (; unit.left > 0; turned = unit.advance(p)) {
    const int sample = first + unit.tile * samples;
    if (turned) chain.samples.take(sample);
    ptx::mbarrier_wait(barriers.table_full(at.stage), at.phase);
    const float2 f = chain.evaluate(
        Record{shared + p.records_at + at.stage * record_bytes(p), static_cast<uint32_t>(4 * chain.column)});
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barriers.table_empty(at.stage));
    at.advance(p.record_stages);
    store(p, sample, unit.row, f);
  }
}

}  // namespace fastscore
