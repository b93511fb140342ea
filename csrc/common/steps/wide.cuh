// Steps of width 512: two warpgroups share 64 samples, each with half of the columns in its registers, and operands pass
// through shared memory.
//
//   warpgroup 0: columns 0 .. 255      shared memory                      warpgroup 1: columns 256 .. 511
//   h [64, 256] float32                A [64, 512] bfloat16, 64 KB        the same
//   a residual block's input, float16  a ring of 4 x 16 KB each
//
// Two barriers of 256 threads a product: one before A is overwritten, which both have read, and one when all of A is
// there, with a proxy fence, since wgmma reads past the ordinary stores. Where a norm comes before, its sums cross at the
// first and its squares at the second, for rstd is needed behind the product alone.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/fragment.cuh>
#include <common/steps/ends.cuh>
#include <common/steps/operands.cuh>
#include <common/steps/record.cuh>
#include <common/steps/rings.cuh>
#include <ptx/stmatrix.cuh>

namespace fastscore {

// The operand that both warpgroups write and read: blocks of 64 columns, lines of 128 bytes with the 128-byte swizzle.
struct SharedOperand {
  static constexpr uint32_t kBlockBytes = 64 * 128, kBytes = 8 * kBlockBytes;

  uint32_t line;     // of the row that the lane gives to stmatrix: lane l has row l % 8 + 8 (l / 8 % 2)
  uint32_t swizzle;  // of that row and of the lane's half of 16 columns

  __device__ __forceinline__ SharedOperand(uint32_t address, int thread) {
    const int lane = thread % 32, row = lane % 8 + 8 * (lane / 8 % 2);
    line = address + 128 * (16 * (thread / 32) + row);
    swizzle = 16 * (lane / 16 ^ row % 8);
  }

  // Group q of 16 columns, counted from those of `block` on.
  __device__ __forceinline__ void store(int block, int q, const float4& row0, const float4& row1) const {
    ptx::stmatrix_x4(line + (block + q / 4) * kBlockBytes + (32 * (q % 4) ^ swizzle), ptx::pack_bf16(row0.x, row0.y),
                     ptx::pack_bf16(row1.x, row1.y), ptx::pack_bf16(row0.z, row0.w), ptx::pack_bf16(row1.z, row1.w));
  }
};

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

template <bool Padded, class Source>
struct WideChain {
  static constexpr int H = 256, D = 32;  // a warpgroup's
  static constexpr int kAllHidden = 512, kAllData = 64;

  const Steps& p;
  Rings product;
  Source samples;
  SharedOperand operand;
  SharedSums sums;
  int column;  // of h, the first of the thread's four in 16

  __device__ __forceinline__ bool stores() const { return threadIdx.x < 128; }

  // f of the thread's two rows of the tile.
  __device__ __forceinline__ float2 evaluate(uint32_t address) {
    const Record record{address, static_cast<uint32_t>(4 * column)};
    const Record data{address, static_cast<uint32_t>(4 * samples.column)};
    float h[H / 2];
    make_operand(data);
    product.template multiply<H, 0, Rings::kFirst>(h);
    finish(h, p.first, record);
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
      const Step& step = p.step[i];
      if (step.kind == kResidual) {
        residual(h, step, record);
      } else {
        activate_in_place(h, step);
        synchronize();
        publish(h);
        product.template multiply<H, 2, Rings::kHidden>(h);
        finish(h, step, record);
      }
    }
    float F[D / 2];
    const float2 rstd = last(F, h, p.last, record);
    const float2 f = quad_sum(
        compare<D, kAllData>(F, rstd, p, samples, data, [&](int q, int i) { return noise(samples, data, q, i); }));
    sums.put(0, f);
    synchronize();  // also: both have read A, which x_t overwrites
    return sums.get(0, f);
  }

 private:
  __device__ __forceinline__ static void synchronize() { ptx::named_barrier_sync(1, 256); }

  // All of A is written.
  __device__ __forceinline__ static void published() {
    ptx::fence_proxy_async();
    synchronize();
  }

  __device__ __forceinline__ void make_operand(const Record& data) const {
    float x_t[D / 2];
    const Coefficients row = data.coefficients();
#pragma unroll
    for (int q = 0; q < D / 16; ++q) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        set(x_t, q, i, combine(row.alpha, samples.x(q, i), row.sigma, noise(samples, data, q, i)));
      }
    }
    if (p.pre_scale >= 0) scale_columns<D>(x_t, data, p.pre_scale);
