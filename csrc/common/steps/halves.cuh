// Steps of 64 samples in the registers of one warpgroup where one tile of float32 is all that they hold: 256 columns. A
// residual block's input waits as float16 in shared memory, and noise is made again for the comparison.
//
// A product makes outputs 0 .. 127 first. While those from 128 on are multiplied, what becomes of the first follows, some
// groups of 16 columns behind each 64 inputs, in place, so that it needs no register:
//
//   tensor cores   | outputs 0-127: k0 k1 k2 k3 | outputs 128-255: k0 k1 k2 k3 |            | next product ...
//   threads        | (operand, norm)            | bias, act of columns 0 .. 127 | 128 .. 255 | round to operand
//
// The order inside a step matters to the compiler: the tile is saved, then changed in place, then rounded. Rounded element
// by element while the tile lives, its 64 registers of operands do not fit beside it.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/fragment.cuh>
#include <common/steps/ends.cuh>
#include <common/steps/operands.cuh>
#include <common/steps/products.cuh>
#include <common/steps/record.cuh>

namespace fastscore {

// A ring whose products of 256 outputs go by halves.
struct HalvesProduct : RingProduct<128 * 128, false> {
  using RingProduct::RingProduct;

  // out = a W^T, and f(q) for every group q of 16 of its columns as soon as they are there.
  template <int K, class F>
  __device__ __forceinline__ void by_halves(float (&out)[128], const uint32_t (&a)[K / 4], F&& f) {
    constexpr int kBlocks = (K + 63) / 64, kGroups = 8;  // of 64 inputs; of columns in a half
    uint32_t before = 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < kBlocks; ++k) {
        ptx::mbarrier_wait(full, phase);
        ptx::wgmma_fence();
        if (half == 0) {
          multiply_tile<128, 0, K>(out, a, tiles, k);
        } else {
          multiply_tile<128, 64, K>(out, a, tiles, k);
        }
        ptx::wgmma_commit();
        if (half + k > 0) {
          ptx::wgmma_wait<1>();  // behind the second half's first product the first half is done
          release(before);
        }
        before = full;
        advance();
        if (half == 0) continue;
        if (k == 0) ptx::wgmma_hold_part<0, 64>(out);
#pragma unroll
        for (int q = kGroups * k / kBlocks; q < kGroups * (k + 1) / kBlocks; ++q) f(q);
      }
    }
    ptx::wgmma_wait<0>();
    release(before);
    ptx::wgmma_hold_part<64, 64>(out);
#pragma unroll
    for (int q = kGroups; q < 2 * kGroups; ++q) f(q);
  }
};

// A tile of 256 columns as float16, 32 KB of a warpgroup. A rounding of 2^-11, a quarter of what the next operand loses;
// beyond 65504 a value becomes infinite, which the estimate reports. A thread reads what it wrote itself.
struct HalfTile {
  static constexpr uint32_t kBytes = 64 * 256 * 2;
  uint32_t place;  // the thread's first 16 bytes

  __device__ __forceinline__ void save(const float (&h)[128]) const {
#pragma unroll
    for (int q = 0; q < 16; ++q) {
      uint4 v;
      v.x = ptx::pack_f16(h[element(q, 0, 0)], h[element(q, 0, 1)]);
      v.y = ptx::pack_f16(h[element(q, 0, 2)], h[element(q, 0, 3)]);
      v.z = ptx::pack_f16(h[element(q, 1, 0)], h[element(q, 1, 1)]);
      v.w = ptx::pack_f16(h[element(q, 1, 2)], h[element(q, 1, 3)]);
      ptx::store_shared(place + 2048 * q, v);
    }
  }

  // The thread's four columns of group q in both its rows.
  __device__ __forceinline__ void load(int q, float4 (&rows)[2]) const {
    const uint4 v = ptx::load_shared<uint4>(place + 2048 * q);
    const float2 a = ptx::unpack_f16(v.x), b = ptx::unpack_f16(v.y), c = ptx::unpack_f16(v.z), d = ptx::unpack_f16(v.w);
    rows[0] = make_float4(a.x, a.y, b.x, b.y), rows[1] = make_float4(c.x, c.y, d.x, d.y);
  }
};

template <int D, bool Padded, class Source>
struct HalvesChain {
  static constexpr int H = 256;

