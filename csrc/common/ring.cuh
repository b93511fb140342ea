// Weights and vectors on their way into shared memory: one producer thread copies, consumers wait, read and release.
//
// A network's weights are tiles of at most 128 outputs x 64 inputs, bf16, in the order in which a row's evaluation
// reads them. If all of them fit they are loaded once and stay (resident); otherwise they pass through a ring of
// stages, the same tiles again for every row. Blocks of a cluster read the same tiles at the same time, so each copies
// its share of a stage into all of them.
#pragma once

#include <cuda_runtime.h>
#include <density_mlp.h>

#include <ptx/bulk_copy.cuh>
#include <ptx/cluster.cuh>
#include <ptx/mbarrier.cuh>

namespace fastscore {

// Barriers lie at `barriers_at`: full and empty of every weight stage, then full and empty of every table stage.
struct Barriers {
  uint32_t base;
  int stages, table_stages;

  __device__ __forceinline__ uint32_t full(int i) const { return base + 8 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return base + 8 * (stages + i); }
  __device__ __forceinline__ uint32_t table_full(int i) const { return base + 8 * (2 * stages + i); }
  __device__ __forceinline__ uint32_t table_empty(int i) const { return base + 8 * (2 * stages + table_stages + i); }

  // `readers`: warps of a block that release a weight stage, `table_readers` those that release a row's vectors. `blocks`
  // share the weights.
  __device__ __forceinline__ void initialize(int readers, int table_readers) const {
    initialize(readers, table_readers, ptx::cluster_size());
  }
  __device__ __forceinline__ void initialize(int readers, int table_readers, uint32_t blocks) const {
    for (int i = 0; i < stages; ++i) {
      ptx::mbarrier_init(full(i), 1);
      ptx::mbarrier_init(empty(i), readers * blocks);
    }
    for (int i = 0; i < table_stages; ++i) {
      ptx::mbarrier_init(table_full(i), 1);
      ptx::mbarrier_init(table_empty(i), table_readers);
    }
    ptx::mbarrier_init_fence();
  }
};

// A position in a ring of `size` stages: the phase flips with every turn, unless the content stays.
struct Position {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance(int size, bool turning = true) {
    if (++stage < size) return;
    stage = 0;
    phase ^= turning;
  }
};

// What the producer thread does: rows `first` .. `end` need their vectors, and the weights once, or once each.
__device__ __forceinline__ void produce(const DensityMlp& p, const Barriers& barriers, uint32_t shared, int first,
                                        int end) {
  const bool resident = p.stages >= p.tiles;
  const uint32_t blocks = ptx::cluster_size(), share = p.stage_bytes / blocks, own = ptx::cluster_rank() * share;
  const uint32_t row_bytes = 4 * p.row_stride, table_bytes = (row_bytes + 127) / 128 * 128;
  Position weight, table;
  for (int row = first; row < end; ++row) {
    ptx::mbarrier_wait(barriers.table_empty(table.stage), table.phase ^ 1);
    ptx::mbarrier_expect(barriers.table_full(table.stage), row_bytes);
    ptx::bulk_copy(shared + p.tables_at + table.stage * table_bytes,
                   p.row_table + static_cast<size_t>(row) * p.row_stride, row_bytes, barriers.table_full(table.stage));
    table.advance(p.table_stages);
    if (resident && row > first) continue;
    for (int tile = 0; tile < p.tiles; ++tile) {
      const uint32_t full = barriers.full(weight.stage);
      const uint32_t target = shared + weight.stage * p.stage_bytes + own;
      const uint8_t* source = p.weights + static_cast<size_t>(tile) * p.stage_bytes + own;
      if (!resident) ptx::mbarrier_wait(barriers.empty(weight.stage), weight.phase ^ 1);
      ptx::mbarrier_expect(full, p.stage_bytes);
      if (blocks == 1) {
        ptx::bulk_copy(target, source, share, full);
      } else {
        ptx::bulk_copy_multicast(target, source, share, full, static_cast<uint16_t>((1u << blocks) - 1));
      }
      weight.advance(p.stages);
    }
  }
}

// A consumer's side of the weights' ring.
struct Weights {
  const DensityMlp& p;
  Barriers barriers;
  uint32_t shared;
  Position at;

  __device__ __forceinline__ bool resident() const { return p.stages >= p.tiles; }

  // Wait for the tile at a position; return its address.
  __device__ __forceinline__ uint32_t wait(const Position& tile) const {
    ptx::mbarrier_wait(barriers.full(tile.stage), tile.phase);
    return shared + tile.stage * p.stage_bytes;
  }
  __device__ __forceinline__ uint32_t wait() const { return wait(at); }

  // The position `tiles` ahead, at most one turn of a ring.
  __device__ __forceinline__ Position ahead(int tiles) const {
    const int stage = at.stage + tiles;
    const bool turned = stage >= p.stages;
    return {turned ? stage - p.stages : stage, at.phase ^ turned};
  }

  __device__ __forceinline__ void advance() { at.advance(p.stages, !resident()); }

  // Say that this warp reads the stage no more, to every block that copies into it.
  __device__ __forceinline__ void release(int stage) const {
    if (resident() || threadIdx.x % 32 != 0) return;
    const uint32_t blocks = ptx::cluster_size();
    if (blocks == 1) {
      ptx::mbarrier_arrive(barriers.empty(stage));
    } else {
#pragma unroll 1
      for (uint32_t rank = 0; rank < blocks; ++rank) ptx::mbarrier_arrive_remote(barriers.empty(stage), rank);
    }
  }
};

}  // namespace fastscore
