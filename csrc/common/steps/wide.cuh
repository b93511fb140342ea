// Steps of widths 512 and 1,024: two warpgroups of a block share 64 samples, each with 256 columns in its registers, and
// operands pass through shared memory.
//
//   warpgroup 0: columns 0 .. 255      shared memory                      warpgroup 1: columns 256 .. 511
//   h [64, 256] float32                A [64, 512] bfloat16, 64 KB        the same
//   a residual block's input, float16  a ring a warpgroup
//
// At width 512 a block is alone (one_block.cuh); at 1,024 two have half of the columns each (block_pair.cuh). A `Team`
// says how warpgroups meet and multiply:
//   vacate()       all have read A, which may be written
//   share()        all of A is written, and read by all; share_data(): x_t, which every block has whole
//   put(), get()   sums of all columns of a row, between which they meet
//   first(), hidden(), last()  the products
// Where a norm comes before a product, its sums are read where A is vacant, and its squares behind the product, for rstd
// is not needed before.
#pragma once

#include <cuda_runtime.h>
#include <steps.h>

#include <common/fragment.cuh>
#include <common/steps/ends.cuh>
#include <common/steps/operands.cuh>
#include <common/steps/record.cuh>
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

template <bool Padded, class Source, class Team>
struct WideChain {
  static constexpr int H = 256, D = 32;                  // a warpgroup's: columns of h, and of x_t
  static constexpr int kOutputs = Team::kOutputs;        // of the last product
  static constexpr int kAllHidden = 512, kAllData = 64;  // a record's vectors

  const Steps& p;
  Team team;
  Source samples;
  SharedOperand operand;
  int column;  // of the block's h, the first of the thread's four in 16

  __device__ __forceinline__ bool stores() const { return team.stores(); }

  // f of the thread's two rows of the tile.
  __device__ __forceinline__ float2 evaluate(uint32_t address) {
    const Record record{address, static_cast<uint32_t>(4 * column)};
    float h[H / 2];
    make_operand({address, static_cast<uint32_t>(4 * samples.column)});
    team.first(h);
    finish(h, p.first, record);
#pragma unroll 1
    for (int i = 0; i < p.count; ++i) {
      const Step& step = p.step[i];
      if (step.kind == kResidual) {
        residual(h, step, record);
      } else {
        activate_in_place(h, step);
        publish(h);
        team.hidden(h);
        finish(h, step, record);
      }
    }
    float F[kOutputs / 2];
    const float2 rstd = last(F, h, p.last, record);
    const Source outputs = team.of_outputs(samples);
    const Record data{address, static_cast<uint32_t>(4 * outputs.column)};
    const float2 f = quad_sum(compare<kOutputs, kAllData>(F, rstd, p, outputs, data,
                                                          [&](int q, int i) { return noise(outputs, data, q, i); }));
    team.put(Team::kResult, f);
    team.vacate();  // x_t overwrites A
    return team.get(Team::kResult, f);
  }

 private:
  __device__ __forceinline__ void make_operand(const Record& data) {
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
    team.share_data();
  }

  // h as the operand.
  __device__ __forceinline__ void publish(const float (&h)[H / 2]) {
    team.vacate();
#pragma unroll
    for (int q = 0; q < H / 16; ++q) operand.store(column / 64, q, get(h, q, 0), get(h, q, 1));
    team.share();
  }

  // (h - mean) scale as the operand; return the sums of the squares of the warpgroup's own columns.
  __device__ __forceinline__ float2 publish_normalized(const float (&h)[H / 2], const Step& step,
                                                       const Record& record) {
    float2 mean = row_means<H>(h, 1.0f);
    team.put(Team::kMeans, mean);
    team.vacate();
    mean = team.get(Team::kMeans, mean);
    mean = make_float2(step.inverse * mean.x, step.inverse * mean.y);
    const int inside = step.width - team.first_column() - column;
    RowSums squares;
#pragma unroll
    for (int q = 0; q < H / 16; ++q) {
      const float4 scale = record.vector(step.at, q);
      const float4 z0 = centred<Padded>(h, q, 0, mean.x, inside, squares);
      const float4 z1 = centred<Padded>(h, q, 1, mean.y, inside, squares);
      operand.store(column / 64, q, ::fastscore::product(z0, scale), ::fastscore::product(z1, scale));
      pace(q);
    }
    const float2 own = squares.total();
    team.put(Team::kSquares, own);
    team.share();
    return own;
  }

  // What a residual block's or the last product's operand is; return what `rstd` takes behind the product.
  __device__ __forceinline__ float2 publish_inputs(float (&h)[H / 2], const Step& step, const Record& record) {
    if (step.width > 0) return publish_normalized(h, step, record);
    publish(h);
    return make_float2(1.0f, 1.0f);
  }

  // What a product has to be multiplied by.
  __device__ __forceinline__ float2 rstd_of(const float2& squares, const Step& step) {
    return step.width > 0 ? inverse_deviation(team.get(Team::kSquares, squares), step) : squares;
  }

  __device__ __forceinline__ void residual(float (&h)[H / 2], const Step& step, const Record& record) {
    uint32_t saved[H / 4];  // float16: a rounding of 2^-11; beyond 65504 infinite, which the estimate reports
#pragma unroll
    for (int j = 0; j < H / 4; ++j) saved[j] = ptx::pack_f16(h[2 * j], h[2 * j + 1]);
    if (step.width == 0) scale_columns<H>(h, record, step.at);
    const float2 squares = publish_inputs(h, step, record);
    team.hidden(h);
    const float2 rstd = rstd_of(squares, step);
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
    publish(h);
    team.hidden(h);
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

  __device__ __forceinline__ float2 last(float (&F)[kOutputs / 2], float (&h)[H / 2], const Step& step,
                                         const Record& record) {
    if (step.width == 0 && step.activation >= 0) activate_in_place(h, step);
    const float2 squares = publish_inputs(h, step, record);
    team.last(F);
    return rstd_of(squares, step);
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
