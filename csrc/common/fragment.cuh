// Who owns what of a tile of rows: the register layout that matrix products leave behind and take in.
//
// A warp owns 16 rows. Its lane 4 g + t holds rows g and g + 8, and of every group q of 16 columns the four columns
// 16 q + 4 t .. 16 q + 4 t + 3. The accumulator of a product (wgmma or mma.sync) and the operand of the next have this
// layout, up to an order of columns within groups of 16, which the host applies to the weights (csrc/README.md). So a
// row stays in its four lanes through all layers, and every vector of x, noise or tables is one 16-byte load.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <ptx/convert.cuh>

namespace fastscore {

// Index of row g + 8 `row`, column 16 q + 4 t + i, in a lane's accumulators.
__device__ constexpr int element(int q, int row, int i) { return 8 * q + (i >> 1) * 4 + row * 2 + (i & 1); }

__device__ __forceinline__ float component(const float4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

__device__ __forceinline__ float4 product(const float4& v, const float4& w) {
  return make_float4(v.x * w.x, v.y * w.y, v.z * w.z, v.w * w.w);
}

__device__ __forceinline__ float4 sum(const float4& v, const float4& w) {
  return make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
}

__device__ __forceinline__ float squared_distance(const float4& v, const float4& w) {
  const float x = v.x - w.x, y = v.y - w.y, z = v.z - w.z, u = v.w - w.w;
  return fmaf(x, x, fmaf(y, y, fmaf(z, z, u * u)));
}

// Replace every element of group q by f(element, component of w0 or w1 in its column).
template <int M, class F>
__device__ __forceinline__ void update(float (&h)[M], int q, const float4& w0, const float4& w1, F&& f) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    h[element(q, 0, i)] = f(h[element(q, 0, i)], component(w0, i));
    h[element(q, 1, i)] = f(h[element(q, 1, i)], component(w1, i));
  }
}

// Four columns of one row of group q.
template <int M>
__device__ __forceinline__ float4 get(const float (&h)[M], int q, int row) {
  return make_float4(h[element(q, row, 0)], h[element(q, row, 1)], h[element(q, row, 2)], h[element(q, row, 3)]);
}

// Round accumulators to the operand of the next product: two neighbouring columns a register.
template <int M>
__device__ __forceinline__ void to_operand(uint32_t (&a)[M / 2], const float (&h)[M]) {
#pragma unroll
  for (int j = 0; j < M / 2; ++j) a[j] = ptx::pack_bf16(h[2 * j], h[2 * j + 1]);
}

// The sum over the four lanes of a row.
__device__ __forceinline__ float2 quad_sum(float2 v) {
#pragma unroll
  for (int lane = 1; lane < 4; lane <<= 1) {
    v.x += __shfl_xor_sync(0xffffffffu, v.x, lane);
    v.y += __shfl_xor_sync(0xffffffffu, v.y, lane);
  }
  return v;
}

}  // namespace fastscore
