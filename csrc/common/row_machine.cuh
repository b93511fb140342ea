// The row machine of fastscore/ops/instructions.py, run by the threads that own a tile: h lives in registers from the first
// linear map to the last, and one switch a instruction, taken alike by all threads, replaces a kernel a network.
//
// An Engine is a kernel's way of multiplying. It has
//   kHidden, kData              columns of h and of x that the thread's warpgroup has
//   kWidth                      columns of h in all
//   column, data_column         the first of the four columns in 16 of h and of x that the thread owns
//   first(h, a), hidden(h), last(F, h)   the linear maps; a is x_t, rounded to the operand of a product
//   saved()                     where saved tiles wait
//   row_sum(v)                  the sum of v over all threads that share the thread's two rows
//   scratch                     address of the thread's first 16 bytes of what holds eps, 256 kData bytes a warpgroup
//   kKeepsEps                   whether that lasts from x_t to the prediction, or eps is made again
#pragma once

#include <cuda_runtime.h>
#include <density_mlp.h>

#include <common/activations.cuh>
#include <common/fragment.cuh>
#include <common/noise.cuh>
#include <common/saved.cuh>
#include <common/vectors.cuh>

namespace fastscore {

// Normalize the first `width` columns of every row: (h - mean) / sqrt(var + epsilon), biased variance, in two passes
// because squares cancel. The padding beyond `width` becomes zero.
//
// Sums of a row are added four side by side: the compiler keeps the order of float additions, and one chain of them
// would wait four cycles for each. (Four sums kept apart all along would spill at width 512 in the first pass.)
template <bool Padded, class Engine>
__device__ __forceinline__ void layer_norm(Engine& engine, float (&h)[Engine::kHidden / 2], int width, float epsilon) {
  constexpr int kGroups = Engine::kHidden / 16;
  const float scale = 1.0f / static_cast<float>(width);
  auto inside = [&](int q, int i) { return !Padded || engine.column + 16 * q + i < width; };
  auto of = [&](int q, int row, int i) { return inside(q, i) ? h[element(q, row, i)] : 0.0f; };
  float2 sum = make_float2(0.0f, 0.0f);
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    sum.x += (of(q, 0, 0) + of(q, 0, 1)) + (of(q, 0, 2) + of(q, 0, 3));
    sum.y += (of(q, 1, 0) + of(q, 1, 1)) + (of(q, 1, 2) + of(q, 1, 3));
  }
  const float2 mean = engine.row_sum(sum);
  float square[2][4] = {};
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    for (int i = 0; i < 4; ++i) {
      float &z0 = h[element(q, 0, i)], &z1 = h[element(q, 1, i)];
      z0 = inside(q, i) ? fmaf(-scale, mean.x, z0) : 0.0f;
      z1 = inside(q, i) ? fmaf(-scale, mean.y, z1) : 0.0f;
      square[0][i] = fmaf(z0, z0, square[0][i]);
      square[1][i] = fmaf(z1, z1, square[1][i]);
    }
  }
  const float2 total = engine.row_sum(make_float2((square[0][0] + square[0][1]) + (square[0][2] + square[0][3]),
                                                  (square[1][0] + square[1][1]) + (square[1][2] + square[1][3])));
  const float r0 = ptx::rsqrt_approx(fmaf(total.x, scale, epsilon));
  const float r1 = ptx::rsqrt_approx(fmaf(total.y, scale, epsilon));
#pragma unroll
  for (int q = 0; q < kGroups; ++q) {
    for (int i = 0; i < 4; ++i) {
      h[element(q, 0, i)] *= r0;
      h[element(q, 1, i)] *= r1;
    }
  }
}

// h = h + saved scale
template <int N, class Saved>
__device__ __forceinline__ void add_saved(const Saved& saved, float (&h)[N / 2], int slot, Operand scale,
                                          const Vectors& vectors, int column) {
  if (scale < 0) {
#pragma unroll
    for (int q = 0; q < N / 16; ++q) {
      const float4 v0 = saved.load(slot, q, 0), v1 = saved.load(slot, q, 1);
      update(h, q, v0, v1, [](float z, float v) { return z + v; });
    }
    return;
  }
  for_each_group<N>(vectors, scale, column, [&](int q, const float4& w0, const float4& w1) {
    const float4 v0 = saved.load(slot, q, 0), v1 = saved.load(slot, q, 1);
    update(h, q, product(v0, w0), product(v1, w1), [](float z, float v) { return z + v; });
  });
}

