// The fused kernel's parameters and launch: raw pointers, sizes and a stream; neither torch nor Python.
//
//   f[b, r] = c_r^2 ||a_r eps + b_r x - F(alpha_r x + sigma_r eps)||^2 - ||keep eps - pull x + offset||^2
//
// for every sample b and row r (a draw, or one sign of an antithetic pair), where F is a program of the row machine
// (fastscore/ops/instructions.py) and the second term the control variate of a Gaussian along the axes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

typedef struct CUstream_st* cudaStream_t;

namespace fastscore {

// A vector operand is a first column in one of three tables, or -1: absent. A table holds one vector a row, shared by all
// samples, one a sample, or one for each pair.
using Operand = int32_t;
constexpr int kLevelShift = 28;
constexpr int kColumnMask = (1 << kLevelShift) - 1;
enum Level : int32_t { kPerRow, kPerSample, kPerPair };

enum OpCode : int32_t { kLinear, kAffine, kAct, kNorm, kSave, kAdd };
enum Activation : int32_t { kSilu, kGelu, kGeluTanh, kRelu, kMish, kElu, kSelu, kTanh, kSigmoid, kSoftplus };

// kLinear | kAffine scale shift | kAct argument | kNorm argument = width, value = eps | kSave argument | kAdd argument
// scale: what the names of fastscore/ops/instructions.py mean, `argument` being the activation, the width or the slot.
struct Instruction {
  OpCode code;
  int32_t argument;
  Operand scale, shift;
  float value;
};

constexpr int kMaxInstructions = 160;

struct DensityMlp {
  const float* x;             // (B, D), zero beyond d
  const uint32_t* keys;       // (B, 2, D): Q and M of fastscore/ops/noise.py
  const uint32_t* points;     // (R, D): P
  const float* rows;          // (R, 8): sign, alpha, sigma, a, b, c, 0, 0
  const uint8_t* weights;     // tiles, in the order in which one row's evaluation reads them
  const float* row_table;     // (R, row_stride)
  const float* sample_table;  // (B, sample_stride)
  const float* pair_table;    // (B, R, pair_stride)
  float* f;                   // out, (B, R)
  int32_t batch, rows_total;
  int32_t row_stride, sample_stride, pair_stride;
  // All samples share these.
  Operand pre_scale, pre_shift;               // of x_t, before the first layer
  Operand post_scale, post_shift, post_skip;  // prediction = F scale + shift + x_t skip
  Operand keep, pull, offset;                 // of the control variate; keep is -1 where there is none
  int32_t count;
  Instruction program[kMaxInstructions];  // between the first and the last linear map
  // Filled in by the launch.
  int32_t rows_per_block, stages, tiles, table_stages;
  uint32_t stage_bytes, tables_at, scratch_at, barriers_at;
};

// How a kernel runs a network of padded width `hidden` on `data` padded dimensions.
struct Plan {
  int hidden, data;
  bool wgmma;        // Hopper's kernels; mma.sync elsewhere
  int samples;       // a block's
  int threads;       // a block's
  int tiles;         // of weights, stage_bytes each
  int stages;        // of them in shared memory at once; all: resident
  int table_stages;  // rows whose vectors are in shared memory at once
  int cluster;       // the most blocks that share what they stream
  uint32_t stage_bytes, tables_at, scratch_at, barriers_at, shared_bytes;
};

// Bytes in words, rounded up.
inline std::string kilobytes(uint32_t bytes) { return std::to_string((bytes + 1023) >> 10) + " KB"; }

// Fill in a plan; return why there is none, or an empty string. `capability` is 90 for 9.0, `shared_limit` what the
// device grants a block.
std::string plan(int hidden, int data, int linears, int row_stride, int capability, int shared_limit, Plan* plan);

// Make parameters of what Python sends: addresses of x, keys, points, rows, weights, the three tables and f; B, R
// and the tables' strides; PRE scale and shift, POST scale, shift and skip, keep, pull and offset; the instructions'
// bytes.
DensityMlp arguments(const uint64_t* pointers, const int32_t* sizes, const int32_t* operands, const char* program,
                     size_t bytes);

// Shared memory of width 512 beside weights and vectors: the operand, half of a saved tile, buffers of sums.
constexpr uint32_t kWideScratch = 64 * 512 * 2 + 64 * 512 + 1024;

// How blocks share the work, which changes no result; 0 where the launch chooses.
struct Config {
  int cluster;  // blocks that share the weights they stream: 1, 2 or 4
  int splits;   // parts of the rows, each a block's
};

// The same when it is decided: a grid of `tiles` x `splits` blocks, each with so many rows.
struct Division {
  int cluster, tiles, splits, rows_per_block;
};

// Divide `batch` samples and `rows` over what a device runs at once: `active(cluster)` clusters of that many blocks. Not
// every multiprocessor is in reach of a cluster: an H200 of 132 runs 66 clusters of two, but 30 of four.
Division division(const Plan& plan, int batch, int rows, const Config& config, const std::function<int(int)>& active);

// Launch on the current device; throws std::runtime_error with the values if CUDA refuses.
void density_mlp(DensityMlp parameters, const Plan& plan, const Config& config, cudaStream_t stream);

// Of a kernel family its launch, and how many clusters of `plan.cluster` blocks the current device runs at once.
void sm90_density_mlp(const DensityMlp& parameters, const Plan& plan, int tiles, int splits, cudaStream_t stream);
void sm90_density_mlp_wide(const DensityMlp& parameters, const Plan& plan, int tiles, int splits, cudaStream_t stream);
void sm80_density_mlp(const DensityMlp& parameters, const Plan& plan, int tiles, int splits, cudaStream_t stream);
int sm90_density_mlp_clusters(const Plan& plan);
int sm90_density_mlp_wide_clusters(const Plan& plan);
int sm80_density_mlp_clusters(const Plan& plan);

}  // namespace fastscore
