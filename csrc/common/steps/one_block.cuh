// The team of width 512 (wide.cuh): the two warpgroups of a block.
//
// Two barriers of 256 threads a product: one before A is overwritten, which both have read, and one when all of A is
// there, with a proxy fence, since wgmma reads past the ordinary stores. Sums cross at them.
#pragma once

#include <cuda_runtime.h>

#include <common/steps/rings.cuh>
#include <ptx/shared.cuh>

namespace fastscore {

// Sums over a row's columns, of which each warpgroup has half: two buffers of one number a warpgroup and sample. A buffer
// is written again past a barrier that its reader has met.
struct SharedSums {
  static constexpr uint32_t kBytes = 2 * 2 * 64 * 4;

  uint32_t own;  // of the thread's first row; that of the other warpgroup lies 256 bytes before or behind

  __device__ __forceinline__ SharedSums(uint32_t address, int group, int thread)
      : own(address + 256 * group + 4 * (16 * (thread / 32) + thread % 32 / 4)) {}

  __device__ __forceinline__ void put(int buffer, float2 v) const {
    if (threadIdx.x % 4 != 0) return;
    ptx::store_shared(own + 512 * buffer, v.x);
    ptx::store_shared(own + 512 * buffer + 32, v.y);
  }

  // The sum of both, in which their order makes no difference.
  __device__ __forceinline__ float2 get(int buffer, float2 v) const {
    const uint32_t at = (own ^ 256) + 512 * buffer;
    return make_float2(v.x + ptx::load_shared<float>(at), v.y + ptx::load_shared<float>(at + 32));
  }
};

struct OneBlock {
  static constexpr int kOutputs = 32;
  enum Buffer { kMeans = 0, kSquares = 1, kResult = 0 };

  Rings product;
  SharedSums sums;

  __device__ __forceinline__ bool stores() const { return threadIdx.x < 128; }
  __device__ __forceinline__ int first_column() const { return 0; }

  __device__ __forceinline__ void vacate() const { ptx::named_barrier_sync(1, 256); }
  __device__ __forceinline__ void share() const {
    ptx::fence_proxy_async();
    ptx::named_barrier_sync(1, 256);
  }
  __device__ __forceinline__ void share_data() const { share(); }

  __device__ __forceinline__ void put(Buffer buffer, float2 v) const { sums.put(buffer, v); }
  __device__ __forceinline__ float2 get(Buffer buffer, float2 v) const { return sums.get(buffer, v); }

  __device__ __forceinline__ void first(float (&h)[128]) { product.multiply<256, 0, Rings::kFirst>(h); }
  __device__ __forceinline__ void hidden(float (&h)[128]) { product.multiply<256, 2, Rings::kHidden>(h); }
  __device__ __forceinline__ void last(float (&F)[kOutputs / 2]) { product.multiply<kOutputs, 2, Rings::kLast>(F); }

  // Keys and x of the columns that the last product makes: those of x_t.
  template <class Source>
  __device__ __forceinline__ const Source& of_outputs(const Source& samples) const {
    return samples;
  }
};

}  // namespace fastscore
