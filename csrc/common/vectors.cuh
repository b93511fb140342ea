// Vector operands: scales and shifts that a row, a sample or a pair brings along.
#pragma once

#include <cuda_runtime.h>
#include <density_mlp.h>

#include <common/fragment.cuh>
#include <ptx/shared.cuh>

namespace fastscore {

// The tables as one thread sees them for one row of the draws.
struct Vectors {
  const DensityMlp& p;
  uint32_t row_table;  // address in shared memory of the row's vectors
  int row;
  int sample[2];  // of the thread's two rows of the tile

  __device__ __forceinline__ const float* global(int level, int i) const {
    if (level == kPerSample) return p.sample_table + static_cast<size_t>(sample[i]) * p.sample_stride;
    return p.pair_table + (static_cast<size_t>(sample[i]) * p.rows_total + row) * p.pair_stride;
  }

  // Four columns, `column` .. `column` + 3, of an operand that all samples share.
  __device__ __forceinline__ float4 load(Operand operand, int column) const {
    return ptx::load_shared<float4>(row_table + 4 * (operand + column));
  }
};

// Call f(q, w0, w1) for every group q of 16 columns, with the operand's four columns in both of the thread's rows. The
// thread's columns start at `column`.
template <int N, class F>
__device__ __forceinline__ void for_each_group(const Vectors& vectors, Operand operand, int column, F&& f) {
  const int first = (operand & kColumnMask) + column, level = operand >> kLevelShift;
  if (level == kPerRow) {
    const uint32_t address = vectors.row_table + 4 * first;
#pragma unroll
    for (int q = 0; q < N / 16; ++q) {
      const float4 w = ptx::load_shared<float4>(address + 64 * q);
      f(q, w, w);
    }
  } else {
    const float* w0 = vectors.global(level, 0) + first;
    const float* w1 = vectors.global(level, 1) + first;
#pragma unroll
    for (int q = 0; q < N / 16; ++q) {
      f(q, *reinterpret_cast<const float4*>(w0 + 16 * q), *reinterpret_cast<const float4*>(w1 + 16 * q));
      if (q % 2 == 1) asm volatile("" ::: "memory");  // all loads at once would need N / 2 registers more
    }
  }
}

// h = h scale + shift, on N columns from `column` on.
template <int N>
__device__ __forceinline__ void affine(float (&h)[N / 2], Operand scale, Operand shift, const Vectors& vectors,
                                       int column) {
  if (scale >= 0 && shift >= 0 && (scale | shift) >> kLevelShift == kPerRow) {
    // The common case in one pass: vectors that depend on time alone.
    const uint32_t by = vectors.row_table + 4 * (scale + column), plus = vectors.row_table + 4 * (shift + column);
#pragma unroll
    for (int q = 0; q < N / 16; ++q) {
      const float4 w = ptx::load_shared<float4>(by + 64 * q), v = ptx::load_shared<float4>(plus + 64 * q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        for (int row = 0; row < 2; ++row) {
          float& z = h[element(q, row, i)];
          z = fmaf(z, component(w, i), component(v, i));
        }
      }
    }
    return;
  }
  if (scale >= 0) {
    for_each_group<N>(vectors, scale, column, [&](int q, const float4& w0, const float4& w1) {
      update(h, q, w0, w1, [](float z, float w) { return z * w; });
    });
  }
  if (shift >= 0) {
    for_each_group<N>(vectors, shift, column, [&](int q, const float4& w0, const float4& w1) {
      update(h, q, w0, w1, [](float z, float w) { return z + w; });
    });
  }
}

}  // namespace fastscore