// Run the instructions between the first and the last linear map.
template <class Engine>
__device__ __forceinline__ void run(Engine& engine, float (&h)[Engine::kHidden / 2], const Vectors& vectors) {
  const DensityMlp& p = vectors.p;
  auto saved = engine.saved();  // lives no longer than the program: its registers are free before and after
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const Instruction& op = p.program[i];
    switch (op.code) {
      case kLinear:
        engine.hidden(h);
        break;
      case kAffine:
        affine<Engine::kHidden>(h, op.scale, op.shift, vectors, engine.column);
        break;
      case kAct:
        activate(h, op.argument);
        break;
      case kNorm:
        if (op.argument < Engine::kWidth) {
          layer_norm<true>(engine, h, op.argument, op.value);
        } else {
          layer_norm<false>(engine, h, op.argument, op.value);
        }
        break;
      case kSave:
        saved.save(op.argument, h);
        break;
      default:  // kAdd
        add_saved<Engine::kHidden>(saved, h, op.argument, op.scale, vectors, engine.column);
    }
  }
}

// One row of the draws: alpha and sigma make x_t of x and eps, and c (a eps + b x - F) is the error of the prediction.
struct Row {
  float sign, alpha, sigma, a, b, c;

  __device__ __forceinline__ Row(const float* rows, int r) {
    const float4 lo = __ldg(reinterpret_cast<const float4*>(rows) + 2 * r);
    const float2 hi = __ldg(reinterpret_cast<const float2*>(rows) + 4 * r + 2);
    sign = lo.x, alpha = lo.y, sigma = lo.z, a = lo.w, b = hi.x, c = hi.y;
  }
};

// Make the thread's share of eps and leave it in the engine's scratch, where the same thread finds it again.
template <int D, class Engine>
__device__ __forceinline__ void make_noise(const Engine& engine, const Vectors& vectors) {
  const DensityMlp& p = vectors.p;
  const float sign = Row(p.rows, vectors.row).sign;
  // Elements side by side hide each other's latency, 8 a group; the loads of more groups would spill at width 256.
  constexpr int kTogether = Engine::kWidth == 256 ? 2 : 4;
#pragma unroll kTogether
  for (int q = 0; q < Engine::kData / 16; ++q) {
    int column = engine.data_column + 16 * q;
    asm volatile("" : "+r"(column));  // or a loop of one turn would keep the samples' keys in registers all along
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 eps = make_eps<D>(p.keys, p.points, vectors.sample[i], vectors.row, column, sign);
      ptx::store_shared(engine.scratch + 4096 * q + 2048 * i, eps);
    }
  }
}

// Four columns of x and eps of one of the thread's rows, and what becomes of them.
struct Data {
  float4 x, eps;

  template <int D, class Engine>
  __device__ __forceinline__ static Data load(const Engine& engine, const Vectors& vectors, int q, int i) {
    const size_t at = static_cast<size_t>(vectors.sample[i]) * D + engine.data_column + 16 * q;
    return {__ldg(reinterpret_cast<const float4*>(vectors.p.x + at)),
            ptx::load_shared<float4>(engine.scratch + 4096 * q + 2048 * i)};
  }

  __device__ __forceinline__ float4 combine(float of_x, float of_eps) const {
    return make_float4(fmaf(of_x, x.x, of_eps * eps.x), fmaf(of_x, x.y, of_eps * eps.y),
                       fmaf(of_x, x.z, of_eps * eps.z), fmaf(of_x, x.w, of_eps * eps.w));
  }
};

// The operand of the first product: x_t, scaled and shifted. What is absent is decided once a row.
template <int D, class Engine>
__device__ __forceinline__ void make_x_t(uint32_t (&a)[Engine::kData / 4], const Engine& engine,
                                         const Vectors& vectors) {
  const DensityMlp& p = vectors.p;
  const Row row(p.rows, vectors.row);
  auto fill = [&](auto&& prepare) {
#pragma unroll
    for (int q = 0; q < Engine::kData / 16; ++q) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 x_t = prepare(q, Data::load<D>(engine, vectors, q, i).combine(row.alpha, row.sigma));
        a[4 * q + i] = ptx::pack_bf16(x_t.x, x_t.y);
        a[4 * q + 2 + i] = ptx::pack_bf16(x_t.z, x_t.w);
      }
    }
  };
  if (p.pre_scale < 0 && p.pre_shift < 0) return fill([](int, const float4& x_t) { return x_t; });
  fill([&](int q, float4 x_t) {
    if (p.pre_scale >= 0) x_t = product(x_t, vectors.load(p.pre_scale, engine.data_column + 16 * q));
    if (p.pre_shift >= 0) x_t = sum(x_t, vectors.load(p.pre_shift, engine.data_column + 16 * q));
    return x_t;
  });
}