#pragma unroll
    for (int q = 0; q < D / 16; ++q) operand.store(0, samples.column / 16 + q, get(x_t, q, 0), get(x_t, q, 1));
    published();
  }

  // h as the operand, once both have read the one before.
  __device__ __forceinline__ void publish(const float (&h)[H / 2]) const {
#pragma unroll
    for (int q = 0; q < H / 16; ++q) operand.store(column / 64, q, get(h, q, 0), get(h, q, 1));
    published();
  }

  // (h - mean) scale as the operand; return rstd.
  __device__ __forceinline__ float2 publish_normalized(const float (&h)[H / 2], const Step& step,
                                                       const Record& record) const {
    float2 mean = row_means<H>(h, 1.0f);
    sums.put(0, mean);
    synchronize();  // also: both have read A
    mean = sums.get(0, mean);
    mean = make_float2(step.inverse * mean.x, step.inverse * mean.y);
    RowSums squares;
#pragma unroll
    for (int q = 0; q < H / 16; ++q) {
      const float4 scale = record.vector(step.at, q);
      const float4 z0 = centred<Padded>(h, q, 0, mean.x, step.width - column, squares);
      const float4 z1 = centred<Padded>(h, q, 1, mean.y, step.width - column, squares);
      operand.store(column / 64, q, ::fastscore::product(z0, scale), ::fastscore::product(z1, scale));
      pace(q);
    }
    float2 total = squares.total();
    sums.put(1, total);
    published();
    total = sums.get(1, total);
    return inverse_deviation(total, step);
  }

  // What a residual block's or the last product's operand is; return what the product has to be multiplied by.
  __device__ __forceinline__ float2 publish_inputs(float (&h)[H / 2], const Step& step, const Record& record) const {
    if (step.width > 0) return publish_normalized(h, step, record);
    synchronize();
    publish(h);
    return make_float2(1.0f, 1.0f);
  }

  __device__ __forceinline__ void residual(float (&h)[H / 2], const Step& step, const Record& record) {
    uint32_t saved[H / 4];  // float16: a rounding of 2^-11; beyond 65504 infinite, which the estimate reports
#pragma unroll
    for (int j = 0; j < H / 4; ++j) saved[j] = ptx::pack_f16(h[2 * j], h[2 * j + 1]);
    if (step.width == 0) scale_columns<H>(h, record, step.at);
    const float2 rstd = publish_inputs(h, step, record);
    product.template multiply<H, 2, Rings::kHidden>(h);
    const float s0 = step.factor * rstd.x, s1 = step.factor * rstd.y;
#pragma unroll
    for (int q = 0; q < H / 16; ++q) {
      const float4 bias = record.vector(step.at + kAllHidden, q);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float &u = h[element(q, 0, i)], &v = h[element(q, 1, i)];
        u = fmaf(u, s0, component(bias, i)), v = fmaf(v, s1, component(bias, i));
      }
      pace(q);
    }
    activate_in_place(h, step);
    synchronize();
    publish(h);
    product.template multiply<H, 2, Rings::kHidden>(h);
#pragma unroll
    for (int q = 0; q < H / 16; ++q) {
      const float4 gate = record.vector(step.at + 2 * kAllHidden, q);
      const float4 bias = record.vector(step.at + 3 * kAllHidden, q);
#pragma unroll
      for (int j = 0; j < 4; ++j) {  // elements 2 j and 2 j + 1 of the group: columns 2 (j / 2), of row j % 2
        const float2 before = ptx::unpack_f16(saved[4 * q + j]);
        const int i = 2 * (j / 2);
        float &u = h[8 * q + 2 * j], &v = h[8 * q + 2 * j + 1];
        u = fmaf(u, component(gate, i), before.x + component(bias, i));
        v = fmaf(v, component(gate, i + 1), before.y + component(bias, i + 1));
      }
      pace(q);
    }
  }

  __device__ __forceinline__ float2 last(float (&F)[D / 2], float (&h)[H / 2], const Step& step, const Record& record) {
    if (step.width == 0 && step.activation >= 0) activate_in_place(h, step);
    const float2 rstd = publish_inputs(h, step, record);
    product.template multiply<D, 2, Rings::kLast>(F);
    return rstd;
  }

  __device__ __forceinline__ static void finish(float (&h)[H / 2], const Step& step, const Record& record) {
    if (step.kind == kDenseScaled) {
#pragma unroll
      for (int q = 0; q < H / 16; ++q) {
        affine_columns(h, q, record.vector(step.at, q), record.vector(step.at + kAllHidden, q));
        pace(q);
      }
      return;
    }
    const float4 scale = make_float4(step.factor, step.factor, step.factor, step.factor);
#pragma unroll
    for (int q = 0; q < H / 16; ++q) {
      affine_columns(h, q, scale, record.vector(step.at, q));
      pace(q);
    }
  }
};

}  // namespace fastscore
