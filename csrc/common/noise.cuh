// The noise of fastscore/ops/noise.py: two integer operations and one polynomial an element.
//
//   w = (P xor Q) M mod 2^32,   u = 2^-31 w + 2^-32,   eps = sqrt(2) erfinv(u)
//
// Words and u are those of the definition, bit for bit: the product is exact and the sum rounds once. The inverse error
// function is u p(s), s = sqrt(3 - log2(1 - u^2)) - 3.42: the polynomial of kernels/inverse_normal.py, whose numbers a
// test compares with these.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <ptx/convert.cuh>

namespace fastscore {

// Map a word to a standard normal times a sign, 1 or -1; |eps| <= 5.42. No select and no branch, so that the chains of
// neighbouring elements run side by side; the sign costs nothing, since u takes it in its own multiplication.
__device__ __forceinline__ float normal(uint32_t word, float sign) {
  const float u = fmaf(static_cast<float>(static_cast<int32_t>(word)), sign * 4.656612873077393e-10f,
                       sign * 2.3283064365386963e-10f);
  const float v = fminf(fabsf(u), 0.9999999403953552f);
  const float s = ptx::sqrt_approx(3.0f - ptx::log2_approx(fmaf(-v, v, 1.0f))) - 3.42f;
  float p = fmaf(-1.8050934158964083e-05f, s, 1.7053394913091324e-05f);
  p = fmaf(p, s, 0.0002181880408897996f);
  p = fmaf(p, s, -0.00032979456591419876f);
  p = fmaf(p, s, -0.0009374394430778921f);
  p = fmaf(p, s, 0.002649214817211032f);
  p = fmaf(p, s, -0.0002266207739012316f);
  p = fmaf(p, s, -0.009487875737249851f);
  p = fmaf(p, s, 0.022167488932609558f);
  p = fmaf(p, s, -0.022754047065973282f);
  p = fmaf(p, s, -0.015202531591057777f);
  p = fmaf(p, s, 1.336690902709961f);
  p = fmaf(p, s, 3.2413618564605713f);
  return p * u;
}

// Four neighbouring dimensions, `column` .. `column` + 3, of a sample and a row. Beyond the data P, Q and M are zero
// (the host pads them so), which makes word 0 and eps = 3e-10: its square is below half a unit of any sum, and every
// weight and vector that it meets there is zero. A comparison an element would cost more than that.
template <int D>
__device__ __forceinline__ float4 make_eps(const uint32_t* keys, const uint32_t* points, size_t sample, size_t row,
                                           int column, float sign) {
  const uint4 p = __ldg(reinterpret_cast<const uint4*>(points + row * D + column));
  const uint4 q = __ldg(reinterpret_cast<const uint4*>(keys + sample * 2 * D + column));
  const uint4 m = __ldg(reinterpret_cast<const uint4*>(keys + sample * 2 * D + D + column));
  return make_float4(normal((p.x ^ q.x) * m.x, sign), normal((p.y ^ q.y) * m.y, sign), normal((p.z ^ q.z) * m.z, sign),
                     normal((p.w ^ q.w) * m.w, sign));
}

}  // namespace fastscore