  const Steps& p;
  HalvesProduct product;
  Source samples;
  HalfTile saved;
  int column;

  __device__ __forceinline__ bool stores() const { return true; }

  // f of the thread's two rows of the tile.
  __device__ __forceinline__ float2 evaluate(uint32_t address) {
    const Record record{address, static_cast<uint32_t>(4 * column)};
    float h[H / 2];
    {
      uint32_t a[D / 4];
      make_x_t<D>(a, p, samples, record, [](int, int, const float4&) {});
      finished(h, a, p.first, record);
    }
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
      const Step& step = p.step[i];
      if (step.kind != kResidual) {
        dense(h, step, record);
      } else if (step.activation == kSilu) {
        residual<true>(h, step, record);
      } else {
        residual<false>(h, step, record);
      }
    }
    float F[D / 2];
    const float2 rstd = last(F, h, p.last, record);
    return quad_sum(
        compare<D, D>(F, rstd, p, samples, record, [&](int q, int i) { return noise(samples, record, q, i); }));
  }

 private:
  // As in Chain; with SiLU, the activation follows the bias while the other half is multiplied.
  template <bool Silu>
  __device__ __forceinline__ void residual(float (&h)[H / 2], const Step& step, const Record& record) {
    saved.save(h);
    uint32_t a[H / 4];
    const float2 rstd = operand(a, h, step, record);
    const float s0 = step.factor * rstd.x, s1 = step.factor * rstd.y;
    product.template by_halves<H>(h, a, [&](int q) {
      const float4 bias = record.vector(step.at + H, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float &u = h[element(q, 0, i)], &v = h[element(q, 1, i)];
        u = fmaf(u, s0, component(bias, i)), v = fmaf(v, s1, component(bias, i));
        if (Silu) u = fmaf(u, ptx::tanh_approx(u), u), v = fmaf(v, ptx::tanh_approx(v), v);
      }
      pace(q);
    });
    if (!Silu) activate(h, step.activation);
    to_operand(a, h);
    product.template by_halves<H>(h, a, [&](int q) {
      const float4 gate = record.vector(step.at + 2 * H, q), bias = record.vector(step.at + 3 * H, q);
      float4 before[2];
      saved.load(q, before);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int row = 0; row < 2; ++row) {
          float& z = h[element(q, row, i)];
          z = fmaf(z, component(gate, i), component(before[row], i) + component(bias, i));
        }
      }
      pace(q);
    });
  }

  __device__ __forceinline__ void dense(float (&h)[H / 2], const Step& step, const Record& record) {
    uint32_t a[H / 4];
    activate_in_place(h, step);
    to_operand(a, h);
    finished(h, a, step, record);
  }

  // h = factor scale (W a) + shift, of a first or dense step.
  template <int M>
  __device__ __forceinline__ void finished(float (&h)[H / 2], const uint32_t (&a)[M], const Step& step,
                                           const Record& record) {
    if (step.kind == kDenseScaled) {
      product.template by_halves<4 * M>(h, a, [&](int q) {
        affine_columns(h, q, record.vector(step.at, q), record.vector(step.at + H, q));
        pace(q);
      });
      return;
    }
    const float4 scale = make_float4(step.factor, step.factor, step.factor, step.factor);
    product.template by_halves<4 * M>(h, a, [&](int q) {
      affine_columns(h, q, scale, record.vector(step.at, q));
      pace(q);
    });
  }

  __device__ __forceinline__ float2 last(float (&F)[D / 2], float (&h)[H / 2], const Step& step, const Record& record) {
    uint32_t a[H / 4];
    float2 rstd = make_float2(1.0f, 1.0f);
    if (step.width > 0) {
      rstd = normalize_in_place<H, Padded>(h, step, record, column);
    } else if (step.activation >= 0) {
      activate_in_place(h, step);
    }
    to_operand(a, h);
    product.template multiply<D, H>(F, a);
    return rstd;
  }

  __device__ __forceinline__ float2 operand(uint32_t (&a)[H / 4], float (&h)[H / 2], const Step& step,
                                            const Record& record) {
    float2 rstd = make_float2(1.0f, 1.0f);
    if (step.width > 0) {
      rstd = normalize_in_place<H, Padded>(h, step, record, column);
    } else {
      scale_columns<H>(h, record, step.at);
    }
    to_operand(a, h);
    return rstd;
  }
};

}  // namespace fastscore
