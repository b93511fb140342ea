// Activations in float32, by the hardware's fast functions: their errors (ptx/convert.cuh states them) are at most a
// quarter of the 2^-9 that rounding loses when they become bfloat16 operands.
//
//   silu(x) = h + h tanh h, h = x / 2        mish(x) = x n / (n + 2), n = e^x (e^x + 2)
#pragma once

#include <cuda_runtime.h>
#include <density_mlp.h>

#include <ptx/convert.cuh>

namespace fastscore {

__device__ __forceinline__ float fast_exp(float x) { return ptx::exp2_approx(1.4426950408889634f * x); }

template <int M, class F>
__device__ __forceinline__ void map(float (&h)[M], F&& f) {
#pragma unroll
  for (int i = 0; i < M; ++i) h[i] = f(h[i]);
}

template <int M>
__device__ __forceinline__ void activate(float (&h)[M], int activation) {
  switch (activation) {
    case kSilu:
      return map(h, [](float x) {
        const float y = 0.5f * x;
        return fmaf(y, ptx::tanh_approx(y), y);
      });
    case kGelu:
      return map(h, [](float x) { return 0.5f * x * (1.0f + erff(0.7071067811865476f * x)); });
    case kGeluTanh:
      return map(h, [](float x) {
        const float y = 0.5f * x;
        return fmaf(y, ptx::tanh_approx(x * fmaf(0.035677408136300125f * x, x, 0.7978845608028654f)), y);
      });
    case kRelu:
      return map(h, [](float x) { return ptx::max_nan(x, 0.0f); });
    case kMish:
      return map(h, [](float x) {
        const float e = fast_exp(fminf(x, 20.0f));  // beyond, mish(x) = x in float32
        const float n = e * (e + 2.0f);
        return x * (n * ptx::reciprocal_approx(n + 2.0f));
      });
    case kElu:
      return map(h, [](float x) { return x > 0.0f ? x : fast_exp(x) - 1.0f; });
    case kSelu:
      return map(
          h, [](float x) { return 1.0507009873554805f * (x > 0.0f ? x : 1.6732632423543772f * (fast_exp(x) - 1.0f)); });
    case kTanh:
      return map(h, [](float x) { return ptx::tanh_approx(x); });
    case kSigmoid:
      return map(h, [](float x) { return ptx::reciprocal_approx(1.0f + fast_exp(-x)); });
    default:  // kSoftplus
      return map(h, [](float x) {
        return fmaxf(x, 0.0f) + 0.6931471805599453f * ptx::log2_approx(1.0f + fast_exp(-fabsf(x)));
      });
  }
}

}  // namespace fastscore
