// What a block of Hopper does with its rows: one warpgroup copies; the others wait for a row's vectors, evaluate, give
// them back, store.
#pragma once

#include <cuda_runtime.h>
#include <density_mlp.h>

#include <common/ring.cuh>
#include <common/row_machine.cuh>
#include <ptx/registers.cuh>

namespace fastscore {

// `sample` is that of the thread's first row of the tile, its second eight further; `D` the stride of a row of x. Of
// warpgroups that share their samples one stores.
template <int D, class Engine>
__device__ __forceinline__ void consume_rows(Engine& engine, const DensityMlp& p, const Barriers& barriers,
                                             uint32_t shared, int first, int end, int sample, bool stores) {
  Vectors vectors{p, 0, 0, {min(sample, p.batch - 1), min(sample + 8, p.batch - 1)}};
  const uint32_t table_bytes = (4 * p.row_stride + 127) / 128 * 128;
  Position table;
#pragma unroll 1
  for (int row = first; row < end; ++row) {
    ptx::mbarrier_wait(barriers.table_full(table.stage), table.phase);
    vectors.row_table = shared + p.tables_at + table.stage * table_bytes;
    vectors.row = row;
    const float2 f = engine.row_sum(evaluate_row<D>(engine, vectors));
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barriers.table_empty(table.stage));
    table.advance(p.table_stages);
    if (stores) store(p, sample, row, f);
  }
}

// `Consume` is what each of `Consumers` warpgroups does, with so many registers a thread; the last one copies.
template <auto Consume, int Consumers, int Registers>
__device__ __forceinline__ void run_block(const DensityMlp& p) {
  const uint32_t shared = ptx::shared_address(ptx::shared_memory());
  const Barriers barriers{shared + p.barriers_at, p.stages, p.table_stages};
  if (threadIdx.x == 0) barriers.initialize(4 * Consumers, 4 * Consumers);
  ptx::cluster_sync();
  const int first = blockIdx.y * p.rows_per_block, end = min(first + p.rows_per_block, p.rows_total);
  if (threadIdx.x / 128 == Consumers) {
    ptx::registers_decrease<24>();
    if (threadIdx.x % 128 == 0) produce(p, barriers, shared, first, end);
  } else {
    ptx::registers_increase<Registers>();
    Consume(p, barriers, shared, first, end);
  }
  ptx::cluster_sync();  // others may still copy into this block, or release its stages
}

}  // namespace fastscore
