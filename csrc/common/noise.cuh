// The noise of fastscore/ops/noise.py: two integer operations and one polynomial an element.
//
//   w = (P xor Q) M mod 2^32,   u = 2^-31 w + 2^-32,   eps = sqrt(2) erfinv(u)
//
// Words and u are those of the definition, bit for bit: the product is exact and the sum rounds once. The inverse error
// function is u times a polynomial in t = -log2(1 - u^2), in two pieces (Giles, 2012,
// https://doi.org/10.1016/B978-0-12-385963-1.00010-1), with the coefficients of kernels/noise.py.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <ptx/convert.cuh>

namespace fastscore {

// Map a word to a standard normal; |eps| <= 5.42.
__device__ __forceinline__ float normal(uint32_t word) {
  float u = fmaf(static_cast<float>(static_cast<int32_t>(word)), 4.656612873077393e-10f, 2.3283064365386963e-10f);
  u = fminf(fmaxf(u, -0.9999999403953552f), 0.9999999403953552f);
  const float t = -ptx::log2_approx((1.0f - u) * (1.0f + u));
  const bool centre = t < 7.2135f;
  const float s = centre ? t - 3.60675f : ptx::sqrt_approx(t) - 3.766737914409238f;
  float p = centre ? 2.1502259972550064e-09f : 0.0f;
  p = fmaf(p, s, centre ? 3.7368700134265964e-08f : 0.0f);
  p = fmaf(p, s, centre ? -5.53476070308534e-07f : 0.0004819671739824116f);
  p = fmaf(p, s, centre ? -9.949335435521789e-07f : -0.0015382996061816812f);
  p = fmaf(p, s, centre ? 7.136264321161434e-05f : 0.002566224429756403f);
  p = fmaf(p, s, centre ? -0.0005904525751248002f : -0.0041214944794774055f);
  p = fmaf(p, s, centre ? -0.002838620450347662f : 0.006720526143908501f);
  p = fmaf(p, s, centre ? 0.24177150428295135f : 1.1819604635238647f);
  p = fmaf(p, s, centre ? 2.123316526412964f : 4.199333667755127f);
  return p * u;
}

// Four neighbouring dimensions, `column` .. `column` + 3, of a sample and a row; nothing beyond the data.
template <int D>
__device__ __forceinline__ float4 make_eps(const uint32_t* keys, const uint32_t* points, size_t sample, size_t row,
                                           int column, int dimensions, float sign) {
  const uint4 p = __ldg(reinterpret_cast<const uint4*>(points + row * D + column));
  const uint4 q = __ldg(reinterpret_cast<const uint4*>(keys + sample * 2 * D + column));
  const uint4 m = __ldg(reinterpret_cast<const uint4*>(keys + sample * 2 * D + D + column));
  const int inside = dimensions - column;
  return make_float4(
      inside > 0 ? sign * normal((p.x ^ q.x) * m.x) : 0.0f, inside > 1 ? sign * normal((p.y ^ q.y) * m.y) : 0.0f,
      inside > 2 ? sign * normal((p.z ^ q.z) * m.z) : 0.0f, inside > 3 ? sign * normal((p.w ^ q.w) * m.w) : 0.0f);
}

}  // namespace fastscore
