// Steps of 64 samples in the registers of one warpgroup: h from the first product to the last, and y, the inner tile of
// a residual block. Both have names of their own, so that no step copies one into the other.
//
// `Product` is how the warpgroup multiplies: multiply<N, K>(out, a) makes out = a W^T of the next K inputs x N outputs,
// and restart() goes back to a row's first weights.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/fragment.cuh>
#include <common/steps/ends.cuh>
#include <common/steps/operands.cuh>
#include <common/steps/record.cuh>

namespace fastscore {

template <int H, int D, bool Padded, class Product, class Source>
struct Chain {
  const Steps& p;
  Product product;
  Source samples;
  int column;  // the first of the thread's four in 16

  __device__ __forceinline__ bool stores() const { return true; }

  // f of the thread's two rows of the tile.
  __device__ __forceinline__ float2 evaluate(uint32_t address) {
    const Record record{address, static_cast<uint32_t>(4 * column)};
    float eps[D / 2], h[H / 2];
    product.restart();
    {
      uint32_t a[D / 4];
      make_x_t<D>(a, p, samples, record, [&](int q, int i, const float4& made) { set(eps, q, i, made); });
      product.template multiply<H, D>(h, a);
    }
    finish(h, p.first, record);
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
      const Step& step = p.step[i];
      if (step.kind == kResidual) {
        residual(h, step, record);
      } else {
        dense(h, step, record);
      }
    }
    float F[D / 2];
    const float2 rstd = last(F, h, p.last, record);
    return quad_sum(compare<D, D>(F, rstd, p, samples, record, [&](int q, int i) { return get(eps, q, i); }));
  }

 private:
  // h = h + gate (W' act(W ((h - mean) scale) rstd + bias)) + gate_bias
  __device__ __forceinline__ void residual(float (&h)[H / 2], const Step& step, const Record& record) {
    uint32_t a[H / 4];
    const float2 rstd = operand(a, h, step, record);
    float y[H / 2];
    product.template multiply<H, H>(y, a);
    const float s0 = step.factor * rstd.x, s1 = step.factor * rstd.y;
#pragma unroll
    for (int q = 0; q < H / 16; ++q) {
      const float4 bias = record.vector(step.at + H, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[element(q, 0, i)] = fmaf(y[element(q, 0, i)], s0, component(bias, i));
        y[element(q, 1, i)] = fmaf(y[element(q, 1, i)], s1, component(bias, i));
      }
    }
    activated(a, y, step.activation);
    product.template multiply<H, H>(y, a);
#pragma unroll
    for (int q = 0; q < H / 16; ++q) {
      const float4 gate = record.vector(step.at + 2 * H, q), bias = record.vector(step.at + 3 * H, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          float& z = h[element(q, row, i)];
          z = fmaf(y[element(q, row, i)], component(gate, i), z + component(bias, i));
        }
      }
    }
  }

  // h = factor scale (W act(before h)) + shift
  __device__ __forceinline__ void dense(float (&h)[H / 2], const Step& step, const Record& record) {
    uint32_t a[H / 4];
    activated_operand(a, h, step);
    product.template multiply<H, H>(h, a);
    finish(h, step, record);
  }

  // What becomes of the product of a first or dense step.
  __device__ __forceinline__ void finish(float (&h)[H / 2], const Step& step, const Record& record) {
    if (step.kind == kDenseScaled) {
#pragma unroll
      for (int q = 0; q < H / 16; ++q) {
        const float4 scale = record.vector(step.at, q), shift = record.vector(step.at + H, q);
        affine_columns(h, q, scale, shift);
      }
      return;
    }
    const float4 scale = make_float4(step.factor, step.factor, step.factor, step.factor);
#pragma unroll
    for (int q = 0; q < H / 16; ++q) affine_columns(h, q, scale, record.vector(step.at, q));
  }

  // F = W a, where a is normalized, activated, or h; return what F has yet to be multiplied by.
  __device__ __forceinline__ float2 last(float (&F)[D / 2], float (&h)[H / 2], const Step& step, const Record& record) {
    uint32_t a[H / 4];
    float2 rstd = make_float2(1.0f, 1.0f);
    if (step.width > 0) {
      rstd = normalized<H, Padded>(a, h, step, record, column);
    } else if (step.activation >= 0) {
      activated_operand(a, h, step);
    } else {
      to_operand(a, h);
    }
    product.template multiply<D, H>(F, a);
    return rstd;
  }

  __device__ __forceinline__ float2 operand(uint32_t (&a)[H / 4], const float (&h)[H / 2], const Step& step,
                                            const Record& record) {
    if (step.width > 0) return normalized<H, Padded>(a, h, step, record, column);
    scaled<H>(a, h, step, record);
    return make_float2(1.0f, 1.0f);
  }

  __device__ __forceinline__ static void activated_operand(uint32_t (&a)[H / 4], float (&h)[H / 2], const Step& step) {
    if (step.before != 1.0f) map(h, [&](float z) { return step.before * z; });
    activated(a, h, step.activation);
  }
};

}  // namespace fastscore
