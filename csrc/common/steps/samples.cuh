// Keys and x of the thread's two samples: in shared memory for all rows of a tile, or fetched again for every row.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/fragment.cuh>
#include <ptx/shared.cuh>

namespace fastscore {

// Bytes of shared memory that hold 64 samples' x, Q and M.
template <int D>
constexpr uint32_t kSampleBytes = 64 * 12 * D;

// In shared memory every thread has a place of its own for each 16 bytes that it reads, and reads what it wrote itself:
// there is nothing to wait for, and neighbouring threads lie 16 bytes apart, so no bank serves two of them at once.
template <int D, bool Kept>
struct Samples {
  const Steps& p;
  uint32_t place;  // the thread's first, of its warpgroup's part
  int column;
  int first;  // sample of the thread's first row of the tile; the second is eight further

  static constexpr bool kKept = Kept;
  static constexpr uint32_t kPlaces = 2048;  // bytes from one piece to the next: 16 for each thread of the warpgroup
  enum Piece { kX, kQ, kM };

  // Turn to the tile in which the thread's first row is of that sample.
  __device__ __forceinline__ void take(int sample) {
    first = sample;
    if constexpr (Kept) {
#pragma unroll
      for (int q = 0; q < D / 16; ++q) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          ptx::store_shared(at(kX, q, i), fetch_x(q, i));
          ptx::store_shared(at(kQ, q, i), fetch_key(0, q, i));
          ptx::store_shared(at(kM, q, i), fetch_key(1, q, i));
        }
      }
    }
  }

  // Four columns of group q of row `i`.
  __device__ __forceinline__ float4 x(int q, int i) const {
    if constexpr (Kept) return ptx::load_shared<float4>(at(kX, q, i));
    return fetch_x(q, i);
  }
  __device__ __forceinline__ uint4 key(int which, int q, int i) const {
    if constexpr (Kept) return ptx::load_shared<uint4>(at(which == 0 ? kQ : kM, q, i));
    return fetch_key(which, q, i);
  }

 private:
  __device__ __forceinline__ uint32_t at(Piece piece, int q, int i) const {
    return place + kPlaces * (2 * (D / 16 * piece + q) + i);
  }
  __device__ __forceinline__ float4 fetch_x(int q, int i) const {
    return __ldg(reinterpret_cast<const float4*>(p.x + sample(i) * D + here(q)));
  }
  __device__ __forceinline__ uint4 fetch_key(int which, int q, int i) const {
    const size_t line = 2 * sample(i) + which;
    return __ldg(reinterpret_cast<const uint4*>(p.keys + line * D + here(q)));
  }
  __device__ __forceinline__ size_t sample(int i) const { return min(first + 8 * i, p.batch - 1); }  // or the last
  __device__ __forceinline__ int here(int q) const {
    int found = column + 16 * q;
    asm volatile("" : "+r"(found));  // or what no row changes would wait in registers from row to row
    return found;
  }
};

}  // namespace fastscore
