// Where a saved tile waits for the sum that reads it: in registers while they last, in fewer registers, or in shared
// memory.
#pragma once

#include <cuda_runtime.h>

#include <common/fragment.cuh>
#include <ptx/convert.cuh>
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
      for (int i = 0; i < N / 2; ++i) tile[s][i] = ptx::copied(h[i]);
    }
  }

  // Four columns of group q of the thread's row `row`.
  __device__ __forceinline__ float4 load(int slot, int q, int row) const {
    const float4 one = get(tile[0], q, row), other = get(tile[Slots - 1], q, row);
    return slot == 0 ? one : other;
  }
};

// One tile of N columns as float16, the first 16 Kept of them in registers, 2 (N - 16 Kept) bytes a sample in shared
// memory. A rounding of 2^-11, a quarter of what the next operand loses; beyond 65504 a value becomes infinite, which
// the estimate reports.
template <int N, int Kept>
struct SavedAsHalf {
  uint32_t address;  // this thread's first 16 bytes
  uint32_t tile[4 * Kept];

  __device__ __forceinline__ void save(int, const float (&h)[N / 2]) {
#pragma unroll
    for (int q = 0; q < N / 16; ++q) {
      uint4 v;
      v.x = ptx::pack_f16(h[element(q, 0, 0)], h[element(q, 0, 1)]);
      v.y = ptx::pack_f16(h[element(q, 0, 2)], h[element(q, 0, 3)]);
      v.z = ptx::pack_f16(h[element(q, 1, 0)], h[element(q, 1, 1)]);
      v.w = ptx::pack_f16(h[element(q, 1, 2)], h[element(q, 1, 3)]);
      if (q < Kept) {
        tile[4 * q] = v.x, tile[4 * q + 1] = v.y, tile[4 * q + 2] = v.z, tile[4 * q + 3] = v.w;
      } else {
        ptx::store_shared(address + 2048 * (q - Kept), v);
      }
    }
  }

  __device__ __forceinline__ float4 load(int, int q, int row) const {
    uint2 v;
    if (q < Kept) {
      v.x = tile[4 * q + 2 * row], v.y = tile[4 * q + 2 * row + 1];
    } else {
      v = ptx::load_shared<uint2>(address + 2048 * (q - Kept) + 8 * row);
    }
    const float2 lo = ptx::unpack_f16(v.x), hi = ptx::unpack_f16(v.y);
    return make_float4(lo.x, lo.y, hi.x, hi.y);
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
