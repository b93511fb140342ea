// The two ends of a row's evaluation: noise and x_t, and the comparison of the prediction with them.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/fragment.cuh>
#include <common/noise.cuh>
#include <common/steps/operands.cuh>
#include <common/steps/record.cuh>

namespace fastscore {

// The noise of four columns of group q and one row, without the sign of the draw. Dimensions beyond the data have zero
// words: their noise is 3e-10, whose square no sum notices, and their weights, x and vectors are zero.
template <class Source>
__device__ __forceinline__ float4 noise(const Source& samples, const Record& record, int q, int i) {
  const uint4 p = record.points(q), k = samples.key(0, q, i), m = samples.key(1, q, i);
  return make_float4(normal((p.x ^ k.x) * m.x, 1.0f), normal((p.y ^ k.y) * m.y, 1.0f), normal((p.z ^ k.z) * m.z, 1.0f),
                     normal((p.w ^ k.w) * m.w, 1.0f));
}

__device__ __forceinline__ float4 combine(float s, const float4& v, float t, const float4& w) {
  return make_float4(fmaf(s, v.x, t * w.x), fmaf(s, v.y, t * w.y), fmaf(s, v.z, t * w.z), fmaf(s, v.w, t * w.w));
}

template <int D>
__device__ __forceinline__ void scale_columns(float (&h)[D / 2], const Record& record, int at) {
#pragma unroll
  for (int q = 0; q < D / 16; ++q) {
    const float4 w = record.vector(at, q);
    update(h, q, w, w, [](float z, float v) { return z * v; });
    if (D > 64) pace(q);
  }
}

// The operand of the first product; keep(q, i, eps) gets the noise on its way.
template <int D, class Source, class Keep>
__device__ __forceinline__ void make_x_t(uint32_t (&a)[D / 4], const Steps& p, const Source& samples,
                                         const Record& record, Keep&& keep) {
  const Coefficients row = record.coefficients();
  float x_t[D / 2];
#pragma unroll
  for (int q = 0; q < D / 16; ++q) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 eps = noise(samples, record, q, i);
      keep(q, i, eps);
      set(x_t, q, i, combine(row.alpha, samples.x(q, i), row.sigma, eps));
    }
    // From device memory all loads at once would need more registers than there are.
    if (!Source::kKept && q % 2 == 1) asm volatile("" ::: "memory");
  }
  if (p.pre_scale >= 0) scale_columns<D>(x_t, record, p.pre_scale);
  to_operand(a, x_t);
}

// F scale + skip x_t instead of rstd F. Few networks have either: one branch a row for those that have not. `eps(q, i)`
// is the noise, kept or made again.
template <int D, class Source, class Eps>
__device__ __forceinline__ void apply_post(float (&F)[D / 2], float2& rstd, const Steps& p, const Source& samples,
                                           const Record& record, Eps&& eps) {
  if (p.post_scale >= 0) scale_columns<D>(F, record, p.post_scale);
  if (p.skip < 0) return;
  const Coefficients row = record.coefficients();
#pragma unroll
  for (int q = 0; q < D / 16; ++q) {
    const float4 skip = record.vector(p.skip, q);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 x_t = combine(row.alpha, samples.x(q, i), row.sigma, eps(q, i));
      const float r = i == 0 ? rstd.x : rstd.y;
      set(F, q, i, combine(r, get(F, q, i), 1.0f, product(skip, x_t)));
    }
  }
  rstd = make_float2(1.0f, 1.0f);
}

// The thread's share of c^2 ||a eps + b x - rstd F - post||^2 - ||keep eps - pull x + offset||^2 in both its rows.
// Vectors have `Stride` columns, of which the thread's warpgroup has D.
template <int D, int Stride, class Source, class Eps>
__device__ __forceinline__ float2 compare(float (&F)[D / 2], float2 rstd, const Steps& p, const Source& samples,
                                          const Record& record, Eps&& eps) {
  if (p.post_scale >= 0 || p.skip >= 0) apply_post<D>(F, rstd, p, samples, record, eps);
  const Coefficients row = record.coefficients();
  float error[2] = {0.0f, 0.0f}, control[2] = {0.0f, 0.0f};
#pragma unroll
  for (int q = 0; q < D / 16; ++q) {
    const float4 post = record.vector(p.compare_at, q), keep = record.vector(p.compare_at + Stride, q);
    const float4 pull = record.vector(p.compare_at + 2 * Stride, q),
                 offset = record.vector(p.compare_at + 3 * Stride, q);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 x = samples.x(q, i), made = eps(q, i);
      const float r = i == 0 ? rstd.x : rstd.y;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float target = fmaf(row.b, component(x, j), fmaf(row.a, component(made, j), -component(post, j)));
        const float e = fmaf(-r, F[element(q, i, j)], target);
        const float pulled = fmaf(-component(pull, j), component(x, j), component(offset, j));
        const float c = fmaf(component(keep, j), component(made, j), pulled);
        error[i] = fmaf(e, e, error[i]);
        control[i] = fmaf(c, c, control[i]);
      }
    }
  }
  const float weight = record.weight();
  return make_float2(fmaf(weight, error[0], -control[0]), fmaf(weight, error[1], -control[1]));
}

}  // namespace fastscore
