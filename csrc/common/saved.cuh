// Where a saved tile waits for the sum that reads it: in registers while they last, else in shared memory.
#pragma once

#include <cuda_runtime.h>

#include <common/fragment.cuh>
#include <ptx/shared.cuh>

namespace fastscore {

// One or two tiles of N columns in registers.
template <int N, int Slots>
struct SavedInRegisters {
  float tile[Slots][N / 2];

  __device__ __forceinline__ void save(int slot, const float (&h)[N / 2]) {
#pragma unroll
    for (int s = 0; s < Slots; ++s) {
      if (Slots > 1 && s != slot) continue;
#pragma unroll
      for (int i = 0; i < N / 2; ++i) tile[s][i] = h[i];
    }
  }

  // Four columns of group q of the thread's row `row`.
  __device__ __forceinline__ float4 load(int slot, int q, int row) const {
    const float4 one = get(tile[0], q, row), other = get(tile[Slots - 1], q, row);
    return slot == 0 ? one : other;
  }
};

// One tile of N columns in shared memory, 256 N bytes a warpgroup. A thread reads what it wrote itself: no barrier, and
// neighbouring threads lie 16 bytes apart, so no bank conflict.
template <int N>
struct SavedInShared {
  uint32_t address;  // this thread's first 16 bytes

  __device__ __forceinline__ void save(int, const float (&h)[N / 2]) {
#pragma unroll
    for (int q = 0; q < N / 16; ++q) {
      ptx::store_shared(address + 4096 * q, get(h, q, 0));
      ptx::store_shared(address + 4096 * q + 2048, get(h, q, 1));
    }
  }

  __device__ __forceinline__ float4 load(int, int q, int row) const {
    return ptx::load_shared<float4>(address + 4096 * q + 2048 * row);
  }
};

}  // namespace fastscore
