// Fill only: what L2 and the copy engines deliver to a ring. The producer and the ring are those of the kernels that
// interpret instructions (csrc/common/ring.cuh); consumers wait for a stage, read four bytes a thread and give it back.
//
//   sums[block][t] = the sum over rows and tiles of word t % 128 of a tile, modulo 2^32
//
// The words are read so that the numbers can be checked: one load of 512 an instruction, beside the 16 KB of a stage.
#include <cuda_runtime.h>
#include <density_mlp.h>

#include <common/consumer.cuh>
#include <common/ring.cuh>

#include "launch.cuh"
#include "span.cuh"

namespace fastscore {

constexpr int kReaders = 2;  // warpgroups

// p.f holds the sums: its bits are those of whole numbers.
__device__ __forceinline__ void drain(const DensityMlp& p, const Barriers& barriers, uint32_t shared, int first,
                                      int end) {
  Weights weights{p, barriers, shared, {}};
  const uint32_t mine = 4 * (threadIdx.x % 128);
  Position table;
  uint32_t sum = 0;
#pragma unroll 1
  for (int row = first; row < end; ++row) {
    ptx::mbarrier_wait(barriers.table_full(table.stage), table.phase);
#pragma unroll 1
    for (int tile = 0; tile < p.tiles; ++tile) {
      const int stage = weights.at.stage;
      sum += ptx::load_shared<uint32_t>(weights.wait() + mine);
      __syncwarp();
      weights.release(stage);
      weights.advance();
    }
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barriers.table_empty(table.stage));
    table.advance(p.table_stages);
  }
  reinterpret_cast<uint32_t*>(p.f)[blockIdx.x * 128 * kReaders + threadIdx.x] = sum;
}

__global__ void __launch_bounds__(128 * (kReaders + 1), 1)
    fill_kernel(const __grid_constant__ DensityMlp p, Span* spans) {
#if FASTSCORE_HAS_WGMMA
  const Span start = now();
  run_block<drain, kReaders, 240>(p);
  if (threadIdx.x == 0) write_since(start, spans + blockIdx.x);
#endif
}

}  // namespace fastscore

// pointers: weights, row vectors, sums, spans. sizes: tiles a row, stages of the ring, bytes of a stage, rows, floats of a
// row's vectors, rows whose vectors are in shared memory at once, blocks of a cluster. `blocks` in all, or 0: as many as
// run at once, which it is set to.
extern "C" const char* micro_fill(const uint64_t* pointers, const int32_t* sizes, int32_t* blocks, uint64_t stream) {
  using namespace fastscore;
  return guarded([&] {
    DensityMlp p = {};
    p.weights = pointer<const uint8_t>(pointers[0]);
    p.row_table = pointer<const float>(pointers[1]);
    p.f = pointer<float>(pointers[2]);
    p.tiles = sizes[0], p.stages = sizes[1], p.stage_bytes = sizes[2];
    p.rows_total = p.rows_per_block = sizes[3];
    p.row_stride = sizes[4], p.table_stages = sizes[5];
    p.tables_at = p.stages * p.stage_bytes;
    p.barriers_at = p.tables_at + p.table_stages * ((4 * p.row_stride + 127) / 128 * 128);
    Plan plan = {};
    plan.wgmma = true, plan.threads = 128 * (kReaders + 1), plan.cluster = sizes[6];
    plan.shared_bytes = p.barriers_at + 16 * (p.stages + p.table_stages);
    *blocks =
        launch_micro("fill", fill_kernel, plan, *blocks, pointer<CUstream_st>(stream), p, pointer<Span>(pointers[3]));
  });
}
