// The operands of a step's products: normalized or activated tiles, rounded to bfloat16.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/activations.cuh>
#include <common/fragment.cuh>
#include <common/steps/record.cuh>

namespace fastscore {

// Every second group of columns waits for the loads before it: all vectors at once would need registers that are taken.
__device__ __forceinline__ void pace(int q) {
  if (q % 2 == 1) asm volatile("" ::: "memory");
}

template <int M>
__device__ __forceinline__ void set(float (&h)[M], int q, int row, const float4& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i) h[element(q, row, i)] = component(v, i);
}

// Group q of h scale + shift.
template <int M>
__device__ __forceinline__ void affine_columns(float (&h)[M], int q, const float4& scale, const float4& shift) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float& z = h[element(q, row, i)];
      z = fmaf(z, component(scale, i), component(shift, i));
    }
  }
}

// A sum over the columns of the thread's two rows, in four parts each: a single one would be a chain of H / 4 additions
// that wait for each other, since float sums are not reassociated.
struct RowSums {
  float part[2][4] = {};

  __device__ __forceinline__ float2 total() const {
    return quad_sum(make_float2((part[0][0] + part[0][1]) + (part[0][2] + part[0][3]),
                                (part[1][0] + part[1][1]) + (part[1][2] + part[1][3])));
  }
};

// Padding is zero in every tile: its weights are, and so are its shifts and gates.
template <int H>
__device__ __forceinline__ float2 row_means(const float (&h)[H / 2], float inverse) {
  RowSums sums;
#pragma unroll
  for (int q = 0; q < H / 16; ++q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums.part[0][i] += h[element(q, 0, i)];
      sums.part[1][i] += h[element(q, 1, i)];
    }
  }
  const float2 sum = sums.total();
  return make_float2(inverse * sum.x, inverse * sum.y);
}

// Four columns of group q without their row's mean, whose squares are added up. Columns from `inside` on, counted from
// the thread's first, are padding.
template <bool Padded, int M>
__device__ __forceinline__ float4 centred(const float (&h)[M], int q, int row, float mean, int inside,
                                          RowSums& squares) {
  float z[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    z[i] = !Padded || 16 * q + i < inside ? h[element(q, row, i)] - mean : 0.0f;
    squares.part[row][i] = fmaf(z[i], z[i], squares.part[row][i]);
  }
  return make_float4(z[0], z[1], z[2], z[3]);
}

__device__ __forceinline__ float2 inverse_deviation(const float2& squares, const Step& step) {
  return make_float2(ptx::rsqrt_approx(fmaf(squares.x, step.inverse, step.epsilon)),
                     ptx::rsqrt_approx(fmaf(squares.y, step.inverse, step.epsilon)));
}

// Call f(q, row, (h - mean) scale) for every group q of 16 columns and both rows; return 1 / sqrt(var + epsilon), by which
// the product of those has yet to be multiplied. Variances in a second pass, because squares cancel.
template <int H, bool Padded, class F>
__device__ __forceinline__ float2 for_each_normalized(const float (&h)[H / 2], const Step& step, const Record& record,
                                                      int column, F&& f) {
  const float2 mean = row_means<H>(h, step.inverse);
  RowSums squares;
#pragma unroll
  for (int q = 0; q < H / 16; ++q) {
    const float4 scale = record.vector(step.at, q);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const float4 z = centred<Padded>(h, q, row, row == 0 ? mean.x : mean.y, step.width - column, squares);
      f(q, row, product(z, scale));
    }
  }
  return inverse_deviation(squares.total(), step);
}

// Four columns of group q and one row of an operand.
template <int M>
__device__ __forceinline__ void round_to(uint32_t (&a)[M], int q, int row, const float4& z) {
  a[4 * q + row] = ptx::pack_bf16(z.x, z.y);
  a[4 * q + 2 + row] = ptx::pack_bf16(z.z, z.w);
}

// a = (h - mean) scale.
template <int H, bool Padded>
__device__ __forceinline__ float2 normalized(uint32_t (&a)[H / 4], const float (&h)[H / 2], const Step& step,
                                             const Record& record, int column) {
  return for_each_normalized<H, Padded>(h, step, record, column,
                                        [&](int q, int row, const float4& z) { round_to(a, q, row, z); });
}

// The same in place: h = (h - mean) scale.
template <int H, bool Padded>
__device__ __forceinline__ float2 normalize_in_place(float (&h)[H / 2], const Step& step, const Record& record,
                                                     int column) {
  return for_each_normalized<H, Padded>(h, step, record, column, [&](int q, int row, const float4& z) {
    set(h, q, row, z);
    if (row == 1) pace(q);
  });
}

// a = h scale.
template <int H>
__device__ __forceinline__ void scaled(uint32_t (&a)[H / 4], const float (&h)[H / 2], const Step& step,
                                       const Record& record) {
#pragma unroll
  for (int q = 0; q < H / 16; ++q) {
    const float4 w = record.vector(step.at, q);
#pragma unroll
    for (int row = 0; row < 2; ++row) round_to(a, q, row, product(get(h, q, row), w));
  }
}

// a = act(z), of half the input where that is SiLU.
template <int M>
__device__ __forceinline__ void activated(uint32_t (&a)[M / 2], float (&z)[M], int32_t activation) {
  if (activation == kSilu) {
#pragma unroll
    for (int j = 0; j < M / 2; ++j) {
      const float u = z[2 * j], v = z[2 * j + 1];
      a[j] = ptx::pack_bf16(fmaf(u, ptx::tanh_approx(u), u), fmaf(v, ptx::tanh_approx(v), v));
    }
    return;
  }
  activate(z, activation);
  to_operand(a, z);
}

// The same in place, of a step's multiple of h.
template <int M>
__device__ __forceinline__ void activate_in_place(float (&h)[M], const Step& step) {
  if (step.before != 1.0f) map(h, [&](float z) { return step.before * z; });
  if (step.activation == kSilu) {
    map(h, [](float z) { return fmaf(z, ptx::tanh_approx(z), z); });
  } else {
    activate(h, step.activation);
  }
}

}  // namespace fastscore