// The thread's share of c^2 ||a eps + b x - prediction||^2 - ||keep eps - pull x + offset||^2 in both its rows, where
// `finish(q, found, data)` scales and shifts four columns of the network's output.
template <int D, class Engine, class F>
__device__ __forceinline__ float2 compare(const float (&prediction)[Engine::kData / 2], const Engine& engine,
                                          const Vectors& vectors, const Row& row, bool controlled, F&& finish) {
  const DensityMlp& p = vectors.p;
  float error[2] = {0.0f, 0.0f}, control[2] = {0.0f, 0.0f};
#pragma unroll
  for (int q = 0; q < Engine::kData / 16; ++q) {
    const int column = engine.data_column + 16 * q;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const Data data = Data::load<D>(engine, vectors, q, i);
      error[i] += squared_distance(data.combine(row.b, row.a), finish(q, get(prediction, q, i), data));
      if (controlled) {
        const float4 pulled = product(vectors.load(p.pull, column), data.x);
        const float4 kept = product(vectors.load(p.keep, column), data.eps);
        control[i] += squared_distance(sum(kept, vectors.load(p.offset, column)), pulled);
      }
    }
  }
  const float weight = row.c * row.c;
  return make_float2(fmaf(weight, error[0], -control[0]), fmaf(weight, error[1], -control[1]));
}

// The same with the operands that a network has: most have a shift and a reference, which are decided once a row, but
// at width 512, where the second copy of the code would spill.
template <int D, class Engine>
__device__ __forceinline__ float2 compare(const float (&prediction)[Engine::kData / 2], const Engine& engine,
                                          const Vectors& vectors) {
  const DensityMlp& p = vectors.p;
  const Row row(p.rows, vectors.row);
  auto operand = [&](Operand o, int q) { return vectors.load(o, engine.data_column + 16 * q); };
  const bool usual = p.post_scale < 0 && p.post_shift >= 0 && p.post_skip < 0 && p.keep >= 0;
  if (Engine::kWidth < 512 && usual) {
    return compare<D>(prediction, engine, vectors, row, true,
                      [&](int q, const float4& found, const Data&) { return sum(found, operand(p.post_shift, q)); });
  }
  return compare<D>(prediction, engine, vectors, row, p.keep >= 0, [&](int q, float4 found, const Data& data) {
    if (p.post_scale >= 0) found = product(found, operand(p.post_scale, q));
    if (p.post_shift >= 0) found = sum(found, operand(p.post_shift, q));
    if (p.post_skip >= 0) found = sum(found, product(data.combine(row.alpha, row.sigma), operand(p.post_skip, q)));
    return found;
  });
}

// f of the thread's two rows of the tile: its share, before `row_sum`.
template <int D, class Engine>
__device__ __forceinline__ float2 evaluate_row(Engine& engine, const Vectors& vectors) {
  make_noise<D>(engine, vectors);
  float h[Engine::kHidden / 2];
  {
    uint32_t a[Engine::kData / 4];
    make_x_t<D>(a, engine, vectors);
    engine.first(h, a);
  }
  run(engine, h, vectors);
  float prediction[Engine::kData / 2];
  engine.last(prediction, h);
  if (!Engine::kKeepsEps) make_noise<D>(engine, vectors);
  return compare<D>(prediction, engine, vectors);
}

// Write f of the thread's two rows of the tile, whose samples are `sample` and `sample` + 8: one lane of the four does.
__device__ __forceinline__ void store(const DensityMlp& p, int sample, int row, float2 f) {
  if (threadIdx.x % 4 != 0) return;
  if (sample < p.batch) p.f[static_cast<size_t>(sample) * p.rows_total + row] = f.x;
  if (sample + 8 < p.batch) p.f[static_cast<size_t>(sample + 8) * p.rows_total + row] = f.y;
}

}  // namespace fastscore
